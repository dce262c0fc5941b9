"""``evaluation.merged``: the mean of the branches, measured as they are, changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from copd_megatron.checkpoint.compare import NOT_COMPARED
from tests.support.commands import copd
from tests.support.domains import make_domains
from tests.support.models import make_model

UNEVEN = ("branches.alpha.parallel.tensor_model_parallel_size=2",)
MERGED = "copd/merged_accuracy/"


def run(root: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    config = {
        "run": {"dir": str(root / name), "device": "cpu", "collective_timeout_seconds": 300},
        "model": {"path": str(root / "base"), "max_sequence_tokens": 160},
        "branches": {
            branch: {
                "num_prompts_per_step": 4,
                "num_generations_per_prompt": 2,
                "data": {
                    "train": [str(root / "data" / f"{branch}-train-*.tar")],
                    "validation": [str(root / "data" / f"{branch}-validation-*.tar")],
                    "max_prompt_tokens": 150,
                },
                "rollout": {"max_new_tokens": 6},
            }
            for branch in ("alpha", "beta")
        },
        "schedule": {"cycles": 1, "rlvr_steps": 1, "opd_steps": 1},
        "opd": {"num_prompts_per_step": 2},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every_steps": 1, "num_generations_per_prompt": 4, "temperature": 1.0},
        "logging": {"console": False},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    done = copd("train", path, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def compared(step: dict[str, Any]) -> dict[str, Any]:
    left_out = (*NOT_COMPARED, MERGED)
    return {name: value for name, value in step.items() if not any(part in f"/{name}" for part in left_out)}


@pytest.mark.slow
def test_the_mean_is_measured_and_nothing_else_changes(tmp_path: Path) -> None:
    make_domains(tmp_path / "data")
    make_model(tmp_path / "base", num_hidden_layers=2)
    plain, measured = run(tmp_path, "plain"), run(tmp_path, "measured", "evaluation.merged=true")
    assert list(map(compared, plain)) == list(map(compared, measured))
    assert not any(name.startswith(MERGED) for step in plain for name in step)
    table = json.loads((tmp_path / "measured/evaluation.json").read_text())["accuracy"]["merged"]
    assert all({MERGED + "alpha", MERGED + "beta"} <= step.keys() for step in measured)
    for domain in ("alpha", "beta"):
        assert measured[-1][MERGED + domain] == table[domain], "the last step's mean is the merged model"
    assert not (tmp_path / "measured/mean_as_it_is").exists()
    uneven = run(tmp_path, "uneven", "evaluation.merged=true", *UNEVEN)
    assert all({MERGED + "alpha", MERGED + "beta"} <= step.keys() for step in uneven)
    assert not (tmp_path / "uneven/mean_as_it_is").exists()
    samples = tmp_path / "measured/samples/alpha"
    assert (samples / "merged-000001.jsonl.gz").is_file() and (samples / "merged-000002.jsonl.gz").is_file()
