"""vLLM's parameters after a sync that repeats what its loaders did, against what its loaders do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from copd_megatron.config.schema import ParallelConfig, RolloutConfig, WeightSyncConfig
from copd_megatron.rollout import in_place
from tests.support.actors import make_actor, make_engine, random_prompts
from tests.support.distributed import run_distributed
from tests.support.models import make_model


def _parameters(worker: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in worker.get_model().named_parameters()}


def _is_recorded(worker: Any) -> bool:
    return worker.get_model() in in_place._PLACES


def _spoil(worker: Any) -> None:
    """As a sleep does: nothing that the parameters held is left."""
    for parameter in worker.get_model().parameters():
        parameter.data.fill_(7.0)


def _sync_thrice(folder: Path) -> dict[str, Any]:
    from copd_megatron.rollout.engine import SamplingSettings
    from copd_megatron.weight_sync.sync import WeightSync

    torch.distributed.init_process_group("gloo")
    actor = make_actor(ParallelConfig(tensor_model_parallel_size=2), folder)
    engine = make_engine(folder, RolloutConfig(max_new_tokens=12, max_num_seqs=8, tensor_parallel_size=2))
    sync = WeightSync(actor, engine, WeightSyncConfig(bucket_bytes=1 << 16))

    def ask(question: Any) -> Any:
        return engine.llm.collective_rpc(question)[0]

    sync()
    recorded = ask(_is_recorded)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.mul_(1.1)
    ask(_spoil)
    sync()
    repeated = ask(_parameters)
    rollouts = engine.sample(
        random_prompts(4, length=9), SamplingSettings(num_generations=2, temperature=1.0), step=0
    )
    scores = actor.log_probs(rollouts)
    in_place._PLACES.clear()
    ask(_spoil)
    sync()
    by_loaders = ask(_parameters)
    return {
        "recorded": recorded,
        "differ": [name for name, value in by_loaders.items() if not torch.equal(value, repeated[name])],
        "count": len(by_loaders),
        "error": max(
            float(np.abs(score.logprobs - rollout.rollout_logprobs).max())
            for score, rollout in zip(scores, rollouts, strict=True)
        ),
    }


def test_repeated_copies_are_what_the_loaders_do(tmp_path: Path) -> None:
    """Tensor parallelism, a padded vocabulary, buckets that share memory; nothing left of before."""
    folder = make_model(tmp_path / "model", seed=3)
    for rank in run_distributed(_sync_thrice, 2, args=(folder,), timeout=400, megatron=True):
        assert rank["recorded"] and rank["differ"] == [] and rank["count"] > 20
        assert rank["error"] < 1e-4


# ---- the recorder, on small models -----------------------------------------------------------------------


class _Padded(nn.Module):
    """Keeps the second half of the columns of ``whole``, on top of a row of padding."""

    def __init__(self, *, scale: float = 1.0, leave: int = 0) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.full((4, 2), 9.0))
        self.scale, self.leave = scale, leave

    def load_weights(self, weights: Any) -> set[str]:
        for name, value in weights:
            if name == "whole":
                part = value.narrow(1, 2, 2)
                self.kept.data[: 3 - self.leave].copy_(
                    part[: 3 - self.leave] if self.scale == 1 else part * 2
                )
                self.kept.data[3:].zero_()
        return {"kept"}


def _stream(start: int) -> list[tuple[str, Tensor]]:
    """Two tensors in one piece of memory, as a bucket's are."""
    memory = torch.arange(start, start + 24, dtype=torch.float32)
    return [("other", memory[:12].view(3, 4)), ("whole", memory[12:].view(3, 4))]


def test_a_record_repeats_slices_and_padding() -> None:
    model = _Padded()
    with torch.no_grad():
        assert in_place._load_and_record(model, _stream(0)) == []
        places = in_place._PLACES[model]
        assert places.copies["other"] == [] and len(places.copies["whole"]) == 1
        model.kept.fill_(9.0)
        assert in_place._repeat(places, _stream(100)) == []
        assert in_place._repeat(places, _stream(100)[1:]) == ["other"]
        with pytest.raises(RuntimeError, match=r"whole \(2, 4\), the first stream had \(3, 4\)"):
            in_place._repeat(places, [("whole", torch.zeros(2, 4))])
        with pytest.raises(RuntimeError, match=r"new .* no such tensor"):
            in_place._repeat(places, [("new", torch.zeros(2, 4))])
    assert model.kept.tolist() == [[114.0, 115.0], [118.0, 119.0], [122.0, 123.0], [0.0, 0.0]]


def test_what_is_more_than_copies_is_not_recorded() -> None:
    """Loaders that compute, or that leave something out, are run each time."""
    for model in (_Padded(scale=2.0), _Padded(leave=1)):
        with torch.no_grad():
            in_place._load_and_record(model, _stream(0))
        assert model not in in_place._PLACES
