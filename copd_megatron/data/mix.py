"""Several streams of prompts as one: a branch that trains on mixed data.

Which pool the next prompt comes from depends on the weights and on how many prompts each pool has given so
far, and on nothing else. So the sequence of prompts does not depend on how it is divided into batches, nor on
whether the run was resumed in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from copd_megatron.data.occurrences import number_occurrences
from copd_megatron.data.stream import PromptStream
from copd_megatron.errors import DataError
from copd_megatron.records import Prompt


def deal(weights: Sequence[Fraction], counts: Sequence[int], num_prompts: int) -> list[int]:
    """The pools, by index, that the next ``num_prompts`` prompts come from.

    After n prompts in all, pool i has given n * share_i of them, rounded down or up, for every n. This is the
    quota method of Balinski and Young (1975): among the pools that are behind their share of n, the one whose
    next prompt is due first. Ties go to the pool that is named first.

    Args:
        weights: one for each pool, above 0.
        counts: prompts that each pool has given before, as dealt by this function.
    """
    given, total, dealt = list(counts), sum(weights), []
    for position in range(sum(given) + 1, sum(given) + num_prompts + 1):
        behind = [i for i, weight in enumerate(weights) if given[i] * total < position * weight]
        chosen = min(behind, key=lambda i: (given[i] + 1) / weights[i])
        given[chosen] += 1
        dealt.append(chosen)
    return dealt


class PromptMix:
    """An endless, resumable sequence of prompts from several pools in given shares.

    Each pool has its own order and its own epochs. Over any number of prompts from the start, the shares are
    exact to one prompt.
    """

    def __init__(self, streams: Mapping[str, PromptStream], weights: Mapping[str, float]) -> None:
        """
        Args:
            streams: by name of the pool, in the order that ties are settled in.
            weights: of the same pools; a pool's share is its weight over the sum.
        """
        self._streams = dict(streams)
        self._weights = {name: float(weights[name]) for name in self._streams}
        self._counts = dict.fromkeys(self._streams, 0)

    @property
    def epochs(self) -> Mapping[str, int]:
        """Epoch of each pool's next prompt, counted from 0."""
        return {name: stream.epoch for name, stream in self._streams.items()}

    @property
    def epoch(self) -> int:
        """Epoch of the pool that is least far."""
        return min(self.epochs.values())

    @property
    def skipped(self) -> Mapping[str, int]:
        """Skipped samples of all pools by reason, over all epochs."""
        counts: Counter[str] = Counter()
        for stream in self._streams.values():
            counts.update(stream.skipped)
        return dict(counts)

    def next(self, num_prompts: int, drawn: Sequence[Prompt] = ()) -> list[Prompt]:
        """The next ``num_prompts`` prompts, the pools' prompts between each other.

        ``drawn`` and DataError: see ``PromptStream.next``.
        """
        names = list(self._streams)
        weights = [Fraction(str(self._weights[name])) for name in names]  # 0.1 is meant as one tenth
        dealt = [names[i] for i in deal(weights, list(self._counts.values()), num_prompts)]
        wanted = Counter(dealt)
        prompts = {name: iter(stream.next(wanted[name])) for name, stream in self._streams.items()}
        for name in names:
            self._counts[name] += wanted[name]
        return number_occurrences([next(prompts[name]) for name in dealt], drawn)

    def state_dict(self) -> dict[str, Any]:
        """The positions of all pools, and how many prompts each has given, as plain JSON types."""
        return {
            "pools": {name: stream.state_dict() for name, stream in self._streams.items()},
            "counts": dict(self._counts),
            "weights": dict(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken.

        If the weights have changed, the shares hold from here on: what was given before is not made up for.

        Raises DataError if the pools are others, or as ``PromptStream.load_state_dict``.
        """
        names, saved = list(self._streams), list(state.get("pools", ()))
        if set(names) != set(saved):
            raise DataError(
                f"the data positions cannot be restored: the pools are {', '.join(names)}, the checkpoint "
                f"has {', '.join(saved) or 'none'}. Restore data.pools, or start a new run."
            )
        for name, stream in self._streams.items():
            stream.load_state_dict(state["pools"][name])
        same = state["weights"] == self._weights
        self._counts = {name: int(state["counts"][name]) if same else 0 for name in names}
