"""Short programs as a domain that a tiny model trains on, graded by running them in the sandbox."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.data import ShardSet
from copd_megatron.rewards import registry, sandbox
from copd_megatron.tiny.demonstrations import build_up
from copd_megatron.tiny.recipe import PROGRAMS, TEXT_BASE, ModelSize, TextBase, WarmUpSettings
from copd_megatron.tiny.tasks.code import expressions, steps_of, task
from copd_megatron.tiny.tasks.text import Family, write_domain
from tests.support.commands import copd

works = pytest.mark.skipif(sandbox.check() is not None, reason=f"no sandbox here: {sandbox.check()}")
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "subtract", "times"]), st.integers(2, 9)), min_size=1, max_size=4
)


@given(STEPS)
def test_a_gold_program_does_what_is_asked(steps: list[tuple[str, int]]) -> None:
    made = task(steps)
    assert steps_of(made["question"]) == steps
    names: dict[str, Any] = {}
    exec(made["answer"].strip("`\n"), names)  # made here, from the steps
    exec(made["metadata"]["tests"][0], names)
    assert build_up(made["question"]).split() == expressions(steps)


@works
def test_the_shards_are_graded_by_running_programs(tmp_path: Path) -> None:
    family = Family(name="programs", settings={"max_steps": 2})
    write_domain(tmp_path, "programs", [family], num_train=30, num_validation=5, seed=3)
    shards = {split: ShardSet.open([f"{tmp_path}/*-{split}-*.tar"]) for split in ("train", "validation")}
    samples = {split: [found.read(ref) for ref in found.refs] for split, found in shards.items()}
    asked = {split: {sample.prompt for sample in found} for split, found in samples.items()}
    assert len(asked["train"]) == 30 and not asked["train"] & asked["validation"]
    code = registry.get("code").verify
    first = samples["train"][0]
    assert first.verifier == "code" and code(first.answer, first.answer, first.metadata) == 1.0
    for wrong in ("f=lambda x:x", "f=lambda x:10**9", "print(1)", "def f(x): return"):
        assert code(f"```\n{wrong}\n```", first.answer, first.metadata) == 0.0
    assert code(first.answer.replace("`", ""), first.answer, first.metadata) == 0.0, "outside a block"


def _base(root: Path) -> None:
    """A model that solves some of the shortest tasks of each domain, after seconds of warm-up."""
    from copd_megatron.tiny.base import make_data, make_tiny_base

    short = dataclasses.replace(
        PROGRAMS, family=Family(name="programs", settings={"max_steps": 2, "max_number": 5})
    )
    divisors = dataclasses.replace(
        PROGRAMS, name="divisors", family=Family(name="gcd", settings={"max_value": 40}), working=""
    )
    warm_up = WarmUpSettings(num_steps=150, batch_size=16, worked_share=0.0)
    size = ModelSize(hidden_size=64, intermediate_size=192, num_hidden_layers=2)
    sizes: dict[str, Any] = {"num_train": 96, "num_validation": 8}
    make_data(root / "data", TextBase(domains=(*TEXT_BASE.domains, divisors, short), **sizes))
    make_tiny_base(root / "base", TextBase(domains=(short,), model=size, warm_up=warm_up, **sizes))


@works
@pytest.mark.slow
def test_programs_as_the_fourth_branch(tmp_path: Path) -> None:
    _base(tmp_path)
    branches = ["addition", "running_sums", "divisors", "programs"]
    config = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "collective_timeout_seconds": 300},
        "model": {"path": str(tmp_path / "base"), "max_sequence_tokens": 192},
        "branch_defaults": {
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "data": {"max_prompt_tokens": 128},
            "rollout": {"max_new_tokens": 40},
        },
        "branches": {
            name: {
                "data": {"train": [str(tmp_path / "data" / f"{name}-train-*.tar")]},
                "reward": {
                    "verifiers": ["code"] if name == "programs" else ["numeric"],
                    "timeout_seconds": 60,
                },
            }
            for name in branches
        },
        "schedule": {"cycles": 1, "rlvr_steps": 2, "opd_steps": 1},
        "opd": {"topology": "hub_and_spoke", "num_prompts_per_step": 2},
        "optimizer": {"lr": 1e-4},
        "logging": {"console": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = copd("train", path)
    assert done.returncode == 0, done.stderr[-6000:]
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    rewards = [step["programs/train/reward"] for step in steps]
    assert max(rewards) > 0.0 and min(rewards) < 1.0, "some programs are right and some are wrong"
    assert steps[-1]["programs/rewards/graded"] >= 3 * 16 and steps[-1]["programs/rewards/failed"] == 0
    assert max(step["programs/train/grad_norm"] for step in steps) > 0.0
    edges = {
        key.removeprefix("copd/teacher_gap/") for key in steps[-1] if key.startswith("copd/teacher_gap/")
    }
    assert {"programs<-addition", "addition<-programs"} <= edges
