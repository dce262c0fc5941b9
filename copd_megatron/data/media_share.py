"""Which media of a batch a rank decodes, and what the other ranks of its branch tell it about theirs.

All ranks of a branch draw the same prompts. To write a prompt, a rank must know how many tokens each medium
takes, which only its decoding shows, but not the pixels: those are needed where the prompt is sampled and
trained on. So each rollout replica decodes its share of a batch, and they exchange what a prompt is made of:
a few kilobytes in place of hundreds of megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copd_megatron.data.media import MediaPlace
from copd_megatron.errors import BadSampleError
from copd_megatron.records import IntArray


@dataclass(frozen=True)
class Outline:
    """What a prompt is made of, of one medium: the part of ``ItemFeatures`` without its pixels."""

    digest: str
    """Hash of the encoded file."""
    kind: str
    replacement_ids: IntArray
    """The tokens that replace the one placeholder token in the prompt."""


Found = Outline | BadSampleError
"""A medium's outline, or why it cannot be used."""


@dataclass(frozen=True, kw_only=True)
class MediaShare:
    """This rank's part in decoding a batch."""

    index: int
    count: int
    """The rank decodes the batch's samples ``index``, ``index + count``, ..., which is what its replica will
    sample (``rollout.engine.split_replicas``)."""
    sends: bool
    """One of the ranks with this ``index`` tells the others."""
    exchange: Callable[[Any], Sequence[Any]]
    """What every rank of the branch gave, on every one of them; collective."""

    def mine[T](self, batch: Iterable[T]) -> list[T]:
        """The part of a batch that this rank decodes."""
        return list(batch)[self.index :: self.count]

    def tell(self, found: Mapping[MediaPlace, Found], order: Sequence[MediaPlace]) -> dict[MediaPlace, Found]:
        """The outlines of a whole batch, whose places are in ``order`` on every rank; collective.

        ``found``: of this rank's share; empty where it does not send.
        """
        number = {place: i for i, place in enumerate(order)}
        told = [_plain(number[place], outline) for place, outline in found.items()]
        parts = self.exchange(told)
        return {order[entry[0]]: _restored(*entry[1:]) for part in parts for entry in part}


def _plain(number: int, found: Found) -> tuple[Any, ...]:
    """In types that messages may hold."""
    if isinstance(found, BadSampleError):
        return number, False, found.told
    return number, True, (found.digest, found.kind, found.replacement_ids)


def _restored(usable: bool, values: tuple[Any, ...]) -> Found:
    return Outline(*values) if usable else BadSampleError(*values)
