"""Typed metrics that are reduced over ranks once per step.

Ranks may hold different metrics: only last pipeline stages know a loss, each branch has names of its own.
So ranks first agree on a *layout*, the sorted union of everybody's names with their kinds, and keep it. A
step then costs two collectives, a max and a sum all-reduce in float64 over vectors in layout order. A rank
that meets a new name still takes part in the max all-reduce with the old layout, raising a flag that
travels in its last element; all ranks see the flag, agree anew and repeat. Every rank therefore makes the
same sequence of collective calls, whatever it holds. Names that nobody holds in a step are left out.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

Scalar = float | Tensor
"""A number, or a tensor of one element on any device, which is read at ``reduce`` and not before."""


class Kind(Enum):
    """How values of a metric join, over calls and over ranks."""

    mean = "mean"
    total = "total"
    maximum = "maximum"
    minimum = "minimum"
    value = "value"


_EXTREMES = (Kind.maximum, Kind.minimum, Kind.value)

Layout = dict[str, Kind]


@dataclass
class _Entry:
    kind: Kind
    values: list[Scalar] = field(default_factory=list)
    counts: list[Scalar] = field(default_factory=list)
    """``mean`` only, one per value."""


@dataclass(frozen=True)
class _Partial:
    """What one rank adds to a metric: two numbers to be summed over ranks, two to be maximised."""

    kind: Kind
    sums: tuple[float, float] = (0.0, 0.0)
    """(sum, count) of a mean, (sum, values) of a total, (NaN values, values) of an extreme."""
    maxima: tuple[float, float] = (-math.inf, -math.inf)
    """(v, -v) of an extreme. NaN travels as a count: a max all-reduce may lose it."""


class Metrics:
    """Collects metrics between two calls of ``reduce``.

    A name keeps its kind for good. Tensors are read at ``reduce`` only, with one transfer per device, so
    collecting never waits for a GPU.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """
        Args:
            device: where the reduced vectors live; must suit the process group (CUDA for NCCL).
        """
        self._device = torch.device(device)
        self._entries: dict[str, _Entry] = {}
        self._layouts: dict[Any, Layout] = {}
        self._uneven: set[str] = set()

    def mean(self, name: str, total: Scalar, count: Scalar = 1.0) -> None:
        """Sum of ``total`` over calls and ranks divided by the sum of ``count``.

        Left out of the result where the counts add up to 0.
        """
        entry = self._entry(name, Kind.mean)
        entry.values.append(total)
        entry.counts.append(count)

    def means(self, prefix: str, totals: Mapping[str, Scalar], count: Scalar) -> None:
        """``mean(prefix + name, total, count)`` for each of ``totals``."""
        for name, total in totals.items():
            self.mean(prefix + name, total, count)

    def total(self, name: str, value: Scalar) -> None:
        """Sum over calls and ranks."""
        self._entry(name, Kind.total).values.append(value)

    def maximum(self, name: str, value: Scalar) -> None:
        """Largest over calls and ranks; NaN if any of them is NaN."""
        self._entry(name, Kind.maximum).values.append(value)

    def minimum(self, name: str, value: Scalar) -> None:
        """Smallest over calls and ranks; NaN if any of them is NaN."""
        self._entry(name, Kind.minimum).values.append(value)

    def value(self, name: str, value: Scalar) -> None:
        """A value that is the same on all ranks that hold it, such as a learning rate; the last call counts.

        Ranks that disagree by more than 1e-6 (relative) are logged once per name; the largest is reported.
        """
        self._entry(name, Kind.value).values = [value]

    def reduce(self, process_group: Any = None) -> dict[str, float]:
        """Results over all ranks of ``process_group``, sorted by name; starts collecting anew.

        Collective: every rank of the group calls it at the same point, also ranks that hold nothing, and on
        an object that has reduced over the group as often as theirs. All ranks get the same results.

        Args:
            process_group: any torch ``ProcessGroup`` or bare backend such as ``ProcessGroupGloo``; None: this
                process alone, no collective is called.

        Raises:
            ValueError: ranks use one name for different kinds; raised on every rank.
        """
        local = self._drain()
        if process_group is None:
            layout = {name: local[name].kind for name in sorted(local)}
            return self._results(layout, _pack_sums(layout, local), _pack_maxima(layout, local))
        layout, maxima = self._reduce_maxima(process_group, local)
        sums = self._all_reduce(process_group, _pack_sums(layout, local), dist.ReduceOp.SUM)
        return self._results(layout, sums, maxima)

    def _entry(self, name: str, kind: Kind) -> _Entry:
        entry = self._entries.setdefault(name, _Entry(kind))
        if entry.kind is not kind:
            raise ValueError(
                f"metric {name!r} was collected as {entry.kind.value} and now as {kind.value}: "
                "one name, one kind"
            )
        return entry

    def _drain(self) -> dict[str, _Partial]:
        """Folds what was collected, and forgets it."""
        entries, self._entries = self._entries, {}
        flat: list[Scalar] = []
        for entry in entries.values():
            flat += entry.values + entry.counts
        numbers = iter(_to_floats(flat))
        return {
            name: _fold(
                entry.kind, [next(numbers) for _ in entry.values], [next(numbers) for _ in entry.counts]
            )
            for name, entry in entries.items()
        }

    def _reduce_maxima(self, group: Any, local: dict[str, _Partial]) -> tuple[Layout, list[float]]:
        """Max all-reduce, with a new agreement on the layout before it if any rank needs one."""
        layout = self._layouts.get(group)
        if layout is None:
            layout = self._agree(group, local, {})
        while True:
            unknown = any(layout.get(name) is not partial.kind for name, partial in local.items())
            packed = [*_pack_maxima(layout, local), float(unknown)]
            *maxima, anyone_unknown = self._all_reduce(group, packed, dist.ReduceOp.MAX)
            if not anyone_unknown:
                return layout, maxima
            layout = self._agree(group, local, layout)

    def _agree(self, group: Any, local: dict[str, _Partial], known: Layout) -> Layout:
        """Union of all ranks' names, and of those known before, which tend to come back."""
        mine = json.dumps({name: partial.kind.value for name, partial in local.items()})
        layout = dict(known)
        conflicts = []
        for rank, text in enumerate(_all_gather_text(group, mine, self._device)):
            for name, kind in json.loads(text).items():
                if layout.setdefault(name, Kind(kind)) is not Kind(kind):
                    conflicts.append(f"{name!r} is {layout[name].value} and, on group rank {rank}, {kind}")
        if conflicts:
            raise ValueError(
                f"metrics collected as different kinds: {'; '.join(conflicts)}: one name, one kind"
            )
        self._layouts[group] = {name: layout[name] for name in sorted(layout)}
        return self._layouts[group]

    def _all_reduce(self, group: Any, values: list[float], op: Any) -> list[float]:
        vector = torch.tensor(values, dtype=torch.float64, device=self._device)
        if vector.numel():
            options = dist.AllreduceOptions()
            options.reduceOp = op
            # The group's own method: the functions of torch.distributed refuse groups that were built by
            # hand, as the router's is.
            group.allreduce([vector], options).wait()
        reduced: list[float] = vector.tolist()
        return reduced

    def _results(self, layout: Layout, sums: list[float], maxima: list[float]) -> dict[str, float]:
        results = {}
        for index, (name, kind) in enumerate(layout.items()):
            first, count = sums[2 * index : 2 * index + 2]
            largest, negated_smallest = maxima[2 * index : 2 * index + 2]
            if count == 0:
                continue
            if kind is Kind.mean:
                results[name] = first / count
            elif kind is Kind.total:
                results[name] = first
            elif first > 0:
                results[name] = math.nan
            else:
                results[name] = -negated_smallest if kind is Kind.minimum else largest
                if kind is Kind.value:
                    self._check_even(name, -negated_smallest, largest)
        return results

    def _check_even(self, name: str, smallest: float, largest: float) -> None:
        if name not in self._uneven and not math.isclose(smallest, largest, rel_tol=1e-6):
            self._uneven.add(name)
            logger.warning(
                "metric %s should be the same on all ranks, but lies between %r and %r: the largest counts",
                name,
                smallest,
                largest,
            )


def _fold(kind: Kind, values: list[float], counts: list[float]) -> _Partial:
    if kind is Kind.mean:
        return _Partial(kind, sums=(_sum(values), _sum(counts)))
    if kind is Kind.total:
        return _Partial(kind, sums=(_sum(values), float(len(values))))
    numbers = [value for value in values if not math.isnan(value)]
    maxima = (max(numbers), max(-number for number in numbers)) if numbers else (-math.inf, -math.inf)
    return _Partial(kind, sums=(float(len(values) - len(numbers)), float(len(values))), maxima=maxima)


def _sum(values: list[float]) -> float:
    """Exactly rounded, hence independent of order; ``fsum`` refuses mixed infinities, which sum to NaN."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _pack_sums(layout: Layout, local: dict[str, _Partial]) -> list[float]:
    return [number for name in layout for number in (local[name].sums if name in local else (0.0, 0.0))]


def _pack_maxima(layout: Layout, local: dict[str, _Partial]) -> list[float]:
    absent = (-math.inf, -math.inf)
    return [number for name in layout for number in (local[name].maxima if name in local else absent)]


def _to_floats(scalars: list[Scalar]) -> list[float]:
    """Python floats, tensors fetched with one transfer per device."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    floats = [0.0] * len(scalars)
    for index, scalar in enumerate(scalars):
        if isinstance(scalar, Tensor):
            by_device[scalar.device].append(index)
        else:
            floats[index] = float(scalar)
    for indices in by_device.values():
        tensors = [
            torch.as_tensor(scalars[index]).detach().reshape(()).to(torch.float64) for index in indices
        ]
        for index, number in zip(indices, torch.stack(tensors).tolist(), strict=True):
            floats[index] = number
    return floats


def _all_gather_text(group: Any, text: str, device: torch.device) -> list[str]:
    """Every rank's text, by group rank."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(group.size())]
    group.allgather([lengths], [length]).wait()
    sizes = [int(size) for size in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    gathered = [torch.empty_like(padded) for _ in sizes]
    group.allgather([gathered], [padded]).wait()
    return [bytes(chunk[:size].cpu().numpy()).decode() for chunk, size in zip(gathered, sizes, strict=True)]
