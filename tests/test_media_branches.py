"""Runs with text, image and video branches of a Qwen3-VL: K = 3 and 4, unequal layouts, both ways of routing
media, and bad media that must not disturb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from copd_megatron.data.convert.write import NewSample, write_shards
from copd_megatron.tiny.tasks.encode import mp4, png
from tests.support.commands import copd
from tests.support.models_vl import make_vl_model
from tests.support.warm_runs import train_warm

TRUNCATED, CORRUPT = "truncated", "corrupt"


def _square(rng: np.random.Generator) -> np.ndarray:
    frame = np.zeros((32, 32, 3), np.uint8)
    x, y = rng.integers(0, 20, size=2)
    frame[y : y + 10, x : x + 10] = (255, 40, 40)
    return frame


def _write_domain(folder: Path, name: str, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for part, count in (("train", 24), ("validation", 6)):
        samples = []
        for i in range(count):
            media = {}
            if kind == "image":
                media = {"0.png": png(_square(rng))}
            elif kind == "video":
                media = {"mp4": mp4([_square(rng) for _ in range(6)], 4.0)}
            marker = "" if kind == "text" else f"<{kind}>"
            answer = str(int(rng.integers(10)))
            samples.append(
                NewSample(
                    prompt=f"{marker}Say {answer}.",
                    answer=answer,
                    verifier="exact",
                    key=f"{i:06d}",
                    media=media,
                )
            )
        if part == "train" and kind == "image":
            bad = {"0.png": samples[0].media["0.png"][:40]}
            samples.append(NewSample(prompt="<image>?", answer="1", verifier="exact", key=CORRUPT, media=bad))
        if part == "train" and kind == "video":
            bad = {"mp4": samples[0].media["mp4"][:-200]}
            samples.append(
                NewSample(prompt="<video>?", answer="1", verifier="exact", key=TRUNCATED, media=bad)
            )
        write_shards(samples, folder, f"{name}-{part}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    make_vl_model(root / "base", tied=True)
    make_vl_model(root / "mixture", mixture=True)
    for seed, (name, kind) in enumerate(
        (("text", "text"), ("image", "image"), ("video", "video"), ("more", "text"))
    ):
        _write_domain(root / "data", name, kind, seed)
    return root


def _run(
    root: Path, name: str, branches: dict[str, dict[str, int]], opd: dict[str, Any], base: str = "base"
) -> dict[str, Any]:
    config = {
        "run": {"name": name, "dir": str(root / name), "device": "cpu", "collective_timeout_seconds": 300},
        "model": {"path": str(root / base), "max_sequence_tokens": 128},
        "media": {"frame_rate": 4.0, "num_workers": 1},
        "branch_defaults": {
            "num_prompts_per_step": 26,  # more than a shard holds: every sample is met, the bad ones too
            "num_generations_per_prompt": 2,
            "rollout": {"max_new_tokens": 4},
            "data": {"max_prompt_tokens": 120},
        },
        "branches": {
            branch: {
                "parallel": parallel,
                "data": {
                    "train": [str(root / "data" / f"{branch}-train-*.tar")],
                    "validation": [str(root / "data" / f"{branch}-validation-*.tar")],
                },
            }
            for branch, parallel in branches.items()
        },
        "schedule": {"cycles": 1, "rlvr_steps": 1, "opd_steps": 1},
        "opd": {"num_prompts_per_step": 2, "behaviour": {"num_states": 8}, **opd},
        "optimizer": {"lr": 1e-5},
        "logging": {"console": False},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    run = train_warm(path)
    assert run.status == 0, run.output[-6000:]
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return {"log": run.output, "steps": [json.loads(line) for line in lines], "folder": root / name}


def _check(outcome: dict[str, Any], branches: list[str], edges: set[str]) -> None:
    for step in outcome["steps"]:
        for branch in branches:
            assert step[f"{branch}/train/gen_logprob_error_max"] < 1e-3, "vLLM and the actor see the same"
    last = outcome["steps"][-1]
    gaps = {key.removeprefix("copd/teacher_gap/") for key in last if key.startswith("copd/teacher_gap/")}
    assert gaps == edges
    overlaps = {key.partition("@10/")[2] for key in last if key.startswith("copd/overlap@")}
    assert overlaps == {edge.replace("<-", "-") for edge in edges}
    table = json.loads((outcome["folder"] / "evaluation.json").read_text())
    assert set(table["accuracy"]) == {"base", "merged", *branches}


def test_three_branches_all_to_all_with_media_shipped(root: Path) -> None:
    branches = ["text", "image", "video"]
    outcome = _run(
        root, "three", {name: {} for name in branches}, {"topology": "all_to_all", "ship_media": True}
    )
    _check(outcome, branches, {f"{a}<-{b}" for a in branches for b in branches if a != b})
    last = outcome["steps"][-1]
    assert last["image/data/skipped"] >= 1 and last["video/data/skipped"] >= 1
    assert CORRUPT in outcome["log"] and "rank 0" in outcome["log"]
    _check_eval(root / "three.yaml", outcome["folder"])


def _check_eval(config: Path, folder: Path) -> None:
    """``copd eval`` of the merged folder scores what the run's own table says of it."""
    done = copd("eval", config, folder / "export/merged")
    assert done.returncode == 0, done.stderr[-6000:]
    table = (folder / "evaluation.txt").read_text().splitlines()
    ours, theirs = (
        next(line for line in lines if line.startswith("merged")).split()
        for lines in (table, done.stdout.splitlines())
    )
    assert theirs == ours


@pytest.mark.slow
def test_four_branches_of_unequal_layout_around_a_hub(root: Path) -> None:
    layouts: dict[str, dict[str, int]] = {
        "text": {"tensor_model_parallel_size": 2},
        "image": {"pipeline_model_parallel_size": 2},
        "video": {},
        "more": {"data_parallel_size": 2},
    }
    outcome = _run(root, "four", layouts, {"topology": "hub_and_spoke", "hub": "text"})
    spokes = ["image", "video", "more"]
    _check(outcome, list(layouts), {f"text<-{s}" for s in spokes} | {f"{s}<-text" for s in spokes})


@pytest.mark.slow
def test_branches_of_a_mixture_of_experts(root: Path) -> None:
    """Experts spread over data-parallel ranks, or all on one; the merged folder is as published."""
    layouts = {"text": {"data_parallel_size": 2, "expert_model_parallel_size": 2}, "image": {}}
    outcome = _run(root, "mixture_run", layouts, {}, base="mixture")
    _check(outcome, list(layouts), {"text<-image", "image<-text"})
    with safe_open(outcome["folder"] / "export/merged/model.safetensors", "pt") as merged:
        stack = merged.get_slice("model.language_model.layers.0.mlp.experts.gate_up_proj")
        assert stack.get_shape() == [4, 128, 64], "experts, inputs, outputs"
