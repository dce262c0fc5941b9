#!/usr/bin/env python3
"""Time a GRPO step beside what a user would take instead, on the same model, prompts, lengths and threads.

    python tools/bench_step.py                      1 M and 90 M parameters, some minutes
    python tools/bench_step.py --quick --sizes 1M   a look
    python tools/bench_step.py --json step.json     the single measurements too

Float32 on the CPU, random weights, 25 tokens of prompt and 48 of response. In turn, ``--repeats`` times:

* ours: the training loop of ``copd train``, one branch, as one rank and as one rank a thread
* TRL: GRPOTrainer with generation by transformers, in an environment of its own that this script makes
* transformers: forward, backward and AdamW on as many rows, which is the least that an actor does
* vLLM: offline, text only; and for RL, with the seeds and log-probabilities that a step needs
* floor: the step's floating-point operations at the rate of a matrix product in the same turn

Everything is loaded before the first turn, and waits without work while the others have theirs. Ratios are
taken turn by turn, so that a slow moment of the machine meets both sides; the median is followed by the
smallest and the largest. CPU seconds (of all ranks) are shown beside, because what else the machine does
hardly changes them; with ``--threads 1`` nothing waits for a thread that has no core, and they say what the
work costs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _numbers import count

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path[:0] = [str(ROOT), str(TOOLS)]

from bench_step_gate import MARK  # noqa: E402
from bench_step_material import PROMPT, RESPONSE, SIZES, Size, flops, make_model, make_work  # noqa: E402

PEERS = ("trl==1.16.0", "transformers==5.12.1", "torch==2.13.0", "accelerate==1.15.0", "datasets==5.2.0")
"""What TRL's environment gets. Torch and transformers are those of this package."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument(
        "--threads", type=count, default=2, help="of every compared thing, in all its processes"
    )
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--without", nargs="+", default=[], help="names of rows to leave out")
    parser.add_argument("--compile", action="store_true", help="let plain vLLM compile (its default)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "bench_step")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all measurements there")
    return parser.parse_args(arguments)


# ---- the environment of the peers ------------------------------------------------------------------------


def peer_python(cache: Path) -> Path:
    """The Python of TRL's environment, which is made the first time."""
    digest = hashlib.sha256("\n".join(PEERS).encode()).hexdigest()[:12]
    folder = cache / f"trl-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        uv = shutil.which("uv")
        print(f"making TRL's environment in {folder}", file=sys.stderr)
        if uv is None:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        else:
            subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
            subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *PEERS], check=True)
        (folder / "complete").touch()
    return python


# ---- the processes -----------------------------------------------------------------------------------------


@dataclass
class Runner:
    """One of the compared things: its processes, and what they answered."""

    name: str
    processes: list[subprocess.Popen[str]]
    log: Path
    turns: list[dict[str, float]] = field(default_factory=list)

    def listen(self) -> dict[str, float]:
        """The first process's answer, once all have answered; CPU seconds are the sum.

        Raises:
            RuntimeError: a process ended instead, with the end of its log.
        """
        answers = [self._answer(process) for process in self.processes]
        cpu = [name for name in answers[0] if name.startswith("cpu ")]
        return {**answers[0], **{name: sum(answer[name] for answer in answers) for name in cpu}}

    def step(self) -> dict[str, float]:
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # one that has ended is reported by ``listen``
                process.stdin.write("step\n")
                process.stdin.flush()
        return self.listen()

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                answer: dict[str, float] = json.loads(line.removeprefix(MARK))
                return answer
        end = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{self.name} ended with {process.wait()}; the end of its output:\n{end}")

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(
    name: str, command: list[Any], log: Path, *, ranks: int = 1, threads: int, **variables: str
) -> Runner:
    """Starts the processes of one of the compared things; each loads its model at once."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(ranks),
        **variables,
    }
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
    return Runner(name, processes, log)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def runners(folder: Path, size: Size, python: Path | None, options: argparse.Namespace) -> list[Runner]:
    """All that is compared, loaded and ready, started one after the other."""
    ours, peers = TOOLS / "bench_step_ours.py", TOOLS / "bench_step_peers.py"
    work = {ranks: folder / f"work_{ranks}.json" for ranks in {1, options.threads}}
    for ranks, path in work.items():
        path.write_text(json.dumps({**make_work(folder, size, ranks=ranks), "compile": options.compile}))
    # without the variables of this environment: TRL's must not see this package's modules
    alone = {"PYTHONPATH": ""}
    commands: dict[str, dict[str, Any]] = {
        f"ours, {ranks} rank{'s' * (ranks > 1)}": {
            "command": [sys.executable, ours, "ours", path],
            "ranks": ranks,
            "threads": options.threads // ranks,
        }
        for ranks, path in sorted(work.items(), reverse=True)
    }
    shared = {"threads": options.threads}
    commands["TRL"] = {"command": [python, peers, "trl", work[1]], **shared, **alone}
    commands["transformers"] = {"command": [python, peers, "actor", work[1]], **shared, **alone}
    commands["vLLM"] = {"command": [sys.executable, ours, "vllm", work[1]], **shared}
    commands["vLLM for RL"] = {"command": [sys.executable, ours, "vllm_for_rl", work[1]], **shared}
    found = []
    try:
        for name, settings in commands.items():
            if name not in options.without:
                log = folder / f"{name.replace(', ', '_').replace(' ', '_')}.log"
                found.append(start(name, log=log, **settings))
                found[-1].listen()
                print(f"{size.name}: {name} is ready", file=sys.stderr)
    except BaseException:
        for runner in found:
            runner.close()
        raise
    return found


def measure(size: Size, python: Path | None, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All turns of one size: seconds by phase, by runner."""
    make_model(folder / "model", size)
    compared = runners(folder, size, python, options)
    try:
        for repeat in range(options.repeats + 1):  # the first turn warms up
            for runner in compared:
                answer = runner.step()
                if repeat:
                    runner.turns.append(answer)
            print(f"{size.name}: turn {repeat} of {options.repeats}", file=sys.stderr)
    finally:
        for runner in compared:
            runner.close()
    return {
        "size": size.name,
        "threads": options.threads,
        "rows": size.rows,
        "flops": flops(folder, size),
        "turns": {runner.name: runner.turns for runner in compared},
    }


# ---- the table --------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    """Median, smallest and largest."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


PHASES = ("sampling", "grading", "update", "sync", "other", "step")


def table(measured: dict[str, Any]) -> str:
    """Seconds and tokens a second by phase, CPU seconds, and ratios."""
    turns, floors = measured["turns"], _floors(measured)
    lines = [
        f"{measured['size']} parameters, {measured['rows']} rows, {measured['threads']} threads",
        f"{'':34}" + "".join(f"{phase:>24}" for phase in PHASES),
    ]
    for title, kind, digits in (
        ("seconds", "", 2),
        ("CPU seconds", "cpu ", 2),
        ("tokens a second", "rate ", 0),
    ):
        for name, answers in {**turns, "floor": floors}.items():
            found = answers if kind != "rate " else [_rates(measured["rows"], turn) for turn in answers]
            cells = [[turn[kind + phase] for turn in found if kind + phase in turn] for phase in PHASES]
            if any(cells):
                line = "".join(f"{spread(cell, digits) if cell else '':>24}" for cell in cells)
                lines.append(f"{title:18}{name:16}{line}")
    return "\n".join([*lines, *_ratios(turns, floors)])


def _rates(rows: int, turn: dict[str, float]) -> dict[str, float]:
    """Tokens a second: of responses, for the update of whole rows."""
    tokens = {"sampling": RESPONSE, "update": PROMPT + RESPONSE, "step": RESPONSE}
    return {f"rate {phase}": rows * each / turn[phase] for phase, each in tokens.items() if phase in turn}


def _floors(measured: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of the floating-point operations alone, turn by turn."""
    floors = []
    for turn in measured["turns"].get("transformers", []):
        seconds = {phase: count / turn["flops_per_second"] for phase, count in measured["flops"].items()}
        floors.append({**seconds, "step": sum(seconds.values())})
    return floors


def _ratios(turns: dict[str, list[dict[str, float]]], floors: list[dict[str, float]]) -> list[str]:
    """How many times as fast as each peer ours is, turn by turn."""
    lines = ["peer's seconds / ours, turn by turn: above 1 ours is faster"]
    pairs = [("TRL", phase) for phase in ("step", "sampling", "update")]
    pairs += [("transformers", "update"), ("vLLM", "sampling"), ("vLLM for RL", "sampling")]
    pairs += [("floor", phase) for phase in ("step", "sampling", "update")]
    for name in (name for name in turns if name.startswith("ours")):
        for peer, phase in pairs:
            theirs = floors if peer == "floor" else turns.get(peer, [])
            cells = [
                f"{kind or 'wall'} " + spread([p[kind + phase] / o[kind + phase] for p, o in both])
                for kind in ("", "cpu ")
                if (both := list(zip(theirs, turns[name], strict=False))) and kind + phase in both[0][0]
            ]
            if cells:
                lines.append(f"  {name} : {peer}, {phase}: {'; '.join(cells)}")
    return lines


def main() -> int:
    options = parse_arguments()
    if options.quick:
        options.repeats = 2
    wants_peers = not {"TRL", "transformers"} <= set(options.without)
    python = peer_python(options.cache) if wants_peers else None
    measured = []
    for name in options.sizes:
        with tempfile.TemporaryDirectory(prefix="copd-bench-") as folder:
            measured.append(measure(SIZES[name], python, options, Path(folder)))
        print(table(measured[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
