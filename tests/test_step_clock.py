"""The parts of a step add up to it, whatever its operations are."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.metrics.step_clock import PARTS, StepClock, part_of

NAMES = (
    *("rollout.generate", "rewards.grade", "rollout.gather", "policy.log_probs", "opd.exchange 3"),
    *("opd.receive rows a<-b", "opd.score a<-b", "update", "policy.forward_backward", "weight_sync"),
    *("checkpoint.agree", "checkpoint.write", "metrics", "barrier x", "export", "rollout.load base"),
)
TREE = st.recursive(
    st.tuples(st.sampled_from(NAMES), st.just([])),
    lambda inner: st.tuples(st.sampled_from(NAMES), st.lists(inner, max_size=3)),
    max_leaves=12,
)


class Hours:
    """A clock that goes on by one with every look at it."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def _run(clock: StepClock, hours: Hours, tree: tuple[str, list], outer: str = "") -> dict[str, float]:
    """Reports an operation with all its inner ones; what each part should get of it."""
    name, inner = tree
    path, begin = outer + name, hours.monotonic()
    expected: dict[str, float] = {}
    inside = 0.0
    for operation in inner:
        before = hours.now
        for part, seconds in _run(clock, hours, operation, path + " > ").items():
            expected[part] = expected.get(part, 0.0) + seconds
        inside += hours.now - before - 1  # from the inner operation's own begin to its end
    end = hours.monotonic()
    clock.operation(path, begin, end)
    own = part_of(path)
    expected[own] = expected.get(own, 0.0) + end - begin - inside
    return expected


@given(st.lists(TREE, max_size=4))
def test_every_instant_belongs_to_one_part(trees: list) -> None:
    hours = Hours()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", hours.monotonic)
        clock = StepClock()
        expected: dict[str, float] = {}
        for tree in trees:
            for part, seconds in _run(clock, hours, tree).items():
                expected[part] = expected.get(part, 0.0) + seconds
        seconds, parts = clock.lap()
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(seconds)
    for part in set(PARTS) - {"other"}:
        assert parts[part] == pytest.approx(expected.get(part, 0.0))
    assert parts["other"] >= expected.get("other", 0.0)


def test_what_is_scored_for_others_is_teaching() -> None:
    assert part_of("policy.log_probs") == "scoring"
    assert part_of("opd.exchange 1 > opd.score a<-b > policy.log_probs") == "teaching"
    assert part_of("opd.exchange 1 > opd.score a<-b > rollout.generate") == "generation"
    assert part_of("opd.exchange 1 > opd.receive rows a<-b") == "waiting"
    assert part_of("opd.exchange 1") == "exchange"


def test_an_evaluation_is_an_evaluation_and_the_next_step_has_nothing_of_it() -> None:
    clock = StepClock()
    with clock.part("evaluation"):
        clock.operation("rollout.generate", 0.0, 5.0)
        clock.detail("generation_seconds/native", 5.0)
        with clock.part("samples"):
            time.sleep(0.01)
    assert clock.details == {}
    seconds, parts = clock.lap()
    assert parts["generation"] == 0 == parts["samples"] and parts["evaluation"] >= 0.01
    assert sum(parts.values()) == pytest.approx(seconds)
    clock.detail("generation_seconds/native", 1.0)
    assert clock.lap()[1]["evaluation"] == 0 and clock.details == {}
