"""Giving device memory back between phases: the bookkeeping, on Megatron's own buffers and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from copd_megatron.policy.offload import ParkedTensors
from tests.support.actors import make_actor, train
from tests.support.layouts import Job, run_layouts
from tests.support.models import make_model
from tests.support.policy_runs import mixed_rows
from tests.support.texts import random_texts


def test_parked_tensors_come_back_with_their_views() -> None:
    whole = torch.arange(12, dtype=torch.float32)
    view, other = whole[3:7], torch.ones(5, dtype=torch.bfloat16)
    parked = ParkedTensors()
    assert parked.park([whole, view, other]) == parked.num_bytes == 12 * 4 + 5 * 2
    assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    with pytest.raises(RuntimeError, match="parked already"):
        parked.park([whole])
    assert parked.restore() == 58
    assert parked.num_bytes == parked.restore() == 0
    assert whole.tolist() == list(range(12)) and other.tolist() == [1] * 5
    whole[4] = 40
    assert view.tolist() == [3, 40, 5, 6], "still a view"


def _train(parallel: ParallelConfig, folder: Path, rows: Any, dtype: torch.dtype, offload: bool) -> Any:
    """Three steps; with ``offload``, everything leaves between them. Losses, weights and bookkeeping."""
    from copd_megatron.policy.offload import Offloader

    actor = make_actor(
        parallel,
        folder,
        training=TrainingConfig(micro_batch_tokens=128),
        optimizer=OptimizerConfig(lr=1e-2, adam_eps=1e-3),
        dtype=dtype,
    )
    offloader = Offloader(actor.modules, actor.optimizer, actor.device, weights=True)
    steps, reports = [], []
    for _ in range(3):
        if offload:
            scores = actor.log_probs(rows[:2])
            released, weights = offloader.release(), offloader.release_weights()
            assert offloader.released and offloader.weights_released
            assert offloader.release().total_bytes == offloader.release_weights().total_bytes == 0
            left = sum(_bytes(buffer.grad_data) for m in actor.modules for buffer in m.buffers)
            left += sum(_bytes(p.data) for p in actor.model.parameters())
            offloader.restore_weights()
            again = actor.log_probs(rows[:2])
            for score, other in zip(scores, again, strict=True):
                np.testing.assert_array_equal(score.logprobs, other.logprobs)
            restored = offloader.restore()
            assert not offloader.released and offloader.restore().total_bytes == 0
            reports.append((released, weights, restored, left))
        steps += train(actor, rows, steps=1)
    numbers = [p.detach().float().numpy().copy() for p in actor.model.parameters()]
    return steps, numbers, [[vars(r) if hasattr(r, "__dict__") else r for r in entry] for entry in reports]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_training_goes_on_as_if_nothing_had_left(tmp_path: Path) -> None:
    """float32 (the model's weights are the masters) and bfloat16 (float32 masters of their own)."""
    folder = make_model(tmp_path / "model", seed=1)
    rows = mixed_rows(folder, random_texts(6, 321, seed=1))
    cases = [(dtype, offload) for dtype in (torch.float32, torch.bfloat16) for offload in (False, True)]
    results = run_layouts(_train, [Job(args=(folder, rows, dtype, offload)) for dtype, offload in cases])
    for (dtype, _), plain, moved in zip(cases[::2], results[::2], results[1::2], strict=True):
        (steps, weights, _), (other_steps, other_weights, reports) = plain[0], moved[0]
        assert steps == other_steps
        for mine, other in zip(weights, other_weights, strict=True):
            np.testing.assert_array_equal(mine, other)
        count = sum(w.size for w in weights)
        for number, (released, parked, restored, left) in enumerate(reports):
            assert left == 0, "not a byte of gradients and weights stays"
            assert released["gradient_bytes"] == restored["gradient_bytes"] >= 4 * count
            # moments appear with the first step; bfloat16 has masters from the start
            copies = (2 if number else 0) + (1 if dtype is torch.bfloat16 else 0)
            assert released["optimizer_bytes"] == restored["optimizer_bytes"]
            assert 4 * count * copies <= released["optimizer_bytes"] <= 4.2 * count * copies
            assert parked["weight_bytes"] >= dtype.itemsize * count
