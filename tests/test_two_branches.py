"""Two real branches (Megatron, vLLM, router) driven stage by stage, against transformers.

One launch of four ranks: ``alpha``, tied embeddings, tensor parallel in Megatron and in vLLM; ``beta``,
untied, pipeline parallel with two vLLM replicas. They start from different weights, so that student and
teacher cannot be confused unnoticed. The ranks export what they hold after each update; the tests compare
with transformers' log-probabilities of those folders.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from copd_megatron.records import Rollout, TrainRow
from tests.support.distributed import run_distributed
from tests.support.domains import make_domains
from tests.support.models import make_model, reference_distributions, reference_logprobs

BRANCHES = ("alpha", "beta")
BETA = 0.7
OTHER = {"alpha": "beta", "beta": "alpha"}


def _config(root: Path, folders: dict[str, Path]) -> Path:
    parallel = {"alpha": {"tensor_model_parallel_size": 2}, "beta": {"pipeline_model_parallel_size": 2}}
    config = {
        "run": {"dir": str(root / "run"), "seed": 7, "device": "cpu", "collective_timeout_seconds": 300},
        "model": {"path": str(folders["alpha"]), "max_sequence_tokens": 192},
        "branches": {
            name: {
                "model_path": str(folders[name]),
                "num_prompts_per_step": 3,
                "num_generations_per_prompt": 2,
                "data": {
                    "train": [str(root / "data" / f"{name}-train-*.tar")],
                    "max_prompt_tokens": 150,
                },
                "parallel": parallel[name],
                "rollout": {"max_new_tokens": 12, "tensor_parallel_size": 2 if name == "alpha" else 1},
            }
            for name in BRANCHES
        },
        "schedule": {"cycles": 1, "rlvr_steps": 1, "opd_steps": 3},
        "opd": {"beta": BETA, "num_prompts_per_step": 2, "behaviour": {"num_states": 12, "top_k": 5}},
        "optimizer": {"lr": 1e-3},
        "training": {"micro_batch_tokens": 400},
        "weight_sync": {"bucket_bytes": 60_000},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _drive(config_path: Path, exports: Path) -> dict[str, Any]:
    """Three OPD steps of this rank's branch; teachers live in the first, snapshots after that."""
    import torch.distributed as dist

    from copd_megatron.branch.cross import cross
    from copd_megatron.branch.native import native
    from copd_megatron.branch.probes import choose_probes
    from copd_megatron.branch.sampling import sample_and_grade
    from copd_megatron.branch.schedule import Phase, Step
    from copd_megatron.branch.scoring import logprobs_of
    from copd_megatron.branch.start import start
    from copd_megatron.branch.state import Batch
    from copd_megatron.branch.update import sync_weights, update
    from copd_megatron.config import load_config
    from copd_megatron.config.schema import TeacherMode
    from copd_megatron.errors import DivergedError
    from copd_megatron.rollout.engine import RolloutError, SamplingSettings
    from copd_megatron.topology.layout import Layout
    from copd_megatron.weight_sync.export import export_hf

    config = load_config(config_path, [])
    with start(config, Layout.from_config(config)) as me:
        refused = ""
        try:
            sample_and_grade(
                me, me.prompts.next(1), 1, Step(index=9, cycle=0, phase=Phase.rlvr, index_in_phase=9)
            )
        except RuntimeError as error:
            refused = str(error)
        sync_weights(me)
        steps, agreement = [], []
        for index in range(3):
            if index == 1:
                config.opd.teacher_mode = TeacherMode.phase_snapshot
            in_phase = max(index - 1, 0)  # a phase begins anew with the second step
            step = Step(index=index, cycle=0, phase=Phase.opd, index_in_phase=in_phase)
            own = native(me, step, Batch())
            batch = cross(me, step, own)
            steps.append(
                SimpleNamespace(
                    native=batch.native,
                    cross=batch.rows[len(own.rows) :],
                    probes=choose_probes(me, step, batch.native),
                    metrics=me.metrics.reduce(dist.group.WORLD),
                )
            )
            update(me, step, batch)
            me.metrics.reduce(dist.group.WORLD)
            sync_weights(me)
            export_hf(me.actor, exports / f"{me.name}-{index + 1}", source=me.settings.model_path)
            prompts = me.prompts.next(4)
            rollouts = sample_and_grade(me, prompts, 2, step, purpose="agreement")
            agreement.append(
                SimpleNamespace(
                    rollouts=rollouts,
                    actor=logprobs_of(me, rollouts),
                    version=(me.actor.version, me.engine.version),
                    bytes=(me.sync.stream.filled_bytes, me.sync.stream.received_bytes),
                )
            )
        skipped: list[Any] = []
        config.training.max_grad_norm, config.training.max_skipped_updates = 1e-9, 1
        for _ in range(2):
            # cross rows, since models that are never right have no gradient of their own
            own = native(me, step, Batch())
            batch = cross(me, step, Batch(native=own.native))
            try:
                update(me, step, batch)
                skipped.append(me.metrics.reduce(dist.group.WORLD)["train/skipped_updates"])
                sync_weights(me)
            except DivergedError as error:
                skipped.append(str(error))
        me.engine.llm.collective_rpc(_stop_worker)
        stopped = ""
        try:
            me.engine.sample_share(prompts, SamplingSettings(num_generations=1, temperature=1.0), step=3)
        except RolloutError as error:
            stopped = str(error)
    return {
        "name": me.name,
        "steps": steps,
        "agreement": agreement,
        "refused": refused,
        "skipped": skipped,
        "stopped": (me.world.branch_rank, stopped),
    }


def _stop_worker(worker: Any) -> None:
    """vLLM's worker loses its model, as after a failed sleep or a crash of the runner."""
    worker.worker.model_runner = None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``folders[branch][version]``: weights; ``ranks[branch]``: what its ranks say."""
    root = tmp_path_factory.mktemp("branches")
    folders = {
        name: make_model(root / name, seed=10 + i, tie_word_embeddings=name == "alpha")
        for i, name in enumerate(BRANCHES)
    }
    make_domains(root / "data", num_train=24, num_validation=0)
    exports = root / "exports"
    results = run_distributed(_drive, 4, args=(_config(root, folders), exports), timeout=500, megatron=True)
    versions = {
        name: [folders[name], *(exports / f"{name}-{version}" for version in (1, 2, 3))] for name in BRANCHES
    }
    return {
        "folders": versions,
        "ranks": {name: [r for r in results if r["name"] == name] for name in BRANCHES},
    }


each_branch = pytest.mark.parametrize("name", BRANCHES)
each_step = pytest.mark.parametrize("index", range(3))


def _exact(folder: Path, row: Rollout | TrainRow) -> np.ndarray:
    return reference_logprobs(folder, row.token_ids, row.prompt_length)


@each_branch
def test_engine_refuses_to_sample_before_the_first_sync(run: dict[str, Any], name: str) -> None:
    for rank in run["ranks"][name]:
        assert f"branch {name}" in rank["refused"]
        assert "sync" in rank["refused"]


@each_branch
@each_step
def test_vllm_equals_the_actor_and_transformers_after_every_sync(
    run: dict[str, Any], name: str, index: int
) -> None:
    """alpha: the tied output head has to be refreshed too, at every sync."""
    folder = run["folders"][name][index + 1]
    for rank in run["ranks"][name]:
        seen = rank["agreement"][index]
        assert seen.version == (index + 1, index + 1)
        assert len(seen.rollouts) == 8
        for rollout, actor in zip(seen.rollouts, seen.actor, strict=True):
            assert rollout.weight_version == index + 1
            np.testing.assert_allclose(rollout.rollout_logprobs, actor, atol=1e-4)
            np.testing.assert_allclose(rollout.rollout_logprobs, _exact(folder, rollout), atol=1e-4)


@each_branch
def test_updates_move_the_log_probabilities(run: dict[str, Any], name: str) -> None:
    """Otherwise a sync that does nothing would pass."""
    rollout = run["ranks"][name][0]["agreement"][0].rollouts[0]
    values = [_exact(folder, rollout) for folder in run["folders"][name]]
    for before, after in itertools.pairwise(values):
        assert np.abs(before - after).max() > 5e-3


@each_branch
def test_all_ranks_of_a_branch_hold_the_same(run: dict[str, Any], name: str) -> None:
    first, second = run["ranks"][name]
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert [r.seed for r in one.native] == [r.seed for r in other.native]
        assert [r.reward for r in one.native] == [r.reward for r in other.native]
        for mine, theirs in zip(one.cross, other.cross, strict=True):
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(mine.advantages, theirs.advantages)
        assert one.metrics == other.metrics


# Student's and teacher's weight versions in each step: live; then a phase that starts at version 1.
VERSIONS = [(0, 0), (1, 1), (2, 1)]


@each_branch
@each_step
def test_cross_advantages_are_teacher_minus_student(run: dict[str, Any], name: str, index: int) -> None:
    """Eq. 8 on the rows as they go into the update; with the roles swapped every sign would be wrong."""
    student_version, teacher_version = VERSIONS[index]
    student = run["folders"][name][student_version]
    teacher = run["folders"][OTHER[name]][teacher_version]
    rows = run["ranks"][name][0]["steps"][index].cross
    assert len(rows) == 4
    for row in rows:
        mine, theirs = _exact(student, row), _exact(teacher, row)
        assert row.component == f"cross:{OTHER[name]}"
        assert row.weight_version == student_version, "the student samples"
        np.testing.assert_allclose(row.old_logprobs, mine, atol=1e-4)
        np.testing.assert_allclose(row.rollout_logprobs, mine, atol=1e-4)
        np.testing.assert_allclose(row.advantages, BETA * (theirs - mine), atol=2e-4)
        assert np.abs(theirs - mine).max() > 0.1, "branches that differ too little would hide a swap"
        assert np.abs(row.advantages - BETA * (mine - theirs)).max() > 0.1


@each_branch
def test_a_snapshot_teacher_is_not_the_live_one(run: dict[str, Any], name: str) -> None:
    """In the third step the teacher's live weights are already at version 2."""
    live = run["folders"][OTHER[name]][2]
    student = run["folders"][name][2]
    rows = run["ranks"][name][0]["steps"][2].cross
    gaps = [np.abs(row.advantages - BETA * (_exact(live, row) - _exact(student, row))).max() for row in rows]
    assert max(gaps) > 2e-3


@each_branch
@each_step
def test_cross_prompts_are_the_teachers(run: dict[str, Any], name: str, index: int) -> None:
    own = {tuple(r.prompt.token_ids[:12]) for r in run["ranks"][name][0]["steps"][index].native}
    rows = run["ranks"][name][0]["steps"][index].cross
    others = {
        tuple(r.prompt.token_ids[:12]) for step in run["ranks"][OTHER[name]][0]["steps"] for r in step.native
    }
    openings = {tuple(row.token_ids[:12]) for row in rows}
    assert openings <= others
    assert not openings & own, "the two domains' prompts begin differently"


@each_branch
@each_step
def test_teacher_gap_is_the_mean_difference(run: dict[str, Any], name: str, index: int) -> None:
    step = run["ranks"][name][0]["steps"][index]
    expected = np.concatenate([row.advantages for row in step.cross]).mean() / BETA
    assert step.metrics[f"copd/teacher_gap/{name}<-{OTHER[name]}"] == pytest.approx(expected, abs=1e-4)


@each_branch
@each_step
def test_overlap_and_symmetric_kl_equal_transformers(run: dict[str, Any], name: str, index: int) -> None:
    """On the probes' states: |top-5 of both| / 5 (Eq. 6) and KL in both directions."""
    student_version, teacher_version = VERSIONS[index]
    step = run["ranks"][name][0]["steps"][index]
    overlaps, divergences = [], []
    for probe in step.probes:
        rollout, states = probe.rollout, list(probe.ask.positions)
        arguments = (rollout.token_ids, rollout.prompt_length)
        p = reference_distributions(run["folders"][name][student_version], *arguments)[states]
        q = reference_distributions(run["folders"][OTHER[name]][teacher_version], *arguments)[states]
        divergences += ((np.exp(p) - np.exp(q)) * (p - q)).sum(-1).tolist()
        for mine, theirs in zip(p, q, strict=True):
            overlaps.append(len(set(np.argsort(mine)[-5:]) & set(np.argsort(theirs)[-5:])) / 5)
    assert len(overlaps) == 12
    pair = f"{name}-{OTHER[name]}"
    assert step.metrics[f"copd/overlap@5/{pair}"] == pytest.approx(np.mean(overlaps), abs=1e-6)
    assert step.metrics[f"copd/sym_kl/{pair}"] == pytest.approx(np.mean(divergences), rel=1e-3)


@each_branch
def test_skipped_updates_are_counted_and_too_many_end_the_run(run: dict[str, Any], name: str) -> None:
    for rank in run["ranks"][name]:
        count, error = rank["skipped"]
        assert count == 1
        assert f"branch {name}, step 3: update skipped, gradient norm" in error
        assert "2 in a row, more than training.max_skipped_updates=1: the run has diverged" in error


@each_branch
def test_a_vllm_that_fails_is_named(run: dict[str, Any], name: str) -> None:
    for rank in run["ranks"][name]:
        branch_rank, error = rank["stopped"]
        replica = 0 if name == "alpha" else branch_rank
        assert f"branch {name}, rollout replica {replica} (branch rank {branch_rank}): vLLM failed" in error
        assert "in sampling" in error and "of step 4: AttributeError" in error
