#!/usr/bin/env python3
"""What the CUDA path computes and how fast, on one GPU: correctness and speed, part by part.

    python tools/gpu_check.py --list                              the parts, their groups and estimates
    python tools/gpu_check.py --group correctness                 one group: at most 8 minutes
    python tools/gpu_check.py --part scores sync --kinds vl       some parts; results gather in --out
    python tools/gpu_check.py --part training --shape text-4b --recipes none blockwise
    python tools/gpu_check.py --device cpu                        the correctness parts at tiny size
    python -m pytest -m gpu                                       all parts as tests, held to their aims

group correctness
  environment  versions, device, rates of its memory and of its link to the host
  scores       log-probabilities in bfloat16 and under each FP8 recipe against transformers in float32: text;
               in bfloat16 vision-language and mixture of experts
  packing      packed against padded micro-batches and against packs with shared prompts, text and
               vision-language: log-probabilities, gradient norm
  context      context parallelism: not on one GPU
group agreement
  sync         vLLM against the actor after a live sync and after sleep: text, vision-language, mixture of
               experts, FP8 rollouts; seconds and GB/s beside the device's copy rate
  cycle        a two-branch CoPD run (two worlds of one rank) to its merged model; gen_kl_error
group speed
  training     MFU and tokens/s of the actor's update by recipe, 8k packs, text-4b and vl-4b shapes
group rollout
  rollout      tokens/s of the in-process engine beside plain offline vLLM on the same prompts
group memory
  steps        whole steps at 4B: seconds and memory of each phase, teacher scoring's share, and what is left
               over after --cycles of sampling, sleep, update, offload and sync

Every part runs in a process of its own with a time limit; one that fails costs no other its result, and
keeps the figures that it had. Results are kept in --out (JSON) from part to part and call to call, what each
part said in the folder beside it; a table of all results comes last. Profiles of an update per recipe and of
a sync (kernels by time) are in the JSON. Weights are random, of real shapes; nothing is fetched. MFU counts
the model's multiplications (no recomputation) against the device's dense bfloat16 peak, whatever the recipe.
A GPU that cannot hold the optimizer of a 4B model trains as many of its layers as fit: ``num_layers``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _numbers import amount, count

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
GROUPS: dict[str, tuple[str, ...]] = {
    "correctness": ("environment", "scores", "packing", "context"),
    "agreement": ("sync", "cycle"),
    "speed": ("training",),
    "rollout": ("rollout",),
    "memory": ("steps",),
}
PARTS = tuple(part for parts in GROUPS.values() for part in parts)
SECONDS = {
    "environment": 20, "scores": 40, "packing": 60, "context": 0, "sync": 75, "cycle": 170, "training": 50,
    "rollout": 210, "steps": 330,
}  # fmt: skip
"""Of one process of a part on an H200, estimated."""
_CPU_SECONDS = 600
CONTEXT = (
    "needs two GPUs: NCCL refuses two ranks of one group on one; tests/test_policy_layouts.py runs it on CPU"
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--group", nargs="+", choices=tuple(GROUPS), default=[])
    parser.add_argument(
        "--part", "--parts", nargs="+", choices=PARTS, default=[], help="default: all (cpu: correctness)"
    )
    parser.add_argument("--shape", nargs="+", help="shapes of training: tiny, text-0.6b, text-4b, vl-4b ...")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="default: those of this GPU")
    parser.add_argument("--kinds", nargs="+", choices=("text", "vl", "moe", "fp8"), help="of scores and sync")
    parser.add_argument("--cycles", type=count, default=50, help="steps: turns whose leftovers are measured")
    parser.add_argument("--minutes", type=amount, help="limit of one part; default: 2.5 times its estimate")
    parser.add_argument(
        "--total-minutes", type=amount, help="parts that do not fit are left out; default: 9.5 (cpu: none)"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_check"), help="models are kept here")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--list", action="store_true", help="show what would run, and its estimates")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ---- what runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process."""

    name: str
    """Of its result."""
    part: str
    extra: tuple[str, ...] = ()
    """Further arguments."""
    seconds: float
    """Estimate on a GPU."""


def jobs(options: argparse.Namespace) -> list[Job]:
    """The processes of the asked-for groups and parts, in the order of the groups."""
    asked = {*options.part, *(part for group in options.group for part in GROUPS[group])}
    on_cpu = options.device == "cpu"
    if not asked:
        asked = {*GROUPS["correctness"], *GROUPS["agreement"]} if on_cpu else {*PARTS}
    if options.recipes is None:
        options.recipes = recipes_of(compute_capability()) if options.device == "cuda" else ["none"]
    found: list[Job] = []
    for part in (part for part in PARTS if part in asked):
        for words, extra in _variants(part, options):
            found.append(
                Job(name=" ".join([part, *words]), part=part, extra=tuple(extra), seconds=SECONDS[part])
            )
    return found


def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU, without torch, which takes seconds to import; None where the driver does not say."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        major, minor = said.split()[0].split(".")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return int(major), int(minor)


def recipes_of(capability: tuple[int, int] | None) -> list[str]:
    """Precisions that such a GPU has; all of them where it is not known."""
    from copd_megatron.config.hardware import REQUIREMENTS

    lacking = {
        recipe.value
        for recipe, needs in REQUIREMENTS.items()
        if capability is not None and not needs.lowest <= capability < needs.below
    }
    return [recipe for recipe in RECIPES if recipe not in lacking]


def _variants(part: str, options: argparse.Namespace) -> Iterator[tuple[list[str], list[str]]]:
    """(words of the name, arguments) of every process that a part takes."""
    if part == "training":
        shapes = options.shape or (["text-4b", "vl-4b"] if options.device == "cuda" else ["tiny"])
        for shape in shapes:
            for recipe in options.recipes:
                yield [shape, recipe], ["--shape", shape, "--recipes", recipe]
    elif part == "scores":
        for kind in [kind for kind in options.kinds or ["text", "vl", "moe"] if kind != "fp8"]:
            # what these models have besides text's is no other under a recipe: one is enough to see it
            recipes = options.recipes if kind == "text" or options.kinds else options.recipes[:1]
            for recipe in recipes:
                yield [kind, recipe], ["--kind", kind, "--recipes", recipe]
    elif part == "sync":
        for kind in options.kinds or ["text", "vl", "moe", "fp8"]:
            yield [kind], ["--kind", kind]
    else:
        yield [], []


# ---- the driver: one process a job -----------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.worker:
        return worker(options)
    planned = jobs(options)
    on_cuda = options.device == "cuda"
    total = 60 * options.total_minutes if options.total_minutes else 570.0 if on_cuda else float("inf")
    print(f"{len(planned)} parts, about {sum(job.seconds for job in planned) / 60:.1f} minutes on an H200")
    if options.list:
        for job in planned:
            print(f"  {job.name:30} {job.seconds:4.0f} s")
        return 0
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    begin, failed = time.monotonic(), False
    for job in planned:
        left = total - (time.monotonic() - begin)
        if on_cuda and left < 0.7 * job.seconds:
            print(f"{job.name}: left out, {left:.0f} s are left of this call", flush=True)
            results.setdefault(job.name, {"skipped": "no time left in its call; ask for it again"})
        else:
            estimate = f", about {job.seconds:.0f} s" if on_cuda else ""
            print(f"{job.name} ...{estimate}", flush=True)
            results[job.name] = run_job(job, options, left)
            failed = failed or "error" in results[job.name]
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return int(failed)


def run_job(job: Job, options: argparse.Namespace, left: float = float("inf")) -> dict[str, Any]:
    """One part in a process of its own: its figures; where it failed or ran out of time the figures that it
    had, ``error`` and the end of its ``output``. ``left``: seconds of this call."""
    if job.part == "context":
        return {"skipped": CONTEXT}
    seconds = 60 * options.minutes if options.minutes else 2.5 * max(job.seconds, 40)
    if options.device == "cpu" and not options.minutes:
        seconds = _CPU_SECONDS
    seconds = min(seconds, left)
    options.work.mkdir(parents=True, exist_ok=True)
    logs = options.out.with_name(options.out.stem + "_logs")
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (job.name.replace(" ", "_") + ".log")
    answer = options.work / f"answer_{os.getpid()}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", job.part, "--device", options.device]
    command += ["--work", str(options.work), "--out", str(answer), "--cycles", str(options.cycles)]
    command += ["--minutes", str(seconds / 60), *job.extra]
    begin = time.monotonic()
    status = _run(command, log, seconds)
    result: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    answer.unlink(missing_ok=True)
    if status is None:
        result["error"] = f"not done within {seconds / 60:.3g} minutes"
    elif status and "error" not in result:
        result["error"] = f"exit status {status}"
    elif not result:
        result["error"] = "ended without an answer"
    if "error" in result:
        result["output"] = log.read_text(errors="replace")[-3000:]
    result["wall_seconds"] = round(time.monotonic() - begin, 1)
    return result


def _run(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit status, or None where it took longer than ``seconds``. Whatever it started ends with it: an engine
    left over would hold the device's memory from the next part."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def worker(options: argparse.Namespace) -> int:
    """Runs one part in this process, which writes its figures to ``--out`` as it finds them."""
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gpu_measure import Figures  # beside this script, which its own process runs
    from gpu_parts import PARTS as functions

    figures = Figures(options.out)
    try:
        figures.add(device=device_name(options.device))
        functions[options.worker](options, figures)
    except Exception as error:
        traceback.print_exc()
        figures.add(error=f"{type(error).__name__}: {str(error)[:200]}")
        return 1
    return 0


def device_name(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --device cpu runs the correctness parts")
    return torch.cuda.get_device_name(0) if device == "cuda" else "CPU"


# ---- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a figure should come to on an H200."""

    results: str
    """Beginning of the results' names that it holds for."""
    figure: str
    says: str
    met: Callable[[float], bool]
    ends: str = ""
    """End of those names."""


_OVER = "mean_error_over_transformers"
"""Mean error of the actor's log-probabilities over that of transformers in the same type."""

AIMS = (
    Aim(results="training", ends=" none", figure="mfu", says=">= 0.45", met=lambda value: value >= 0.45),
    Aim(results="training", figure="speed_over_bfloat16", says=">= 1.25", met=lambda value: value >= 1.25),
    Aim(results="rollout", figure="share_of_plain_vllm", says=">= 0.95", met=lambda value: value >= 0.95),
    Aim(results="sync text", figure="seconds", says="< 1", met=lambda value: value < 1),
    Aim(results="sync text", figure="share_of_copy_rate", says=">= 0.5", met=lambda value: value >= 0.5),
    # Wide enough for bfloat16's rounding. A wrong mask, position or scale goes far beyond.
    Aim(results="scores", ends=" none", figure=_OVER, says="<= 2", met=lambda value: value <= 2),
    *(
        Aim(results="scores", ends=end, figure="max_logprob_error", says="<= 0.5", met=lambda v: v <= 0.5)
        for end in (f" {recipe}" for recipe in RECIPES if recipe != "none")
    ),
    *(
        Aim(results="packing", figure=f"{kind}_{what}_difference", says="<= 0.05", met=lambda v: v <= 0.05)
        for kind in ("text", "vl")
        for what in (
            "mean_logprob",
            "grad_norm_relative",
            "shared_mean_logprob",
            "shared_grad_norm_relative",
        )
    ),
    *(
        Aim(results=part, figure=f"{kind}gen_kl_error{when}", says="<= 1e-3", met=lambda value: value <= 1e-3)
        for part in ("sync text", "sync vl", "sync moe", "cycle")
        for kind in ("", "image_")
        for when in ("", "_after_sleep")
    ),
    *(
        Aim(results="steps", figure=f"{what}_growth_gib", says="<= 0.1", met=lambda value: value <= 0.1)
        for what in ("slack", "device", "allocated")
    ),
)


def aim_of(name: str, figure: str, device: str) -> Aim | None:
    """Of a result's figure; speeds have none on CPU."""
    for aim in AIMS:
        if aim.figure == figure and name.startswith(aim.results) and name.endswith(aim.ends):
            return aim if device != "CPU" or "error" in figure or "difference" in figure else None
    return None


def missed(results: dict[str, Any]) -> list[str]:
    """Figures that miss their aim, in words."""
    found = []
    for name, result in compared(results).items():
        for figure, value in result.items():
            aim = aim_of(name, figure, str(result.get("device", "")))
            if aim is not None and isinstance(value, int | float) and not aim.met(value):
                found.append(f"{name}: {figure} is {value:.4g}, the aim is {aim.says}")
    return found


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """The results with the figures that take two: an FP8 training's speed over that in bfloat16, where both
    trained the same shape and as many layers; the actor's error over transformers' own in bfloat16."""
    found = {name: dict(result) for name, result in results.items()}
    for name, result in found.items():
        if theirs := result.get("transformers_bfloat16_mean_logprob_error"):
            result[_OVER] = result["mean_logprob_error"] / theirs
        part, _, rest = name.partition(" ")
        plain = found.get(f"{part} {rest.rpartition(' ')[0]} none", {})
        if part != "training" or name.endswith(" none"):
            continue
        if "tflops" in plain and "tflops" in result and plain.get("device") == result.get("device"):
            result["speed_over_bfloat16"] = result["tflops"] / plain["tflops"]
    return found


def table(results: dict[str, Any]) -> str:
    """A line per figure, with its aim where there is one."""
    lines = [("part", "figure", "value", "aim")]
    for name, result in compared(results).items():
        device = str(result.get("device", ""))
        if "skipped" in result:
            lines.append((name, "skipped", str(result["skipped"]), ""))
            continue
        if "error" in result:
            lines.append((name, "FAILED", str(result["error"]), ""))
        for figure, value in result.items():
            if isinstance(value, dict | list) or figure in ("device", "error", "output"):
                continue
            aim, says = aim_of(name, figure, device), ""
            if aim is not None and isinstance(value, int | float):
                says = f"{aim.says}: {'met' if aim.met(value) else 'missed'}"
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append((name, figure, text, says))
    widths = [min(60, max(len(line[column]) for line in lines)) for column in range(3)]
    devices = sorted({str(result["device"]) for result in results.values() if "device" in result})
    return "\n".join(
        [
            f"on {', '.join(devices) or 'no device'}",
            *(
                "  ".join(
                    [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]
                ).rstrip()
                for line in lines
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
