"""Samples with media to prompts: what ``stream.PromptReader`` asks on a branch whose model sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media import MediaPlace, kind_of, media_members
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

    def __init__(self, loader: MediaLoader, source: str, shards: ShardSet) -> None:
        loader.register(source, shards)
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
        loaded = [self._loader.get(self._place(sample.ref, extension)) for extension in chosen]
        token_ids = processor.encode(messages, [item for _, item in loaded], where, system_prompt)
        return token_ids, tuple(ref for ref, _ in loaded)

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
        """Announce samples whose prompts will be asked for, in that order."""
        self._loader.prefetch(
            [
                self._place(ref, extension)
                for ref in samples
                for extension in media_members(
                    member.extension for member in self._members[ref.shard][ref.key]
                )
            ],
            owner=self,
        )

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
