"""Samples with media to prompts: what ``stream.PromptReader`` asks on a branch whose model sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media import MediaPlace, kind_of, media_members
from copd_megatron.data.media_share import Found, MediaShare, Outline
from copd_megatron.data.processing import media_named_in
from copd_megatron.data.samples import Sample, SampleRef
from copd_megatron.data.shards import ShardSet
from copd_megatron.errors import BadSampleError
from copd_megatron.records import IntArray, MediaRef


class MediaPrompts:
    """One shard set's media, through a loader that all sets share.

    ``source``: the name under which every branch opens these shards, such as ``image/train``; it is part of
    the references.
    """

    def __init__(
        self, loader: MediaLoader, source: str, shards: ShardSet, share: MediaShare | None = None
    ) -> None:
        """``share``: this rank decodes only this part of a batch that is announced by ``prepare``."""
        loader.register(source, shards)
        self._share = share
        self._outlines: dict[MediaPlace, Found] = {}
        self._loader = loader
        self._source = source
        self._members = {index.name: index.samples for index in shards.indexes}

    def encode(
        self, sample: Sample, where: str, system_prompt: str | None = None
    ) -> tuple[IntArray, tuple[MediaRef, ...]]:
        """Token ids with expanded placeholders, and references to the media in placeholder order.

        Raises BadSampleError as ``MediaLoader.get`` does, or ``media_mismatch``.
        """
        members = media_members(sample.media)
        processor = self._loader.processor
        kinds = [str(kind_of(extension)) for extension in members]
        messages = processor.parts(sample.prompt, kinds, where)
        chosen = _assign(messages, members, where)
        places = [self._place(sample.ref, extension) for extension in chosen]
        outlines = [self._outline(place) for place in places]
        token_ids = processor.encode(messages, outlines, where, system_prompt)
        return token_ids, tuple(p.ref(o.digest) for p, o in zip(places, outlines, strict=True))

    def prepare(self, samples: Sequence[SampleRef]) -> None:
        """Announces the samples that are encoded next. Where ranks share the decoding, they do it now;
        collective over them, with the same samples on each."""
        if self._share is None:
            return
        order = [place for ref in samples for place in self._places(ref)]
        self._outlines = {}
        if not order:
            return
        mine = [place for ref in self._share.mine(samples) for place in self._places(ref)]
        found = {place: self._found(place) for place in mine} if self._share.sends else {}
        self._outlines = self._share.tell(found, order)

    def _outline(self, place: MediaPlace) -> Outline:
        """Raises BadSampleError, DataError: see ``MediaLoader.get``."""
        found = self._outlines.get(place) or self._found(place)
        if isinstance(found, BadSampleError):
            raise found.again()
        return found

    def _found(self, place: MediaPlace) -> Found:
        try:
            ref, item = self._loader.get(place)
        except BadSampleError as error:
            return error.again()
        return Outline(ref.content_hash, item.kind, item.replacement_ids)

    def refuse_lone_placeholders(self, sample: Sample, token_ids: IntArray, where: str) -> None:
        """Raises BadSampleError (``media_mismatch``) if a sample without media shows one nevertheless."""
        processor = self._loader.processor
        pads = {processor.image_token_id, processor.video_token_id}
        named = media_named_in(sample.prompt)
        if named or pads & set(token_ids.tolist()):
            raise BadSampleError(
                where,
                "media_mismatch",
                f"the prompt shows {', '.join(named) or 'a placeholder token'}, the sample has no media",
                "Add the members that it shows, or take the placeholders out of the prompt.",
            )

    def prefetch(self, samples: Iterable[SampleRef]) -> None:
        """Announce samples whose prompts will be asked for, in that order, so that this rank's share is
        decoded meanwhile."""
        mine = samples if self._share is None else self._share.mine(samples)
        self._loader.prefetch([place for ref in mine for place in self._places(ref)], owner=self)

    def _places(self, ref: SampleRef) -> list[MediaPlace]:
        members = media_members(member.extension for member in self._members[ref.shard][ref.key])
        return [self._place(ref, extension) for extension in members]

    def _place(self, ref: SampleRef, extension: str) -> MediaPlace:
        return MediaPlace(self._source, ref.shard, ref.key, extension)


def _assign(messages: Sequence[Mapping[str, Any]], members: Sequence[str], where: str) -> list[str]:
    """The member of each placeholder: the one that its part names, else the next one of its kind."""
    unused = {kind: iter([m for m in members if kind_of(m) == kind]) for kind in ("image", "video")}
    chosen = []
    for part in (part for message in messages for part in message["content"]):
        kind = part.get("type")
        if kind not in unused:
            continue
        name = part.get(kind)
        member = name.lower() if isinstance(name, str) else next(unused[kind], None)
        if member not in members or kind_of(str(member)) != kind:
            raise BadSampleError(
                where,
                "no_member",
                f"a part of the prompt shows {kind} {member!r}, the sample has {list(members)}",
                "Name members by their extension, such as 0.png, or give no name.",
            )
        chosen.append(str(member))
    return chosen
