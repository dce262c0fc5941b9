"""Typed metrics that are reduced over ranks once per step.

Ranks may hold different metrics: only last pipeline stages know a loss, and each branch has names of its own.
The ranks therefore first agree on a *catalogue*, the sorted union of all names with their kinds, and keep it.
A step then costs two collectives: a max and a sum all-reduce, in float64, over vectors in catalogue order. A
rank with a new name still takes part in the max all-reduce with the old catalogue, but raises a flag in its
last element. All ranks see the flag, agree again and repeat. So every rank makes the same sequence of
collective calls, whatever it holds. Names that no rank holds in a step are left out.
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
"""A number, or a tensor of one element on any device, which is not read before ``reduce``."""


class Kind(Enum):
    """How the values of a metric are combined, over calls and over ranks."""

    mean = "mean"
    total = "total"
    maximum = "maximum"
    minimum = "minimum"
    value = "value"


_EXTREMES = (Kind.maximum, Kind.minimum, Kind.value)

Catalogue = dict[str, Kind]
"""Metric names, sorted, to their kinds."""


@dataclass
class _Entry:
    kind: Kind
    values: list[Scalar] = field(default_factory=list)
    counts: list[Scalar] = field(default_factory=list)
    """One per value; for means only."""


@dataclass(frozen=True)
class _Partial:
    """What one rank contributes to a metric: two numbers to sum over ranks and two to maximise."""

    kind: Kind
    sums: tuple[float, float] = (0.0, 0.0)
    """(sum, count) of a mean, (sum, values) of a total, (NaN values, values) of an extreme."""
    maxima: tuple[float, float] = (-math.inf, -math.inf)
    """(v, -v) of an extreme. NaNs are counted instead, because a max all-reduce may lose them."""


class Metrics:
    """Collects metrics between two calls of ``reduce``.

    A name keeps its kind for the whole run. Tensors are only read in ``reduce``, with one transfer per
    device, so collecting never waits for a GPU.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """
        Args:
            device: of the reduced vectors; must suit the process group (CUDA for NCCL).
        """
        self._device = torch.device(device)
        self._entries: dict[str, _Entry] = {}
        self._catalogues: dict[Any, Catalogue] = {}
        self._uneven: set[str] = set()

    def mean(self, name: str, total: Scalar, count: Scalar = 1.0) -> None:
        """Sum of ``total`` over calls and ranks divided by the sum of ``count``.

        Left out of the result if the counts add up to 0.
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
        """A value that is the same on all ranks that hold it, such as a learning rate. The last call counts.

        If ranks disagree by more than 1e-6 (relative), this is logged once per name and the largest is
        reported.
        """
        self._entry(name, Kind.value).values = [value]

    def reduce(self, process_group: Any = None) -> dict[str, float]:
        """Results over all ranks of ``process_group``, sorted by name. Collecting then starts again from
        nothing.

        Collective: every rank of the group must call it at the same point, even if it holds nothing, and on
        an object that has been reduced over the group as often as those of the other ranks. All ranks get the
        same results.

        Args:
            process_group: any torch ``ProcessGroup``, or a bare backend such as ``ProcessGroupGloo``. None
                means this process alone, without any collective.

        Raises:
            ValueError: ranks use the same name for different kinds; raised on every rank.
        """
        local = self._drain()
        if process_group is None:
            catalogue = {name: local[name].kind for name in sorted(local)}
            return self._results(catalogue, _pack_sums(catalogue, local), _pack_maxima(catalogue, local))
        catalogue, maxima = self._reduce_maxima(process_group, local)
        sums = self._all_reduce(process_group, _pack_sums(catalogue, local), dist.ReduceOp.SUM)
        return self._results(catalogue, sums, maxima)

    def _entry(self, name: str, kind: Kind) -> _Entry:
        entry = self._entries.setdefault(name, _Entry(kind))
        if entry.kind is not kind:
            raise ValueError(
                f"metric {name!r} was collected as {entry.kind.value} and now as {kind.value}: "
                "every metric has one kind"
            )
        return entry

    def _drain(self) -> dict[str, _Partial]:
        """Combines what was collected, and clears it."""
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

    def _reduce_maxima(self, group: Any, local: dict[str, _Partial]) -> tuple[Catalogue, list[float]]:
        """Max all-reduce, repeated with a new catalogue if any rank needs one."""
        catalogue = self._catalogues.get(group)
        if catalogue is None:
            catalogue = self._agree(group, local, {})
        while True:
            unknown = any(catalogue.get(name) is not partial.kind for name, partial in local.items())
            packed = [*_pack_maxima(catalogue, local), float(unknown)]
            *maxima, anyone_unknown = self._all_reduce(group, packed, dist.ReduceOp.MAX)
            if not anyone_unknown:
                return catalogue, maxima
            catalogue = self._agree(group, local, catalogue)

    def _agree(self, group: Any, local: dict[str, _Partial], known: Catalogue) -> Catalogue:
        """Union of all ranks' names and of those known before, which usually come back."""
        mine = json.dumps({name: partial.kind.value for name, partial in local.items()}, allow_nan=False)
        catalogue = dict(known)
        conflicts = []
        for rank, text in enumerate(_all_gather_text(group, mine, self._device)):
            for name, kind in json.loads(text).items():
                if catalogue.setdefault(name, Kind(kind)) is not Kind(kind):
                    conflicts.append(f"{name!r} is {catalogue[name].value} and, on group rank {rank}, {kind}")
        if conflicts:
            raise ValueError(
                f"metrics collected as different kinds: {'; '.join(conflicts)}: every metric has one kind"
            )
        self._catalogues[group] = {name: catalogue[name] for name in sorted(catalogue)}
        return self._catalogues[group]

    def _all_reduce(self, group: Any, values: list[float], op: Any) -> list[float]:
        vector = torch.tensor(values, dtype=torch.float64, device=self._device)
        if vector.numel():
            options = dist.AllreduceOptions()
            options.reduceOp = op
            # the group's own method, since functions of torch.distributed refuse groups that were not made by
            # new_group, such as the router's
            group.allreduce([vector], options).wait()
        reduced: list[float] = vector.tolist()
        return reduced

    def _results(self, catalogue: Catalogue, sums: list[float], maxima: list[float]) -> dict[str, float]:
        results = {}
        for index, (name, kind) in enumerate(catalogue.items()):
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
                "metric %s should be the same on all ranks, but ranges from %r to %r; the largest is "
                "reported",
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
    """Exactly rounded and therefore independent of order. ``fsum`` refuses infinities of both signs, whose
    sum is NaN."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _pack_sums(catalogue: Catalogue, local: dict[str, _Partial]) -> list[float]:
    return [number for name in catalogue for number in (local[name].sums if name in local else (0.0, 0.0))]


def _pack_maxima(catalogue: Catalogue, local: dict[str, _Partial]) -> list[float]:
    absent = (-math.inf, -math.inf)
    return [number for name in catalogue for number in (local[name].maxima if name in local else absent)]


def _to_floats(scalars: list[Scalar]) -> list[float]:
    """Python floats. Tensors are fetched with one transfer per device."""
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
    """The text of every rank, ordered by group rank."""
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
