"""The GPU script on CPU: its parts run for real at tiny size; its driver isolates what fails."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check
import pytest

from tests.support.gpu import run_gpu_check
from tests.support.shapes import SHAPE, TOWER


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Results and output of a call on the CPU."""
    return run_gpu_check(tmp_path, "--device", "cpu", *arguments)


def test_scores_run_and_a_recipe_without_its_gpu_is_skipped(tmp_path: Path) -> None:
    results, output = run(tmp_path, "--part", "scores", "--kinds", "vl", "--recipes", "none", "blockwise")
    assert results["scores vl none"]["max_logprob_error"] < 1e-4
    assert results["scores vl none"]["num_tokens"] > 20
    assert results["scores vl none"]["reference_std"] > 1, "distributions are far from uniform"
    assert "sm90" in results["scores vl blockwise"]["skipped"]
    assert output.splitlines()[-1].startswith("scores vl blockwise")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_correctness_parts_run(tmp_path: Path) -> None:
    results, output = run(tmp_path)
    assert not [name for name, result in results.items() if "error" in result], output
    for kind in ("text", "vl", "moe"):
        assert results[f"scores {kind} none"]["max_logprob_error"] < 1e-4
    for kind in ("text", "vl"):
        for what in ("", "shared_"):
            assert results["packing"][f"{kind}_{what}max_logprob_difference"] < 2e-5
            assert results["packing"][f"{kind}_{what}grad_norm_relative_difference"] < 1e-5
    for kind in ("text", "vl", "moe"):
        assert results[f"sync {kind}"]["gen_kl_error"] < 1e-6
        assert results[f"sync {kind}"]["profile"]["top"]
    assert results["sync vl"]["image_gen_kl_error"] < 1e-6
    assert "two GPUs" in results["context"]["skipped"]
    assert results["cycle"]["merged_exported"] and results["cycle"]["gen_kl_error"] < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_speed_parts_run(tmp_path: Path) -> None:
    results, output = run(tmp_path, "--group", "speed", "rollout", "memory")
    assert not [name for name, result in results.items() if "error" in result], output
    assert results["training tiny none"]["tokens_per_second"] > 0
    assert results["training tiny none"]["profile"]["top"]
    assert results["rollout"]["share_of_plain_vllm"] > 0
    assert results["steps"]["cycles"] == 3
    assert 0 < results["steps"]["teacher_scoring_share_of_step"] < 1


def options(*arguments: str) -> Any:
    return gpu_check.parse_arguments(list(arguments))


def answering(answers: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that answer at once, by the results' names."""
    monkeypatch.setattr(gpu_check, "run_job", lambda job, options, left: answers[job.name])


def test_a_part_that_fails_costs_no_other_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"error": "exit status 1", "output": "...", "text_loss_difference": 0.125}
    answering({"environment": {"date": "today"}, "packing": failed}, monkeypatch)
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"sync text": {"device": "H", "seconds": 0.5, "share_of_copy_rate": 0.4}}))
    arguments = ["--part", "packing", "environment", "--out", str(out), "--work", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    assert set(json.loads(out.read_text())) == {"sync text", "environment", "packing"}
    table = capsys.readouterr().out
    assert "< 1: met" in table and ">= 0.5: missed" in table and "FAILED" in table and "today" in table
    assert "0.125" in table, "what a failed part had found is shown"


def test_a_part_without_time_left_keeps_its_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering({}, monkeypatch)
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"cycle": {"gen_kl_error": 1e-4}}))
    arguments = ["--part", "cycle", "rollout", "--total-minutes", "0.5", "--out", str(out)]
    assert gpu_check.main(arguments) == 0
    results = json.loads(out.read_text())
    assert results["cycle"] == {"gen_kl_error": 1e-4}
    assert "no time left" in results["rollout"]["skipped"]


def test_fp8_is_compared_with_bfloat16_at_its_shape() -> None:
    results = {
        "training text-4b none": {"device": "NVIDIA H200", "tflops": 400.0, "mfu": 0.4},
        "training text-4b blockwise": {"device": "NVIDIA H200", "tflops": 600.0, "mfu": 0.6},
        "training text-4b delayed": {"device": "NVIDIA H100", "tflops": 600.0},
        "training vl-4b blockwise": {"device": "NVIDIA H200", "tflops": 500.0},
    }
    table = gpu_check.table(results)
    (line,) = [line for line in table.splitlines() if "speed_over_bfloat16" in line]
    assert "blockwise" in line and "1.5" in line and line.endswith(">= 1.25: met")
    (line,) = [line for line in table.splitlines() if ">= 0.45" in line]
    assert "none" in line and line.endswith("missed"), "the aim of MFU is that in bfloat16"
    assert len(results["training text-4b blockwise"]) == 3, "the file keeps what was measured"
    assert table.startswith("on NVIDIA H100, NVIDIA H200")


def test_figures_that_miss_their_aim_are_told_in_words() -> None:
    gpu = {"device": "NVIDIA H200"}
    theirs = {"transformers_bfloat16_mean_logprob_error": 0.01}
    results = {
        "scores text none": gpu | theirs | {"mean_logprob_error": 0.019, "max_logprob_error": 0.3},
        "scores vl none": gpu | theirs | {"mean_logprob_error": 0.03},
        "scores text delayed": gpu | {"max_logprob_error": 0.6, "cold_max_logprob_error": 9.0},
        "packing": gpu | {"text_grad_norm_relative_difference": 0.2, "vl_mean_logprob_difference": 0.01},
        "training text-4b none": gpu | {"mfu": 0.1},
        "context": {"skipped": "two GPUs"},
    }
    assert gpu_check.missed(results) == [
        "scores vl none: mean_error_over_transformers is 3, the aim is <= 2",
        "scores text delayed: max_logprob_error is 0.6, the aim is <= 0.5",
        "packing: text_grad_norm_relative_difference is 0.2, the aim is <= 0.05",
        "training text-4b none: mfu is 0.1, the aim is >= 0.45",
    ]


def test_speeds_have_no_aim_on_cpu_but_agreement_has() -> None:
    figures = {"device": "CPU", "seconds": 0.1, "gen_kl_error": 1e-9, "image_gen_kl_error": 1e-2}
    table = gpu_check.table({"sync vl": figures, "sync text": figures})
    assert "< 1" not in table
    assert table.count("<= 1e-3: met") == 2 and table.count("<= 1e-3: missed") == 2


def test_a_part_out_of_time_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    results, _ = run(tmp_path, "--part", "environment", "--minutes", "0.001")
    assert "0.001 minutes" in results["environment"]["error"]
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    assert gpu_check._run([sys.executable, "-c", code], tmp_path / "log", 60) == 0
    child = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 10
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)


def running(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_groups_fit_into_eight_minutes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "compute_capability", lambda: (9, 0))
    for group in gpu_check.GROUPS:
        planned = gpu_check.jobs(options("--group", group))
        assert 0 < sum(job.seconds for job in planned) <= 480, group
    assert sum(job.seconds for job in gpu_check.jobs(options())) <= 1800
    assert {job.part for job in gpu_check.jobs(options())} == set(gpu_check.PARTS)


def test_recipes_are_those_of_the_gpu() -> None:
    assert gpu_check.recipes_of((9, 0)) == ["none", "delayed", "tensorwise", "blockwise"]
    assert gpu_check.recipes_of((10, 0)) == ["none", "delayed", "tensorwise", "mxfp8"]
    assert gpu_check.recipes_of((8, 0)) == ["none"]
    assert gpu_check.recipes_of(None) == list(gpu_check.RECIPES)


def test_training_is_a_process_per_shape_and_recipe() -> None:
    chosen = options("--part", "training", "--shape", "text-4b", "--recipes", "none", "blockwise")
    assert [job.name for job in gpu_check.jobs(chosen)] == [
        "training text-4b none",
        "training text-4b blockwise",
    ]


def test_scores_of_other_models_take_one_recipe_unless_asked() -> None:
    planned = [
        job.name for job in gpu_check.jobs(options("--part", "scores", "--recipes", "none", "delayed"))
    ]
    assert planned == ["scores text none", "scores text delayed", "scores vl none", "scores moe none"]
    asked = options("--part", "scores", "--kinds", "vl", "--recipes", "none", "delayed")
    assert [job.name for job in gpu_check.jobs(asked)] == ["scores vl none", "scores vl delayed"]


def test_figures_are_on_disk_as_soon_as_they_are_found(tmp_path: Path) -> None:
    from gpu_measure import Figures

    figures = Figures(tmp_path / "answer.json")
    figures.add(first=1)
    figures.add(second=2.5)
    assert json.loads((tmp_path / "answer.json").read_text()) == {"first": 1, "second": 2.5}


def test_growth_leaves_out_the_first_cycles() -> None:
    import gpu_speed

    cycles = [{"slack": value} for value in (9.0, 5.0, *[1.0] * 40, *[1.5] * 6)]
    assert gpu_speed._growth(cycles) == {"slack_growth_gib": 0.5}
    assert gpu_speed._growth(cycles[:1]) == {"slack_growth_gib": 0.0}


def test_model_flops_of_a_known_shape() -> None:
    """Qwen3-4B on one row of 8192: 2 x 3.63 G weights in layers a token, and a third more for attention."""
    from gpu_material import Sample, make_sequences
    from gpu_measure import model_flops

    dims = replace(
        SHAPE,
        num_layers=36,
        hidden_size=2560,
        ffn_hidden_size=9728,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
    )
    samples: list[Sample] = make_sequences(dims, [8192], seed=0)
    layers = 36 * (2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728)
    matrices, head = 2 * layers * 8192, 2 * 151936 * 2560 * 6144
    attention = 2 * 36 * 4096 * 8192**2
    assert model_flops(dims, samples) == pytest.approx(matrices + head + attention, rel=1e-3)


def test_tower_flops_count_mergers_once_per_merged_patch() -> None:
    from gpu_material import Sample, make_sequences
    from gpu_measure import model_flops

    from copd_megatron.records import MediaRef

    dims = replace(
        SHAPE,
        architecture="Qwen3VLForConditionalGeneration",
        vocab_size=320,
        vision=replace(TOWER, depth=3, num_deepstack=2),
    )
    (plain,) = make_sequences(dims, [40], seed=0)
    ref = MediaRef(source="", shard="", key="", extension="png", kind="image", content_hash="")
    seen = Sample(token_ids=plain.token_ids, prompt_length=plain.prompt_length, media=(ref,))
    blocks = 3 * (4 * 32**2 + 2 * 32 * 64) + 3 * 2 * 8 * 8 * 32
    mergers = 3 * 128 * (128 + 64) / 4
    image = 2 * 24 * (blocks + mergers) + 4 * 3 * 32 * 24**2
    assert model_flops(dims, [seen], patches=24) - model_flops(dims, [plain]) == pytest.approx(image)


def test_a_gpu_trains_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from gpu_material import make_folder
    from gpu_measure import GIB, layers_that_fit

    from copd_megatron.hf.model_config import read_model_shape

    text, vision = (read_model_shape(make_folder(tmp_path, shape)) for shape in ("text-4b", "vl-4b"))
    assert text.num_parameters == pytest.approx(4.02e9, rel=0.01)
    assert vision.num_parameters == pytest.approx(4.44e9, rel=0.01)

    def fits(gib: float, dims: Any, **more: Any) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * GIB), int(gib * GIB)))
        return layers_that_fit(dims, tokens=8192, **more)

    assert fits(139, text) == fits(139, text, fp8=True) == fits(139, vision) == 36
    assert 18 <= fits(78, text, fp8=True) < fits(78, text) < 24
    assert 15 <= fits(78, vision) < fits(78, text)
    assert fits(10, text) == 1
