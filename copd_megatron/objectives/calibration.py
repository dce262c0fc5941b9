"""What verdicts say of a teacher's scores, and what is done about it (Uni-OPD, arXiv 2605.03677).

numpy only, float64. The return of a response is G = mean_t r_t over its tokens, r_t = log pi_T(y_t) -
log pi_S(y_t). A group (or a batch) keeps the order of the verdicts if its margin m reaches a target delta::

    mean     m = mean(G | correct) - mean(G | incorrect)
    min_max  m = min(G | correct) - max(G | incorrect)

A group in which either class is empty has no margin. A response without a verdict takes part in nothing.

Shape legend: ``n`` responses, ``R`` tokens of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from copd_megatron.config.schema import (
    CalibrationConfig,
    Gate,
    GateConfig,
    Margin,
    MarginShift,
    MarginStatistic,
    Scope,
)
from copd_megatron.objectives.rows import BoolArray, Float64Array
from copd_megatron.records import FloatArray


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What is changed about the scores of n responses."""

    shift: Float64Array
    """[n] added to every token's r_t."""
    masks: Sequence[FloatArray]
    """[R] each; 0 leaves a token out of the loss."""
    margins_before: Float64Array
    """[groups] of the groups that have both classes."""
    margins_after: Float64Array
    """[groups] with the shift, over the responses that are left."""
    target: float

    @property
    def num_ordered(self) -> int:
        """Groups whose margin reached the target before anything was changed."""
        return int((self.margins_before >= self.target).sum())

    @property
    def num_masked_tokens(self) -> int:
        return sum(int((mask == 0).sum()) for mask in self.masks)


@dataclass
class _State:
    """Returns, verdicts and what has been decided so far."""

    returns: Float64Array
    correct: BoolArray
    known: BoolArray
    shift: Float64Array = field(init=False)
    kept: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        self.shift = np.zeros(len(self.returns))
        self.kept = np.ones(len(self.returns), dtype=bool)


def calibrate(
    deltas: Sequence[npt.ArrayLike],
    rewards: Sequence[float | None],
    group_ids: Sequence[str],
    config: CalibrationConfig,
    seed: int,
) -> Calibrated:
    """Margin shift or mask, correctness balancing and gap mask, as configured.

    Balancing leaves responses out of the loss, but not out of the margins; a margin mask does both. Every
    rank of a branch holds all of its responses, so the batch's margin needs no reduction over ranks.

    Args:
        deltas: [R] r_t of each response.
        rewards: the verifier's grade of each; None: no verdict.
        group_ids: responses to the same prompt share one.
        seed: of the random choice of what balancing leaves out; the same on every rank.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(deltas) == len(rewards) == len(group_ids):
        raise ValueError(
            f"{len(deltas)} responses' scores, {len(rewards)} rewards and {len(group_ids)} group ids: give "
            "one of each for every response"
        )
    scores = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    known = np.array([reward is not None for reward in rewards], dtype=bool)
    state = _State(
        returns=np.array([score.mean() if len(score) else 0.0 for score in scores]),
        correct=np.array([r is not None and r >= config.correct_reward for r in rewards], dtype=bool),
        known=known,
    )
    groups = _members(group_ids, state, config.margin_scope)
    before = [_margin(state, members, config.statistic) for members in groups]
    for members, margin in zip(groups, before, strict=True):
        if config.margin is Margin.shift and margin < config.margin_target:
            _shift(state, members, config.margin_target - margin, config.shift)
        elif config.margin is Margin.mask:
            _mask(state, members, config)
    after = [_margin(state, members, config.statistic) for members in groups]
    trains = state.kept.copy()
    if config.balance is not None:
        rng = np.random.default_rng(seed)
        for members in _members(group_ids, state, config.balance_scope):
            trains[_excess(state, members[state.kept[members]], config.balance, rng)] = False
    return Calibrated(
        shift=state.shift,
        masks=[
            _token_mask(score, bool(train), config.max_gap)
            for score, train in zip(scores, trains, strict=True)
        ],
        margins_before=np.array(before),
        margins_after=np.array(after),
        target=config.margin_target,
    )


def _members(group_ids: Sequence[str], state: _State, scope: Scope) -> list[npt.NDArray[np.int64]]:
    """Responses with a verdict of every group that has both classes."""
    labels = np.asarray(group_ids) if scope is Scope.group else np.zeros(len(group_ids), dtype=np.int64)
    found = []
    for label in dict.fromkeys(labels.tolist()):
        members = np.flatnonzero((labels == label) & state.known)
        if 0 < state.correct[members].sum() < len(members):
            found.append(members)
    return found


def _margin(state: _State, members: npt.NDArray[np.int64], statistic: MarginStatistic) -> float:
    """Margin of the members that are kept; both classes are there."""
    members = members[state.kept[members]]
    values, correct = (state.returns + state.shift)[members], state.correct[members]
    if statistic is MarginStatistic.mean:
        return float(values[correct].mean() - values[~correct].mean())
    return float(values[correct].min() - values[~correct].max())


def _shift(state: _State, members: npt.NDArray[np.int64], missing: float, direction: MarginShift) -> None:
    """Moves returns until the margin is the target."""
    up, down = {
        MarginShift.both: (0.5, 0.5),
        MarginShift.lift: (1.0, 0.0),
        MarginShift.drop: (0.0, 1.0),
    }[direction]
    state.shift[members] = np.where(state.correct[members], up * missing, -down * missing)


def _mask(state: _State, members: npt.NDArray[np.int64], config: CalibrationConfig) -> None:
    """Drops the worst response of one class or the other, whichever raises the margin more, until the margin
    is the target, neither raises it, or both classes are at their floor."""
    floor = {
        right: max(1, int((state.correct[members] == right).sum() * config.mask_floor))
        for right in (True, False)
    }
    while (margin := _margin(state, members, config.statistic)) < config.margin_target:
        tried = list(_without_one(state, members, floor, config.statistic))
        best, dropped = max(tried, default=(-math.inf, -1))
        if best <= margin:
            return
        state.kept[dropped] = False


def _without_one(
    state: _State, members: npt.NDArray[np.int64], floor: dict[bool, int], statistic: MarginStatistic
) -> Iterator[tuple[float, int]]:
    """(margin, response) without the least correct, and without the largest incorrect response."""
    for right in (True, False):
        present = members[state.kept[members] & (state.correct[members] == right)]
        if len(present) <= floor[right]:
            continue
        returns = state.returns[present]
        worst = int(present[returns.argmin() if right else returns.argmax()])
        state.kept[worst] = False
        yield _margin(state, members, statistic), worst
        state.kept[worst] = True


def _excess(
    state: _State, members: npt.NDArray[np.int64], ratio: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Responses to leave out so that correct : incorrect comes as near to ``ratio`` as it can."""
    correct, wrong = members[state.correct[members]], members[~state.correct[members]]
    if not len(correct) or not len(wrong):
        return members[:0]
    if len(correct) > ratio * len(wrong):
        keep = max(1, round(ratio * len(wrong)))
        return rng.permutation(correct)[keep:]
    keep = max(1, round(len(correct) / ratio))
    return rng.permutation(wrong)[keep:]


def _token_mask(delta: Float64Array, trains: bool, max_gap: float | None) -> FloatArray:
    keep = np.full(len(delta), trains)
    if max_gap is not None:
        keep &= np.abs(delta) < max_gap
    return keep.astype(np.float32)


def opened(teacher: Sequence[float], student: Sequence[float], config: GateConfig) -> BoolArray:
    """[prompts] where a teacher may teach, by the pass rates of both on each prompt.

    Raises:
        ValueError: the lengths differ.
    """
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} pass rates of the teacher, {len(student)} of the student")
    better = np.asarray(teacher, dtype=np.float64) - np.asarray(student, dtype=np.float64)
    if config.scope is Gate.pool and len(better):
        better = np.full(len(better), better.mean())
    open_: BoolArray = better > config.margin
    return open_
