#!/usr/bin/env python
"""Measures small runs on this machine's CPU and compares the planner with them.

    python tools/bench_plan.py run --out runs.json          every case, one after the other; resumes
    python tools/bench_plan.py show tests/data/plan_runs.json

A case is a whole ``copd train`` of a random model: its layout, model and lengths are the case's. The figures
of the cases marked ``calibrates`` make the machine's figures; the others are predicted from them. Seconds are
those that the slowest rank's loop had a processor (``timing/processor``), since other work on the machine
lengthens the clock's but hardly these; the memory is the largest peak of the resident memory of any rank. The
first step of a run warms up and does not count; of the others the fastest does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _tree
import yaml

from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.planner.machine import read_machine
from copd_megatron.planner.recorded import compare, fitted, read_measured
from copd_megatron.planner.show import table

TEMPLATE_TOKENS = 5
"""Of a user's turn, beside one token a byte."""
SMALL: dict[str, int] = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768}
MEDIUM: dict[str, int] = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536}
LARGE: dict[str, int] = {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2560}
MIXTURE: dict[str, int] = {
    **SMALL,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One small run."""

    name: str
    model: dict[str, int] = field(default_factory=lambda: SMALL)
    prompt_tokens: int = 48
    response_tokens: int = 48
    prompts: int = 4
    generations: int = 4
    parallel: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    branches: int = 1
    micro_batch_tokens: int = 4096
    sections: dict[str, Any] = field(default_factory=dict)
    vision: bool = False
    calibrates: bool = False

    def config(self) -> dict[str, Any]:
        """The run's settings; paths are relative to its folder."""
        names = ("alpha", "beta", "gamma")[: self.branches]
        opd = 3 if self.branches > 1 else 0
        settings: dict[str, Any] = {
            "run": {"name": self.name, "device": "cpu", "collective_timeout_seconds": 900},
            "model": {
                "path": "model",
                "max_sequence_tokens": 32 * ((self.prompt_tokens + self.response_tokens) // 32 + 2),
            },
            "branch_defaults": {
                "num_prompts_per_step": self.prompts,
                "num_generations_per_prompt": self.generations,
                "data": {"train": ["data/mine-train-*.tar"], "max_prompt_tokens": self.prompt_tokens + 16},
                "reward": {"verifiers": ["exact", "numeric"]},
                "parallel": dict(self.parallel),
                "rollout": {
                    "max_new_tokens": self.response_tokens,
                    "cpu_kv_cache_gib": 0.125,
                    **self.rollout,
                },
            },
            "branches": {name: {} for name in names},
            "schedule": {"cycles": 1, "rlvr_steps": 3 - opd, "opd_steps": opd},
            "optimizer": {"lr": 1e-6},
            "training": {"micro_batch_tokens": self.micro_batch_tokens},
            "weight_sync": {"bucket_bytes": 16 * 2**20},
            "evaluation": {"at_start": False},
            "end": {"merge": False, "export": False},
            "logging": {"console": False, "samples": {"per_step": 0}},
        }
        for name, values in self.sections.items():
            settings[name] = {**settings.get(name, {}), **values}
        return settings


TENSOR = {"tensor_model_parallel_size": 2}
DATA = {"data_parallel_size": 2}
BATCHES = {"loss": {"kl_coefficient": 0.1}, "training": {"num_mini_batches": 2}}
CASES = (
    Case(name="small", calibrates=True, prompts=8, prompt_tokens=64, response_tokens=64),
    Case(name="medium", calibrates=True, model=MEDIUM),
    Case(name="mixture", calibrates=True, model=MIXTURE),
    Case(name="small_tp2", calibrates=True, parallel=TENSOR),
    Case(name="small_two_branches", calibrates=True, branches=2),
    Case(name="medium_long", model=MEDIUM, prompt_tokens=96, response_tokens=96, prompts=2),
    Case(name="medium_tp2", model=MEDIUM, parallel=TENSOR),
    Case(name="medium_dp2", model=MEDIUM, parallel=DATA),
    Case(name="large", model=LARGE, prompts=2),
    Case(name="mixture_long", model=MIXTURE, prompt_tokens=128, response_tokens=64),
    Case(name="small_long", prompt_tokens=64, response_tokens=192, micro_batch_tokens=1024),
    Case(name="small_kl_batches", sections=BATCHES),
    Case(name="medium_two_branches", model=MEDIUM, branches=2),
    Case(name="mixture_ep2", model=MIXTURE, parallel={**DATA, "expert_model_parallel_size": 2}),
    Case(name="image", vision=True),
    Case(name="small_three_branches", branches=3),
)


def make_folder(case: Case, folder: Path) -> None:
    """Model, prompts and settings of a case."""
    import torch

    torch.manual_seed(0)
    if case.vision:
        _make_vision(case, folder)
    else:
        _make_text(case, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(case.config()))


def _make_text(case: Case, folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from copd_megatron.cli.main import main as copd
    from copd_megatron.tiny.tokenizer import build_tokenizer

    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096}
    tokenizer = build_tokenizer(sizes["vocab_size"])
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    fields: dict[str, Any] = {
        **sizes,
        **special,
        **case.model,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    }
    if "num_experts" in case.model:
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields, norm_topk_prob=True)).save_pretrained(folder / "model")
    else:
        Qwen3ForCausalLM(Qwen3Config(**fields)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    length = case.prompt_tokens - TEMPLATE_TOKENS
    rows = [{"prompt": f"{n:04d} ".ljust(length, "x"), "answer": "4", "verifier": "exact"} for n in range(64)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = copd(
        [
            "data",
            "jsonl-to-shards",
            str(folder / "mine.jsonl"),
            "--out",
            str(folder / "data"),
            "--name",
            "mine",
        ]
    )
    assert status == 0, status


def _make_vision(case: Case, folder: Path) -> None:
    from dataclasses import replace

    from copd_megatron.tiny.tasks.visual import VisualShare, write_visual_domain
    from copd_megatron.tiny.vl import build_processor, build_visual_model
    from copd_megatron.tiny.vl_recipe import VL_BASE

    recipe = replace(VL_BASE, model=replace(VL_BASE.model, **case.model))
    processor = build_processor(recipe)
    build_visual_model(recipe, processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    image = recipe.visual[0]
    share = VisualShare(name=image.family, settings=image.settings)
    write_visual_domain(folder / "data", "mine", [share], num_train=64, num_validation=4, seed=1)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Runs a case and returns its record: settings, model, lengths, seconds and bytes."""
    make_folder(case, folder)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(_tree.__file__).resolve().parents[1]),
    }
    command = [sys.executable, "-m", "copd_megatron.cli", "train", "config.yaml"]
    with (folder / "log").open("w") as log:
        status = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if status.returncode:
        raise RuntimeError(
            f"{case.name} ended with {status.returncode}:\n{(folder / 'log').read_text()[-3000:]}"
        )
    lines = [
        json.loads(line) for line in (folder / f"runs/{case.name}/metrics.jsonl").read_text().splitlines()
    ]
    return {
        "name": case.name,
        "calibrates": case.calibrates,
        "config": case.config(),
        "model": asdict(read_model_shape(folder / "model")),
        "prompt_tokens": case.prompt_tokens,
        "steps": [_figures(line) for line in lines],
    }


def _figures(line: dict[str, Any]) -> dict[str, Any]:
    """Of one step: what the plan is compared with."""
    parts = ("/timing/", "/perf/memory_", "/response_length", "/train/num_rows")
    kept = {
        name: value
        for name, value in line.items()
        if any(part in name for part in parts) and "/slowest/" not in name and value
    }
    return {"step": line["step"], "phase": line["phase"], **kept}


def run(out: Path, names: list[str]) -> int:
    """Measures the cases that ``out`` lacks, and writes it after each."""
    records = {record["name"]: record for record in json.loads(out.read_text())} if out.exists() else {}
    for case in CASES:
        if case.name in records or (names and case.name not in names):
            continue
        folder = Path(tempfile.mkdtemp(prefix="bench_plan_"))
        try:
            records[case.name] = measure(case, folder)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        out.write_text(json.dumps([records[c.name] for c in CASES if c.name in records], indent=1))
        print(f"{case.name}: done", flush=True)
    return 0


def show(path: Path) -> int:
    """Calibrates on some runs, prints all beside their plans, and the machine's figures."""
    start = read_machine("cpu")
    runs = read_measured(path, start)
    machine = fitted(start, runs)
    rows = [["run", "used for", "planned s", "measured s", "ratio", "planned GiB", "measured GiB", "ratio"]]
    for one in (compare(run, machine) for run in runs):
        rows.append(
            [
                one.name,
                "calibration" if one.calibrates else "check",
                f"{one.planned_seconds:.2f}",
                f"{one.measured_seconds:.2f}",
                f"{one.seconds_ratio:.2f}",
                f"{one.planned_gib:.2f}",
                f"{one.measured_gib:.2f}",
                f"{one.gib_ratio:.2f}",
            ]
        )
    print("\n".join(table(rows)))
    before, after = asdict(start), asdict(machine)
    print({name: float(f"{value:.3g}") for name, value in after.items() if value != before[name]})
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("names", nargs="*")
    shown = commands.add_parser("show")
    shown.add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "show":
        return show(arguments.path)
    return run(arguments.out, arguments.names)


if __name__ == "__main__":
    sys.exit(main())
