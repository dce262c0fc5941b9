"""``opd.max_teacher_lag``: what is asked ahead, which weights sample, score and learn from it, and that
branches wait less and are never more than a step apart.

The loop, the stages and the router are the trainer's; models are replaced by functions of their version.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.branch.schedule import asked_ahead, in_step, steps
from copd_megatron.config import Config, ConfigError, load_config, validate
from copd_megatron.config.graph import build_graph
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.policy.scores import SequenceScore
from copd_megatron.records import Ask, Prompt, Rollout, TopK, TrainRow
from tests.support.commands import ROOT
from tests.support.distributed import run_distributed

RANKS = {"addition": (0,), "running_sums": (1,)}
VOCAB = 4
HELD = {4: 1, 7: 0}
"""Steps of Phase II in which a rank does not sample until the other one has ended the step."""
STOP_AFTER = 4
"""Steps that a run has done when it is stopped: in the middle of Phase II."""


def _config(lag: int, *overrides: str) -> Config:
    given = [f"opd.max_teacher_lag={lag}", f"training.max_weight_lag={lag}", "schedule.cycles=1"]
    given += ["schedule.rlvr_steps=2", "schedule.opd_steps=8", "opd.behaviour.num_states=4", "opd.beta=1"]
    given += ["opd.delta_clip=null"]
    return load_config(ROOT / "configs/two_branch_tiny.yaml", [*given, *overrides])


# ---- a loop without models -------------------------------------------------------------------------------


def _rollout(key: str, version: int) -> Rollout:
    prompt = Prompt(
        prompt_id=f"shard/{key}", domain="d", token_ids=np.arange(2, dtype=np.int32), answer="", verifier="v"
    )
    return Rollout(
        prompt=prompt, sample_index=0, token_ids=np.arange(5, dtype=np.int32),
        rollout_logprobs=np.full(3, -1.0 - version, np.float32), text="", truncated=False,
        weight_version=version, seed=0, reward=0.0,
    )  # fmt: skip


def _said(version: int, sequence: Any, states: Any = ()) -> SequenceScore:
    """What weights of a version say: their log-probabilities tell which they are."""
    length = len(sequence.token_ids) - sequence.prompt_length
    return SequenceScore(
        logprobs=np.full(length, -1.0 - version, np.float32),
        entropy=np.zeros(length, np.float32),
        state_logprobs=np.full((len(states), VOCAB), np.log(1 / VOCAB), np.float32),
    )


def _score(me: Any, sequences: Any, states: Any = None, **_: Any) -> list[SequenceScore]:
    asked = states or [()] * len(sequences)
    return [_said(me.actor.version, s, where) for s, where in zip(sequences, asked, strict=True)]


def _teach(me: Any, wanted: list[ScoreRequest], step: Any) -> list[TeacherScore]:
    """The teacher's weights are as far from the student's as their names."""
    answers = []
    for request in wanted:
        said = _said(me.actor.version, request, request.ask.positions)
        answers.append(
            TeacherScore(
                row_id=request.row_id, weight_version=me.actor.version, distributions=said.state_logprobs,
                logprobs=said.logprobs / 2 if request.ask.tokens else said.logprobs[:0],
            )
        )  # fmt: skip
    return answers


class _Recorder:
    """Metrics as they come."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def mean(self, name: str, total: float, count: float = 1.0) -> None:
        self.seen[name] = total / count if count else 0.0

    def value(self, name: str, value: float) -> None:
        self.seen[name] = value

    total = maximum = value


def _branch(world: Any, config: Config) -> Any:
    from copd_megatron.branch.start import objectives_of
    from copd_megatron.opd.router import Router

    graph = build_graph(config)
    edges = graph.into(world.branch)
    stream = SimpleNamespace(next=lambda count: [f"{count}"])
    return SimpleNamespace(
        name=world.branch, config=config, settings=config.branches[world.branch], world=world, graph=graph,
        router=Router(world, graph.links), actor=SimpleNamespace(version=0), metrics=_Recorder(), ahead=None,
        objectives=objectives_of(config, world.branch, edges), edge_prompts=dict.fromkeys(edges, stream),
        samples=SimpleNamespace(note=lambda *a, **k: None), media=None, trains=True, teacher=None,
        run_dir=Path("."),
    )  # fmt: skip


def _without_models() -> None:
    from copd_megatron.branch import cross, probes

    def sample(me: Any, prompts: Any, count: int, step: Any, *, purpose: str, grade: bool) -> list[Rollout]:
        return [_rollout(f"{purpose}-{step.index}", me.actor.version)]

    replaced: Any = cross
    replaced.sample_and_grade, replaced.score, replaced.teach = sample, _score, _teach
    replaced.reward_metrics = lambda *_: None
    replaced = probes
    replaced.score = _score


def _loop(world: Any, config: Config, *, begin: int = 0, asked: bytes | None = None) -> dict[str, Any]:
    """Steps from ``begin`` on, and what is open when a note says at step ``STOP_AFTER`` that it must stop;
    with ``begin`` to the end."""
    from copd_megatron.branch.checkpoints import Checkpoints
    from copd_megatron.branch.cross import answer, cross
    from copd_megatron.branch.lessons import from_bytes, to_bytes
    from copd_megatron.branch.state import Batch

    me = _branch(world, config)
    me.actor.version = begin
    if asked is not None:
        me.ahead = from_bytes(asked, me.graph.into(me.name))
    observer: Any = SimpleNamespace(writers=[], catch_up=lambda: None)
    checkpoints: Any = Checkpoints(me, observer)
    checkpoints.saver = SimpleNamespace(pending=False, written=True)
    checkpoints.options.save_period = 0
    found: list[dict[str, Any]] = []
    world.barrier("begin")
    for step in steps(config.schedule, begin):
        me.metrics.seen, begun = {}, time.monotonic()
        batch = answer(me, step, Batch(native=[_rollout(f"native-{step.index}", me.actor.version)]))
        if config.opd.max_teacher_lag and HELD.get(step.index) == world.rank:
            world.store.wait([f"ended/{step.index}"], timedelta(seconds=30))
        rows = cross(me, step, batch).rows
        me.actor.version += 1
        learned = time.monotonic()
        checkpoints.after(step, alone=not in_step(config, step))
        if config.opd.max_teacher_lag and HELD.get(step.index) == 1 - world.rank:
            world.store.set(f"ended/{step.index}", "")
        found.append(
            {
                "step": step.index,
                "opd": step.phase.value == "opd",
                "rows": [(r.weight_version, r.old_logprobs.tolist(), r.advantages.tolist()) for r in rows],
                "metrics": me.metrics.seen,
                "begun": begun,
                "learned": learned,
                "ended": time.monotonic(),
            }
        )  # fmt: skip
        if not begin and asked is None and config.run.name == "stopped" and len(found) == STOP_AFTER:
            break
    return {"steps": found, "asked": None if me.ahead is None else to_bytes(me.ahead)}


def _runs(*configs: Config) -> list[dict[str, Any]]:
    from copd_megatron.topology.world import init_world

    _without_models()
    with init_world(RANKS, device="cpu", timeout_seconds=60, run_id="lag") as world:
        return [_loop(world, config) for config in configs]


def _continued(config: Config, asked: list[bytes]) -> dict[str, Any]:
    from copd_megatron.topology.world import init_world

    _without_models()
    with init_world(RANKS, device="cpu", timeout_seconds=60, run_id="lag") as world:
        return _loop(world, config, begin=STOP_AFTER, asked=asked[world.rank])


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """By kind of run and rank."""
    whole = run_distributed(_runs, 2, args=(_config(0), _config(1)), megatron=True)
    stopped = run_distributed(_runs, 2, args=(_config(1, "run.name=stopped"),), megatron=True)
    asked = [rank[0]["asked"] for rank in stopped]
    continued = run_distributed(_continued, 2, args=(_config(1), asked), megatron=True)
    return {
        "lag 0": [rank[0] for rank in whole],
        "lag 1": [rank[1] for rank in whole],
        "stopped": [rank[0] for rank in stopped],
        "continued": continued,
    }


@pytest.mark.parametrize("lag", [0, 1])
def test_samples_are_a_step_old_and_teachers_are_not(runs: dict[str, Any], lag: int) -> None:
    for rank, name in enumerate(RANKS):
        other = next(branch for branch in RANKS if branch != name)
        opd = [step for step in runs[f"lag {lag}"][rank]["steps"] if step["opd"]]
        assert len(opd) == 8
        for place, step in enumerate(opd):
            now, age = step["step"], min(lag, place)
            ((version, old, advantages),) = step["rows"]
            assert version == now - age, "the first step of a phase learns from its own samples"
            assert old == [-1.0 - version] * 3, "the ratio is to the weights that sampled"
            assert advantages == pytest.approx([(-1.0 - now) / 2 + 1.0 + version] * 3)
            if lag:
                assert step["metrics"][f"copd/sample_lag/{name}<-{other}"] == age
                assert step["metrics"][f"copd/teacher_version/{name}<-{other}"] == now
            else:
                assert not any("lag" in metric or "version" in metric for metric in step["metrics"])


def test_probes_are_answered_in_every_step_of_both_phases(runs: dict[str, Any]) -> None:
    for kind in ("lag 0", "lag 1"):
        for step in runs[kind][0]["steps"]:
            assert step["metrics"]["copd/sym_kl/addition-running_sums"] == pytest.approx(0.0)


def test_a_branch_learns_from_a_step_before_the_others_have_sampled_in_it(runs: dict[str, Any]) -> None:
    """In step, the one that is held would wait for ever."""
    for index, held in HELD.items():
        waited, went_on = (runs["lag 1"][rank]["steps"] for rank in (held, 1 - held))
        assert waited[index]["ended"] >= went_on[index]["learned"]
        assert went_on[index]["rows"]
        # it found on the way out that the other one was behind
        assert went_on[index]["metrics"]["perf/steps_ahead"] == 1.0


def test_no_branch_is_more_than_a_step_ahead(runs: dict[str, Any]) -> None:
    for one, other in ((0, 1), (1, 0)):
        mine, theirs = (runs["lag 1"][rank]["steps"] for rank in (one, other))
        for step in range(2, len(mine)):
            assert mine[step]["begun"] >= theirs[step - 2]["learned"], "clocks are of one machine"
        ahead = {step["metrics"]["perf/steps_ahead"] for step in mine}
        assert ahead <= {0.0, 1.0}


def test_a_stopped_run_asks_again_and_goes_on_to_the_same_rows(runs: dict[str, Any]) -> None:
    for rank in range(2):
        whole, before, after = (runs[kind][rank] for kind in ("lag 1", "stopped", "continued"))
        assert whole["asked"] is None, "nothing is open at the end"
        assert before["asked"] is not None
        rows = [step["rows"] for step in before["steps"] + after["steps"]]
        assert rows == [step["rows"] for step in whole["steps"]]


# ---- parts -----------------------------------------------------------------------------------------------


def test_questions_are_asked_ahead_within_a_phase_only() -> None:
    config = _config(1, "schedule.cycles=2", "schedule.rlvr_steps=2", "schedule.opd_steps=3")
    following = [asked_ahead(config, step) for step in steps(config.schedule)]
    assert [step and step.index for step in following] == [1, None, 3, 4, None, 6, None, 8, 9, None]
    assert not any(in_step(config, step) for step in steps(config.schedule))
    config.opd.behaviour.num_states = 0
    following = [asked_ahead(config, step) for step in steps(config.schedule)]
    assert [step and step.index for step in following] == [None, None, 3, 4, None, None, None, 8, 9, None]
    config.opd.max_teacher_lag = 0
    assert not any(asked_ahead(config, step) for step in steps(config.schedule))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["opd.max_teacher_lag=2", "training.max_weight_lag=2"], "2 is more than 1"),
        (["training.max_weight_lag=0"], "set training.max_weight_lag=1"),
        (["schedule.opd_steps=1", "schedule.rlvr_steps=1"], "no effect with schedule.opd_steps=1"),
        (["opd.topology=none", "schedule.opd_steps=0"], "nothing crosses between branches"),
        (["opd.gate.scope=prompt"], "with opd.gate.scope=prompt, which has other branches write"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(_config(1, *overrides), None, {})
    assert part in str(refused.value)


def test_open_questions_come_back_as_they_were() -> None:
    from copd_megatron.branch.lessons import Asked, Lesson, Probe, from_bytes, to_bytes

    edges = build_graph(_config(1)).edges
    rollout = _rollout("a", 3)
    top = TopK(ids=np.arange(6, dtype=np.int32).reshape(3, 2), logprobs=-np.ones((3, 2), np.float32))
    own = SequenceScore(
        logprobs=np.array([-1.5, -0.1, -3.3], np.float32), entropy=np.ones(3, np.float32),
        state_logprobs=np.ones((1, VOCAB), np.float32), top=top,
    )  # fmt: skip
    lesson = Lesson(
        rollouts=[rollout, rollout], own=[own, own], prompts=[rollout.prompt.token_ids, None],
        is_open=[True, False],
    )  # fmt: skip
    probe = Probe(rollout=rollout, ask=Ask(positions=(0, 2)))
    data = to_bytes(Asked(lessons={edges[0]: lesson, edges[1]: lesson}, probes=[probe]))
    back = from_bytes(data, edges[:1])
    assert list(back.lessons) == [edges[0]], "an edge that is gone asks nothing"
    found = back.lessons[edges[0]]
    assert found.taught == [0] and list(found.is_open) == [True, False]
    assert found.own is not None and found.own[0].top is not None
    assert np.array_equal(found.own[0].logprobs, own.logprobs)
    assert np.array_equal(found.own[0].top.ids, top.ids)
    assert found.rollouts[0].text == rollout.text and found.rollouts[0].weight_version == 3
    assert np.array_equal(found.rollouts[0].token_ids, rollout.token_ids)
    assert back.probes[0].ask == probe.ask
    for damaged in (data[:-3], b"", to_bytes(Asked(lessons={}, probes=[rollout]))):  # type: ignore[list-item]
        with pytest.raises(ValueError):
            from_bytes(damaged, edges)


def test_the_error_of_sampling_is_measured_on_samples_of_the_same_weights_only() -> None:
    from copd_megatron.policy.batch.statistics import BatchStatistics, Tally, tally_mismatch

    rows = [
        TrainRow(
            token_ids=np.arange(4, dtype=np.int32), prompt_length=2, advantages=np.zeros(2, np.float32),
            loss_mask=np.ones(2, np.float32), component="cross:b", rollout_logprobs=np.zeros(2, np.float32),
            weight_version=version,
        )
        for version in (6, 7)
    ]  # fmt: skip
    tally, batch = Tally(), SimpleNamespace(rows=[0, 1], row_index_n=torch.tensor([0, 0, 1, 1]))
    tally_mismatch(tally, batch, rows, torch.tensor([1.0, 1.0, 0.1, 0.3]), 7)  # type: ignore[arg-type]
    sums, maxima = ({name: float(v) for name, v in part.items()} for part in (tally._sums, tally._maxima))
    assert sums["sum/gen_tokens"] == 2 and maxima["gen_logprob_error"] == pytest.approx(0.3)
    named = {name.removeprefix("sum/"): value for name, value in sums.items()}
    statistics = BatchStatistics(loss=0.0, terms={}, sums=named, max_gen_logprob_error=0.3)
    expected = sum(np.expm1(x) - x for x in (0.1, 0.3)) / 2
    assert statistics.gen_kl_error == pytest.approx(expected, rel=1e-5)
