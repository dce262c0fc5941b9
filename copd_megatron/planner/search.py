"""The best layouts of a run on a number of ranks, and why others lose. Pure.

A branch's seconds depend on its own layout alone; a step is a sum of maxima over branches
(``plan.step_seconds``), so a choice of a branch that is slower in every part never wins. The search keeps,
for each number of ranks, the choices that no other is better than in every part, adds one branch after the
other, and takes the best sum. That is exact: it finds what trying all combinations finds.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from copd_megatron.config.bounds import divisors
from copd_megatron.config.checks import layout
from copd_megatron.config.schema import Config, ParallelConfig, Recompute
from copd_megatron.planner.plan import (
    PHASES,
    BranchPlan,
    Inputs,
    Plan,
    branch_plan,
    exchanges,
    make_plan,
    works_of,
)

_MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One branch's layout."""

    parallel: ParallelConfig
    rollout_tensor: int
    plan: BranchPlan

    @property
    def text(self) -> str:
        """``tp 4 x dp 2, rollout tp 1``; sizes of 1 are left out."""
        return layout_text(self.parallel, self.rollout_tensor)


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A layout that is not the best."""

    text: str
    reason: str
    seconds: float
    """Of the whole schedule."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: Inputs | None
    """None: nothing fits; ``refused`` says why."""
    plan: Plan | None
    choices: Mapping[str, Choice]
    others: tuple[Alternative, ...]
    refused: tuple[tuple[str, str], ...]
    """Layouts that cannot run, and why; the first of each reason."""
    num_tried: int


def layout_text(parallel: ParallelConfig, rollout_tensor: int) -> str:
    """A layout in a few words."""
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "dp": parallel.data_parallel_size,
    }
    named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 rank"
    return f"{named}, rollout tp {rollout_tensor}"


def search(inputs: Inputs, ranks: int, *, recompute: Iterable[Recompute] | None = None) -> Found:
    """The fastest layouts of all branches on at most ``ranks`` ranks.

    Args:
        recompute: settings of ``training.recompute`` that are tried; None: the configured one, and ``full``.
    """
    modes = list(recompute or dict.fromkeys((inputs.config.training.recompute, Recompute.full)))
    results = [_search(with_recompute(inputs, mode), ranks) for mode in modes]
    fitting = [found for found in results if found.plan is not None]
    tried = sum(found.num_tried for found in results)
    if not fitting:
        return replace(results[0], num_tried=tried)
    best = min(fitting, key=lambda found: found.plan.seconds if found.plan else math.inf)
    return replace(best, num_tried=tried)


def with_recompute(inputs: Inputs, mode: Recompute) -> Inputs:
    """The same run with another ``training.recompute``."""
    config = copy.deepcopy(inputs.config)
    config.training.recompute = mode
    return replace(inputs, config=config)


def with_layouts(inputs: Inputs, layouts: Mapping[str, tuple[ParallelConfig, int]]) -> Inputs:
    """The same run with other layouts of some branches."""
    config = copy.deepcopy(inputs.config)
    for name, (parallel, rollout_tensor) in layouts.items():
        config.branches[name].parallel = parallel
        config.branches[name].rollout.tensor_parallel_size = rollout_tensor
    return replace(inputs, config=config)


def _search(inputs: Inputs, ranks: int) -> Found:
    refused: dict[str, tuple[str, str]] = {}
    fronts: dict[str, list[Choice]] = {}
    tried, known = 0, dict[str, list[Choice]]()
    for name in inputs.config.branches:
        choices = []
        for choice, reason in _choices(inputs, name, ranks - len(inputs.config.branches) + 1):
            tried += 1
            if reason is None:
                choices.append(choice)
            else:
                refused.setdefault(_kind(reason), (f"{name}: {choice.text}", reason))
        known[name] = choices
        fronts[name] = list(_undominated(inputs, choices))
    chosen = _combined(inputs, fronts, ranks)
    if chosen is None:
        best = plan = None
        picked: dict[str, Choice] = {}
        others: tuple[Alternative, ...] = ()
    else:
        picked = dict(zip(fronts, chosen, strict=True))
        best = with_layouts(inputs, {n: (c.parallel, c.rollout_tensor) for n, c in picked.items()})
        plan = make_plan(best)
        others = tuple(_alternatives(inputs, picked, known, plan))
    return Found(
        best=best, plan=plan, choices=picked, others=others, refused=tuple(refused.values()), num_tried=tried
    )


def _kind(reason: str) -> str:
    """What reasons have in common: their words without numbers."""
    return "".join(c for c in reason.partition(": ")[2] if not c.isdigit())[:60]


# ---- choices of one branch -------------------------------------------------------------------------------


def layouts_of(inputs: Inputs, name: str, most: int) -> Iterator[tuple[ParallelConfig, int]]:
    """All layouts of a branch on up to ``most`` ranks that its model and the nodes could have."""
    config, shape = inputs.config, inputs.shapes[name]
    node = inputs.machine.ranks_per_node
    tensors = [t for t in divisors(math.gcd(shape.num_attention_heads, shape.num_query_groups)) if t <= node]
    stages = [p for p in divisors(shape.num_layers) if p <= most]
    contexts = [1, 2, 4, 8] if config.model.max_sequence_tokens >= 16384 else [1]
    experts = divisors(shape.num_experts) if shape.num_experts else [1]
    for tensor, pipeline, context in itertools.product(tensors, stages, contexts):
        unit = tensor * pipeline * context
        for data in _data_sizes(unit, most, node):
            ranks = unit * data
            for expert in experts:
                if (ranks // pipeline) % expert:
                    continue
                parallel = ParallelConfig(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    context_parallel_size=context,
                    expert_model_parallel_size=expert,
                    data_parallel_size=data,
                    sequence_parallel=tensor > 1
                    and (shape.num_experts is not None or config.branches[name].parallel.sequence_parallel),
                )
                for rollout in divisors(math.gcd(ranks, node * shape.num_attention_heads)):
                    if (rollout <= node and not config.branches[name].frozen) or rollout == 1:
                        yield parallel, rollout


def _data_sizes(unit: int, most: int, node: int) -> Iterator[int]:
    """Data-parallel sizes: all on few ranks; on many, those that make two or three times a power of two."""
    for data in range(1, most // unit + 1):
        ranks = unit * data
        odd = ranks // (ranks & -ranks)
        if most <= 2 * node or (odd in (1, 3, 5) and (ranks % node == 0 or ranks < node)):
            yield data


def _choices(inputs: Inputs, name: str, most: int) -> Iterator[tuple[Choice, str | None]]:
    """Layouts of a branch, and why they cannot run."""
    alone = copy.deepcopy(inputs.config)
    alone.branches = {name: alone.branches[name]}
    works = works_of(inputs, name)
    for parallel, rollout in layouts_of(inputs, name, most):
        alone.branches[name].parallel = parallel
        alone.branches[name].rollout.tensor_parallel_size = rollout
        wrong = next(layout.problems(alone, {name: inputs.shapes[name]}), None)
        tried = _with_branch(inputs, name, parallel, rollout)
        plan = branch_plan(tried, name, works, even_if_refused=False)
        yield Choice(parallel=parallel, rollout_tensor=rollout, plan=plan), wrong or plan.refusal


def _with_branch(inputs: Inputs, name: str, parallel: ParallelConfig, rollout: int) -> Inputs:
    """As ``with_layouts`` for one branch, without copying the rest."""
    branch = inputs.config.branches[name]
    changed = replace(
        branch, parallel=parallel, rollout=replace(branch.rollout, tensor_parallel_size=rollout)
    )
    config = replace(inputs.config, branches={**inputs.config.branches, name: changed})
    return replace(inputs, config=config)


# ---- all branches together -------------------------------------------------------------------------------

_Vector = tuple[float, ...]
"""Seconds that are maximised over branches: three parts of a step in each phase, or the whole of it."""


def _vector(config: Config, plan: BranchPlan) -> _Vector:
    found: list[float] = []
    for phase in PHASES:
        if phase in plan.steps:
            seconds = plan.steps[phase].seconds
            if exchanges(config, phase):
                found += [seconds.before, seconds.between, seconds.after]
            else:
                found.append(seconds.total)
    return tuple(found)


def _weights(config: Config, plan: BranchPlan) -> _Vector:
    """Steps that each entry of a vector is paid in."""
    schedule = config.schedule
    counts = {"rlvr": schedule.rlvr_steps, "opd": schedule.opd_steps}
    found: list[float] = []
    for phase in PHASES:
        if phase in plan.steps:
            found += [float(counts[phase])] * (3 if exchanges(config, phase) else 1)
    return tuple(found)


def _undominated(inputs: Inputs, choices: Sequence[Choice]) -> Iterator[Choice]:
    """Of every number of ranks, the choices that no other is better than in every part."""
    by_ranks: dict[int, list[tuple[_Vector, Choice]]] = {}
    for choice in choices:
        vector = _vector(inputs.config, choice.plan)
        front = by_ranks.setdefault(choice.plan.ranks, [])
        if not any(_at_least_as_good(other, vector) for other, _ in front):
            front[:] = [(v, c) for v, c in front if not _at_least_as_good(vector, v)]
            front.append((vector, choice))
    for front in by_ranks.values():
        yield from (choice for _, choice in front)


def _at_least_as_good(one: _Vector, other: _Vector) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


_Partial = tuple[int, _Vector, tuple[Choice, ...]]


def _combined(
    inputs: Inputs, fronts: Mapping[str, Sequence[Choice]], ranks: int
) -> tuple[Choice, ...] | None:
    """One choice a branch, on at most ``ranks`` ranks, with the least seconds; None where there is none."""
    config = inputs.config
    partial: list[_Partial] = []
    for number, (name, front) in enumerate(fronts.items()):
        least = sum(
            min((c.plan.ranks for c in fronts[other]), default=ranks + 1)
            for other in list(fronts)[number + 1 :]
        )
        options: list[_Partial] = [(c.plan.ranks, _vector(config, c.plan), (c,)) for c in front]
        if number:
            options = [
                (r + used, tuple(map(max, v, vector)), (*before, *mine))
                for r, v, before in partial
                for used, vector, mine in options
                if r + used + least <= ranks
            ]
        partial = _pruned([o for o in options if o[0] + least <= ranks])
        if not partial:
            return None
        assert name in fronts
    weights = _weights(config, partial[0][2][0].plan)
    return min(partial, key=lambda one: (math.sumprod(weights, one[1]), one[0]))[2]


def _pruned(options: list[_Partial]) -> list[_Partial]:
    """Without those that take at least as many ranks as another and are better nowhere."""
    kept: list[_Partial] = []
    for option in sorted(options, key=lambda one: (one[0], sum(one[1]))):
        if not any(_at_least_as_good(other[1], option[1]) for other in kept):
            kept.append(option)
    return kept


# ---- the next ones ---------------------------------------------------------------------------------------


def _alternatives(
    inputs: Inputs, picked: Mapping[str, Choice], known: Mapping[str, Sequence[Choice]], plan: Plan
) -> list[Alternative]:
    """The best layouts that change one branch alone, without taking more ranks, and what they lose."""
    found: list[Alternative] = []
    for name, mine in picked.items():
        for choice in known[name]:
            same = (choice.parallel, choice.rollout_tensor) == (mine.parallel, mine.rollout_tensor)
            if same or choice.plan.ranks > mine.plan.ranks:
                continue
            plans = [choice.plan if other == name else picked[other].plan for other in picked]
            vectors = [_vector(inputs.config, one) for one in plans]
            cycles = inputs.config.schedule.cycles
            total = cycles * math.sumprod(
                _weights(inputs.config, plans[0]), [max(v) for v in zip(*vectors, strict=True)]
            )
            found.append(
                Alternative(
                    text=f"{name}: {choice.text} ({choice.plan.ranks} ranks)",
                    reason=_loss(mine.plan, choice.plan, total - plan.seconds, plan.seconds),
                    seconds=total,
                )
            )
    found.sort(key=lambda one: one.seconds)
    return found[:_MOST_SHOWN]


def _loss(best: BranchPlan, other: BranchPlan, lost: float, whole: float) -> str:
    """What makes another layout slower: the part that grows most."""
    growth: dict[str, float] = {}
    for phase, step in other.steps.items():
        mine = best.steps[phase].seconds.parts()
        for part, seconds in step.seconds.parts().items():
            growth[part] = max(growth.get(part, -math.inf), seconds - mine[part])
    part = max(growth, key=lambda name: growth[name])
    if growth[part] <= 0:
        return "no slower itself, and another branch sets the pace"
    share = f"{lost / whole:+.1%} of the run" if lost > 0 else "hidden behind slower branches"
    return f"{part} {growth[part]:+.3g} s a step, {share}"
