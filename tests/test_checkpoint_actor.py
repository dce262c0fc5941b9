"""An actor's state on disk and back, on real Gloo ranks with real Megatron-Core: exact, at any layout."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from copd_megatron.records import TrainRow
from tests.support.actors import make_actor, train
from tests.support.layouts import EXPERTS, VIRTUAL, Job, run_layouts
from tests.support.models import make_model
from tests.support.texts import random_texts

VOCAB = 321
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, lr_warmup_steps=3, clip_grad=0.5, adam_eps=1e-3)
CHANGED = replace(OPTIMIZER, lr=4e-3, min_lr=1e-3, weight_decay=0.05, clip_grad=0.25, adam_eps=1e-4)
"""What people change when they go on with a run."""
BEFORE, AFTER = 2, 2


def _rows() -> list[TrainRow]:
    rng = np.random.default_rng(5)
    return [
        TrainRow(
            token_ids=text.token_ids,
            prompt_length=text.prompt_length,
            advantages=rng.normal(size=text.response_length).astype(np.float32),
            loss_mask=np.ones(text.response_length, np.float32),
            component="native",
            old_logprobs=np.full(text.response_length, -6.0, np.float32),
        )
        for text in random_texts(8, VOCAB)
    ]


def _actor(parallel: ParallelConfig, folder: Path, optimizer: OptimizerConfig = OPTIMIZER) -> Any:
    return make_actor(
        parallel, folder, training=TrainingConfig(micro_batch_tokens=128), optimizer=optimizer, max_tokens=64
    )


def _weights(actor: Any) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in actor.model.parameters()]


def _save(actor: Any, folder: Path, teacher: Any) -> None:
    """What ``JointSaver`` does for one branch."""
    import torch.distributed as dist

    from copd_megatron.checkpoint.distcp import write_metadata
    from copd_megatron.checkpoint.joint import plan_save

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    writer = plan_save(actor, folder, teacher=teacher, copy=False)
    writer.write()
    written = writer.result()
    assert written.error is None
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(written, parts, dst=0)
    if parts is not None:
        assert writer.metadata is not None
        write_metadata(folder, writer.metadata, [place for part in parts for place in part.places])
        (folder / "complete").touch()
    dist.barrier()


def _first_run(parallel: ParallelConfig, model: Path, out: Path) -> dict[str, Any]:
    """Trains, saves, and trains on."""
    from copd_megatron.checkpoint.actor_state import random_states

    actor = _actor(parallel, model)
    teacher = actor.snapshot()
    train(actor, _rows(), BEFORE)
    begin = time.perf_counter()
    _save(actor, out / "branch", teacher)
    seconds = time.perf_counter() - begin
    states = random_states()
    return {
        "then": train(actor, _rows(), AFTER),
        "weights": _weights(actor),
        "seconds": seconds,
        "torch_rng": states["torch"].numpy(),
        "teacher": [t.numpy() for t in teacher.tensors],
    }


def _second_run(
    parallel: ParallelConfig,
    model: Path,
    out: Path,
    same_layout: bool,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> dict[str, Any]:
    """Loads what ``_first_run`` saved, and trains on."""
    from copd_megatron.checkpoint.actor_state import load_state, random_states

    deadline = time.monotonic() + 200
    while not (out / "branch" / "complete").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    actor = _actor(parallel, model, optimizer)
    torch.manual_seed(99)
    teacher = load_state(actor, str(out / "branch"), with_teacher=True, same_layout=same_layout)
    assert teacher is not None
    states = random_states()
    return {
        "then": train(actor, _rows(), AFTER),
        "weights": _weights(actor),
        "torch_rng": states["torch"].numpy(),
        "teacher": [t.numpy() for t in teacher.tensors],
    }


def _either(parallel: ParallelConfig, first: bool, *args: Any) -> dict[str, Any]:
    return _first_run(parallel, *args) if first else _second_run(parallel, *args)


SAVED_AT = [("untied", (2, 1, 1)), ("tied", (2, 2, 1)), ("tied", (1, 1, 2))]
LOADED_AT = {
    ("untied", (2, 1, 1)): [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)],
    ("tied", (2, 2, 1)): [(2, 2, 1), (1, 2, 1), (2, 1, 2)],
    ("tied", (1, 1, 2)): [(1, 1, 2), (2, 1, 1)],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """All saves and loads, in one launch."""
    base = tmp_path_factory.mktemp("actor_checkpoints")
    models = {
        kind: make_model(base / kind, tie_word_embeddings=kind == "tied") for kind in ("tied", "untied")
    }
    jobs, keys = [], []
    for kind, (tp, pp, dp) in SAVED_AT:
        out = base / f"{kind}_{tp}_{pp}_{dp}"
        jobs.append(Job(tp=tp, pp=pp, dp=dp, args=(True, models[kind], out)))
        keys.append((kind, (tp, pp, dp), None))
        for to in LOADED_AT[kind, (tp, pp, dp)]:
            jobs.append(
                Job(tp=to[0], pp=to[1], dp=to[2], args=(False, models[kind], out, to == (tp, pp, dp)))
            )
            keys.append((kind, (tp, pp, dp), to))
    for kind, (tp, pp, dp) in SAVED_AT[1:]:
        out = base / f"{kind}_{tp}_{pp}_{dp}"
        jobs.append(Job(tp=tp, pp=pp, dp=dp, args=(False, models[kind], out, True, CHANGED)))
        keys.append((kind, (tp, pp, dp), "changed"))
    return dict(zip(keys, run_layouts(_either, jobs), strict=True))


@pytest.mark.parametrize(("kind", "saved"), SAVED_AT[1:])
def test_a_run_goes_on_with_other_settings_of_the_optimizer(
    runs: dict[Any, list[Any]], kind: str, saved: Any
) -> None:
    """The same weights and moments, the new learning rate."""
    for before, after in zip(runs[kind, saved, None], runs[kind, saved, "changed"], strict=True):
        (loss, norm, lr), (other_loss, other_norm, other_lr) = before["then"][0], after["then"][0]
        assert (loss, norm) == (other_loss, other_norm)
        assert other_lr == pytest.approx(lr * CHANGED.lr / OPTIMIZER.lr)
        moved = sum(float(np.abs(w).sum()) for w in after["weights"])
        assert moved != sum(float(np.abs(w).sum()) for w in before["weights"])


CASES = [(kind, saved, loaded) for kind, saved in SAVED_AT for loaded in LOADED_AT[kind, saved]]


@pytest.mark.parametrize(("kind", "saved", "loaded"), CASES)
def test_training_goes_on_as_if_it_had_not_stopped(
    runs: dict[Any, list[Any]], kind: str, saved: Any, loaded: Any
) -> None:
    expected, found = runs[kind, saved, None], runs[kind, saved, loaded]
    if saved != loaded:
        for rank in found:
            np.testing.assert_allclose(rank["then"], expected[0]["then"], rtol=1e-5)
        return
    for before, after in zip(expected, found, strict=True):
        assert after["then"] == before["then"], "bit for bit"
        for one, other in zip(before["weights"], after["weights"], strict=True):
            assert np.array_equal(one, other)
        assert np.array_equal(before["torch_rng"], after["torch_rng"])
        for one, other in zip(before["teacher"], after["teacher"], strict=True):
            assert np.array_equal(one, other)


@pytest.mark.slow
def test_checkpoints_of_chunks_and_experts(tmp_path: Path, layout_models: dict[str, Path]) -> None:
    """Chunks and experts load at the layout they were saved at, chunks also without a virtual pipeline."""
    jobs = []
    for kind, sizes in (("dense", {"pp": 2, "also": VIRTUAL}), ("mixture", {"dp": 2, "also": EXPERTS})):
        model, out = layout_models[kind], tmp_path / kind
        jobs.append(Job(**sizes, args=(True, model, out)))
        jobs.append(Job(**sizes, args=(False, model, out, True)))
    jobs.append(Job(pp=2, args=(False, layout_models["dense"], tmp_path / "dense", False)))
    saved_chunks, chunks, saved_experts, experts, plain = run_layouts(_either, jobs)
    for before, after in ((saved_chunks, chunks), (saved_experts, experts)):
        for mine, other in zip(after, before, strict=True):
            assert mine["then"] == other["then"]
    assert plain[0]["then"] == [pytest.approx(step, rel=1e-5) for step in saved_chunks[0]["then"]]
