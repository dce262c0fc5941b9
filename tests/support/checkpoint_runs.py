"""Material for tests that run, stop and resume whole trainings: a base model, data, a configuration."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from copd_megatron.data import check_shards
from tests.support.commands import environment
from tests.support.domains import make_domains
from tests.support.models import make_model, warm_up

BRANCHES = ("alpha", "beta")
NUM_STEPS = 6


def prepare(root: Path, *, num_train: int = 24, num_validation: int = 4) -> None:
    """A base model that answers some prompts, and data of two domains.

    The default number of prompts is smaller than what the steps draw: a second epoch begins on the way.
    """
    make_domains(root / "data", num_train=num_train, num_validation=num_validation)
    make_model(root / "base", seed=4, scale=1.0, tie_word_embeddings=True, num_hidden_layers=2)
    pairs = []
    for name in BRANCHES:
        shards = check_shards([str(root / "data" / f"{name}-train-*.tar")], ["numeric"])
        samples = [shards.read(ref) for ref in shards.refs]
        pairs += [(str(sample.prompt), sample.answer) for sample in samples]
    warm_up(root / "base", pairs, steps=120)


def write_config(root: Path, parallel: Mapping[str, Mapping[str, int]], **sections: Any) -> Path:
    """A run of two cycles over both phases with everything that a resume could lose: mini-batches, a
    reference model, a teacher snapshot, warm-up, validation on the way.

    Args:
        parallel: layout of each branch.
        sections: laid over the configuration's sections.
    """
    config: dict[str, Any] = {
        "run": {"name": "resume", "seed": 1, "device": "cpu", "collective_timeout_seconds": 300},
        "model": {"path": str(root / "base"), "max_sequence_tokens": 192},
        "branch_defaults": {
            "num_prompts_per_step": 5,
            "num_generations_per_prompt": 4,
            "rollout": {"max_new_tokens": 8, "cpu_kv_cache_gib": 0.05},
            "data": {"max_prompt_tokens": 160},
            "reward": {"verifiers": ["numeric", "reasoning_gym"]},
        },
        "branches": {
            name: {
                "parallel": dict(parallel[name]),
                "data": {
                    "train": [str(root / "data" / f"{name}-train-*.tar")],
                    "validation": [str(root / "data" / f"{name}-validation-*.tar")],
                },
            }
            for name in BRANCHES
        },
        "schedule": {"cycles": 2, "rlvr_steps": 1, "opd_steps": 2},
        "opd": {"num_prompts_per_step": 3, "teacher_mode": "phase_snapshot", "behaviour": {"num_states": 16}},
        "loss": {"kl_coefficient": 0.05},
        "optimizer": {"lr": 1e-3, "lr_schedule": "cosine", "lr_warmup_steps": 3, "weight_decay": 0.1},
        "training": {"micro_batch_tokens": 700, "num_mini_batches": 2, "max_weight_lag": 0},
        "evaluation": {"every_steps": 2},
        "checkpoint": {"save_period": 1, "keep_last": 20},
        "logging": {"console": False},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    path = root / f"run_{len(list(root.glob('run_*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.contextmanager
def training(config: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """``copd train`` as a user starts it, output in ``<run_dir>.log``; killed at the end of the block if it
    is still there (its ranks die with it)."""
    command = [
        sys.executable,
        "-m",
        "copd_megatron.cli",
        "train",
        str(config),
        f"run.dir={run_dir}",
        *overrides,
    ]
    variables = environment(PYTHONWARNINGS="ignore")
    with log_of(run_dir).open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=variables)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def train(config: Path, run_dir: Path, overrides: Sequence[str] = (), *, timeout: float = 400) -> int:
    """Runs ``copd train`` to its end; its exit status."""
    with training(config, run_dir, overrides) as process:
        return process.wait(timeout)


def log_of(run_dir: Path) -> Path:
    """Where ``training`` puts the output."""
    return run_dir.with_name(run_dir.name + ".log")


def steps_written(run_dir: Path) -> int:
    """Steps whose metrics are written."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rank_process(run_dir: Path, rank: int) -> int:
    """Process id of a rank of a run."""
    found = rank_processes(run_dir)
    assert rank in found, f"{run_dir} has no rank {rank}"
    return found[rank]


def rank_processes(run_dir: Path) -> dict[int, int]:
    """Global rank to process id, of the ranks of a run that there are."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is none of ours
        if f"run.dir={run_dir}".encode() in command:
            ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, int(process.name))
    return found


def until(
    condition: Callable[[], bool], process: subprocess.Popen[str], run_dir: Path, seconds: float = 240
) -> None:
    """Waits for something in a run that must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        said = log_of(run_dir).read_text()[-4000:]
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.05)
