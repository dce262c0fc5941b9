#!/usr/bin/env python3
"""What the CUDA path computes and how fast, on one GPU: correctness and speed, part by part.

    python tools/gpu_check.py                                     every part, a process of its own each
    python tools/gpu_check.py --parts scores packing sync         some parts; results gather in --out
    python tools/gpu_check.py --parts training --shape text-4b --recipes none blockwise
    python tools/gpu_check.py --device cpu                        the correctness parts at tiny size

Correctness
  environment  versions, device, which kernels are live
  scores       log-probabilities in bfloat16 and under each FP8 recipe against transformers in float32
  packing      packed against padded micro-batches, text and vision-language: log-probabilities, gradient norm
  sync         vLLM against the actor after a live sync, seconds and GB/s beside the device's copy rate
  cycle        a two-branch CoPD run (two worlds of one rank) to its merged model; gen_kl_error, scoring share
Speed
  training     MFU and tokens/s of the actor's update by recipe, packed sequences, text-4b and vl-4b shapes
  rollout      tokens/s of the in-process engine beside plain offline vLLM on the same prompts
  memory       what the phases hold, and what is left over after --cycles of sleep, wake, offload and restore

A part that fails or runs out of --minutes costs no other part its result. Results are kept in --out (JSON)
from call to call, so that parts can be run in slices; the table of all of them comes last. Weights are
random, of real shapes; nothing is fetched. MFU counts the model's multiplications (no recomputation) against
the dense bfloat16 peak of the device, whatever the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CORRECTNESS = ("environment", "scores", "packing", "sync", "cycle")
SPEED = ("training", "rollout", "memory")
RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--parts", nargs="+", choices=(*CORRECTNESS, *SPEED), help="default: all (cpu: correctness)"
    )
    parser.add_argument("--shape", nargs="+", help="shapes of training: tiny, text-0.6b, text-4b, vl-4b")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--cycles", type=int, default=50, help="memory: sleep and wake cycles")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of one part")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_check"), help="models are kept here")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ---- the driver: one process a part ----------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.worker:
        return worker(options)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    parts = options.parts or (CORRECTNESS if options.device == "cpu" else (*CORRECTNESS, *SPEED))
    for part in parts:
        for name, extra in jobs(part, options):
            print(f"{name} ...", flush=True)
            results[name] = run_part(part, options, extra)
            options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return int(any("error" in result for result in results.values()))


def jobs(part: str, options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(result name, further arguments) of every process that a part takes."""
    if part == "training":
        shapes = options.shape or (["text-4b", "vl-4b"] if options.device == "cuda" else ["tiny"])
        return [
            (f"training {shape} {recipe}", ["--shape", shape, "--recipes", recipe])
            for shape in shapes
            for recipe in options.recipes
        ]
    if part == "scores":
        return [(f"scores {recipe}", ["--recipes", recipe]) for recipe in options.recipes]
    return [(part, [])]


def run_part(part: str, options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """One part in a process of its own: its figures, or ``error`` with the end of what it said."""
    options.work.mkdir(parents=True, exist_ok=True)
    answer = options.work / f"answer_{os.getpid()}.json"
    answer.unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        "--worker",
        part,
        "--device",
        options.device,
        "--work",
        str(options.work),
    ]
    command += [
        "--out",
        str(answer),
        "--cycles",
        str(options.cycles),
        "--minutes",
        str(options.minutes),
        *extra,
    ]
    environment = os.environ | {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * options.minutes,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        tail = (said.decode(errors="replace") if isinstance(said, bytes) else said)[-1500:]
        return {"error": f"not done within {options.minutes:g} minutes", "output": tail}
    result: dict[str, Any] = {"error": f"exit status {done.returncode}"}
    if answer.exists():
        result = json.loads(answer.read_text())
        answer.unlink()
    elif done.returncode == 0:
        result = {"error": "ended without an answer"}
    if "error" in result:
        result["output"] = (done.stdout + done.stderr)[-3000:]
    result["wall_seconds"] = round(time.monotonic() - begin, 1)
    return result


def worker(options: argparse.Namespace) -> int:
    """Runs one part in this process and writes its figures to ``--out``."""
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import gpu_parts  # beside this script, which its own process runs

    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = gpu_parts.PARTS
    options.out.write_text(json.dumps(parts[options.worker](options)))
    return 0


# ---- the table -------------------------------------------------------------------------------------------

AIMS: dict[tuple[str, str], tuple[str, Callable[[float], bool]]] = {
    ("training", "mfu"): (">= 0.45 in bfloat16", lambda value: value >= 0.45),
    ("training", "speed_over_bfloat16"): (">= 1.25", lambda value: value >= 1.25),
    ("rollout", "share_of_plain_vllm"): (">= 0.95", lambda value: value >= 0.95),
    ("sync", "seconds"): ("< 1", lambda value: value < 1),
    ("sync", "share_of_copy_rate"): (">= 0.5", lambda value: value >= 0.5),
    ("sync", "gen_kl_error"): ("<= 1e-3", lambda value: value <= 1e-3),
    ("cycle", "gen_kl_error"): ("<= 1e-3", lambda value: value <= 1e-3),
}
"""Of a part's figure; those of one H200."""


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """The results, each FP8 training with its speed over that in bfloat16 at the same shape."""
    found = {name: dict(result) for name, result in results.items()}
    for name, result in found.items():
        part, _, rest = name.partition(" ")
        plain = found.get(f"{part} {rest.rpartition(' ')[0]} none", {})
        if part == "training" and not name.endswith(" none") and "seconds" in plain and "seconds" in result:
            result["speed_over_bfloat16"] = plain["seconds"] / result["seconds"]
    return found


def table(results: dict[str, Any]) -> str:
    """A line per figure, with its aim where there is one."""
    lines = [("part", "figure", "value", "aim")]
    for part, result in compared(results).items():
        if "error" in result:
            lines.append((part, "FAILED", str(result["error"]), ""))
            continue
        if "skipped" in result:
            lines.append((part, "skipped", str(result["skipped"]), ""))
            continue
        for figure, value in result.items():
            if isinstance(value, dict | list):
                continue
            aim = AIMS.get((part.split(" ")[0], figure))
            says = ""
            if aim is not None and isinstance(value, int | float):
                says = f"{aim[0]}: {'met' if aim[1](value) else 'missed'}"
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append((part, figure, text, says))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
