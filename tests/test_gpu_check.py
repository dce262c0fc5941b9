"""The GPU script on CPU: its correctness parts run for real at tiny size; its driver isolates what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_check

ROOT = Path(__file__).resolve().parents[1]


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Results and output of a call."""
    out = tmp_path / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "tools/gpu_check.py", "--device", "cpu", "--work", str(tmp_path / "work")),
            *("--out", str(out), *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(out.read_text()), done.stdout


def test_scores_run_and_a_recipe_without_its_gpu_is_skipped(tmp_path: Path) -> None:
    results, output = run(tmp_path, "--parts", "scores", "--recipes", "none", "blockwise")
    assert results["scores none"]["max_logprob_error"] < 1e-4
    assert results["scores none"]["num_tokens"] > 20
    assert "sm90" in results["scores blockwise"]["skipped"]
    assert output.splitlines()[-1].startswith("scores blockwise")


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    parts = ["environment", "packing", "sync", "cycle", "training", "rollout", "memory"]
    results, output = run(tmp_path, "--parts", *parts, "--recipes", "none")
    assert not [name for name, result in results.items() if "error" in result], output
    packing = results["packing"]
    assert packing["text_max_logprob_difference"] < 1e-5
    assert packing["vl_max_logprob_difference"] < 1e-5
    assert packing["vl_grad_norm_relative_difference"] < 1e-5
    assert results["sync"]["gen_kl_error"] < 1e-6
    assert results["cycle"]["merged_exported"] and results["cycle"]["gen_kl_error"] < 1e-6
    assert results["training tiny none"]["tokens_per_second"] > 0
    assert results["rollout"]["share_of_plain_vllm"] > 0
    assert results["memory"]["cycles"] == 2


def test_a_part_that_fails_costs_no_other_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"environment": {"date": "today"}, "packing": {"error": "exit status 1", "output": "..."}}
    monkeypatch.setattr(gpu_check, "run_part", lambda part, options, extra: answers[part])
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"sync": {"seconds": 0.5, "share_of_copy_rate": 0.4}}))
    arguments = ["--parts", "packing", "environment", "--out", str(out), "--work", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    assert set(json.loads(out.read_text())) == {"sync", "environment", "packing"}
    table = capsys.readouterr().out
    assert "< 1: met" in table and ">= 0.5: missed" in table and "FAILED" in table and "today" in table


def test_fp8_is_compared_with_bfloat16_at_its_shape() -> None:
    results = {
        "training text-4b none": {"seconds": 3.0, "mfu": 0.5},
        "training text-4b blockwise": {"seconds": 2.0, "mfu": 0.75},
        "training vl-4b blockwise": {"seconds": 2.0},
    }
    table = gpu_check.table(results)
    (line,) = [line for line in table.splitlines() if "speed_over_bfloat16" in line]
    assert "blockwise" in line and "1.5" in line and line.endswith(">= 1.25: met")
    assert len(results["training text-4b blockwise"]) == 2, "the file keeps what was measured"


def test_a_part_out_of_time_says_so(tmp_path: Path) -> None:
    results, _ = run(tmp_path, "--parts", "environment", "--minutes", "0.001")
    assert "0.001 minutes" in results["environment"]["error"]


def test_training_is_a_process_per_shape_and_recipe() -> None:
    options = gpu_check.parse_arguments(["--shape", "text-4b", "--recipes", "none", "blockwise"])
    assert [name for name, _ in gpu_check.jobs("training", options)] == [
        "training text-4b none",
        "training text-4b blockwise",
    ]


def test_model_flops_of_a_known_shape() -> None:
    """Qwen3-4B on one row of 8192: 6 x 3.63 G weights in layers a token, and a third more for attention."""
    from copd_megatron.config.model_shape import ModelShape
    from tools.gpu_parts import Sample, make_sequences, model_flops

    dims = ModelShape(
        architecture="Qwen3ForCausalLM",
        num_layers=36,
        hidden_size=2560,
        ffn_hidden_size=9728,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    samples: list[Sample] = make_sequences(dims, [8192], seed=0)
    layers = 36 * (2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728)
    matrices, head = 6 * layers * 8192, 6 * 151936 * 2560 * 6144
    attention = 6 * 36 * 4096 * 8192**2
    assert model_flops(dims, samples) == pytest.approx(matrices + head + attention, rel=1e-3)
