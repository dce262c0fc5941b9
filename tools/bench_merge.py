#!/usr/bin/env python3
"""Time and peak memory of merging, ours against mergekit's: same checkpoints, same disk, same run.

    python tools/bench_merge.py --size-gb 1 --size-gb 4 --models 3 --methods linear,ties --repeats 3

Makes synthetic Qwen3 checkpoints in bfloat16 (a base and K branches near it), merges them with both, turn and
turn about, and removes everything. Peak memory is the largest sum of resident memory over the process tree,
sampled; the anonymous part (without mapped files) beside it. Each turn also copies as many bytes as a merge
reads and writes, and times it: the rate that bounds any merge. mergekit is installed into an environment of
its own.

The last line reads ``time_ratio=... peak_memory_ratio=...``: ours over mergekit's, geometric means over
methods and sizes of the medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from _numbers import amount, count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".cache" / "mergekit-venv"
MERGEKIT = "mergekit==0.1.5"
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Turn:
    """One program's run."""

    seconds: float
    peak_bytes: int
    """Resident, whole process tree."""
    anonymous_bytes: int
    """Of it, not backed by files."""
    cpu_seconds: float


@dataclass(frozen=True)
class Result:
    """All turns of one method at one size."""

    method: str
    size_gb: float
    ours: list[Turn]
    theirs: list[Turn]
    copy_bytes_per_second: list[float]

    def ratio(self, field: str) -> float:
        """Ours over theirs, medians."""
        ours, theirs = (
            statistics.median(getattr(turn, field) for turn in turns) for turns in (self.ours, self.theirs)
        )
        return ours / theirs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=amount, action="append", help="of each checkpoint; default 1 and 4")
    parser.add_argument("--models", type=count, default=3, help="branches, K")
    parser.add_argument("--methods", default="linear,task_arithmetic,ties", help="of both programs")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--shard-gb", type=amount, default=2.0, help="size of the inputs' and outputs' files")
    parser.add_argument("--threads", type=count, help="ours; default all cores (mergekit: torch's default)")
    parser.add_argument(
        "--folder", type=Path, help="where to work, on the disk to measure; default the system's"
    )
    parser.add_argument("--json", type=Path, help="write all figures here too")
    return parser.parse_args(arguments)


def shapes(size_bytes: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A Qwen3 in bfloat16 of about that size: 0.6B's shape below 2 GB, 1.7B's above, as deep as it takes."""
    hidden, ffn = (1024, 3072) if size_bytes < 2e9 else (2048, 6144)
    queries, keys, head, vocab = 2048, 1024, 128, 50_000
    layer = 2 * hidden * (queries + keys) + 3 * hidden * ffn + 2 * hidden + 2 * head
    depth = max(1, round((size_bytes / 2 - vocab * hidden) / layer))
    yield "model.embed_tokens.weight", (vocab, hidden)
    for number in range(depth):
        prefix = f"model.layers.{number}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "self_attn.q_norm.weight", (head,)
        yield prefix + "self_attn.k_norm.weight", (head,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (ffn, hidden)
        yield prefix + "mlp.up_proj.weight", (ffn, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)


def make_checkpoint(folder: Path, size_bytes: float, shard_bytes: float, *, branch: int) -> int:
    """Writes one checkpoint (branch 0: the base); returns its bytes. Noise is of 20,000,003 numbers repeated:
    the values do not matter, their spread does."""
    import torch

    from copd_megatron.formats.hf import HFSink
    from copd_megatron.hf.tensors import TensorSpec, block_range

    folder.mkdir(parents=True)
    tensors = dict(shapes(size_bytes))
    depth = sum(name.endswith("q_proj.weight") for name in tensors)
    hidden = tensors["model.norm.weight"][0]
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen3ForCausalLM"],
                "model_type": "qwen3",
                "hidden_size": hidden,
                "intermediate_size": tensors["model.layers.0.mlp.up_proj.weight"][0],
                "num_hidden_layers": depth,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": tensors["model.embed_tokens.weight"][0],
                "tie_word_embeddings": True,
                "torch_dtype": "bfloat16",
            }
        )
    )
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20_000_003, generator=generator) * 0.02
    moved = torch.randn(20_000_003, generator=generator.manual_seed(100 + branch)) * 0.001
    values = (noise + moved if branch else noise).bfloat16()
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in sorted(tensors.items())]
    sink = HFSink.of(folder, specs, int(shard_bytes))
    position = 0
    for index, shard in enumerate(sink.shards):
        writer = sink.open(index)
        for spec in shard:
            for block in range(spec.num_blocks):
                start, stop = block_range(spec, block)
                position = position if position + stop - start <= len(values) else 0
                writer.write(spec.name, start, values[position : position + stop - start])
                position += stop - start
        writer.close()
    sink.finish()
    return sum(spec.num_bytes for spec in specs)


def write_recipe(path: Path, method: str, base: Path, branches: Sequence[Path]) -> None:
    lines = [f"merge_method: {method}"]
    if method != "linear":
        lines.append(f"base_model: {base}")
    lines.append("models:")
    for branch in branches if method != "slerp" else branches[:1]:
        lines.append(f"  - model: {branch}")
        if method != "slerp":
            lines += ["    parameters:", "      weight: 0.4"]
        if method in ("ties", "dare_linear", "dare_ties"):
            lines.append("      density: 0.5")
    if method == "slerp":
        lines += ["parameters:", "  t: 0.4"]
    path.write_text("\n".join([*lines, "dtype: bfloat16"]) + "\n")


def measure(command: Sequence[str], environment: dict[str, str]) -> Turn:
    """Runs a program and watches its process tree.

    Raises:
        RuntimeError: it failed.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        peak = _Peak(process.pid)
        status = os.wait4(process.pid, 0)
        peak.stop()
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status[1])
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}): {log.read()[-2000:]}")
    used = status[2]
    # For a single process the system's own record is exact; sampling could miss a spike.
    resident = max(peak.resident, used.ru_maxrss * 1024)
    return Turn(seconds, resident, peak.anonymous, used.ru_utime + used.ru_stime)


class _Peak:
    """Samples the resident memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        self.resident = self.anonymous = 0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            found = [_memory(pid) for pid in _tree(self._pid)]
            self.resident = max(self.resident, sum(total for total, _ in found))
            self.anonymous = max(self.anonymous, sum(total - shared for total, shared in found))


def _tree(pid: int) -> list[int]:
    pids = [pid]
    for known in pids:
        try:
            for task in Path(f"/proc/{known}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return pids


def _memory(pid: int) -> tuple[int, int]:
    """Resident bytes, and how many of them are backed by files or shared."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(fields[1]) * _PAGE, int(fields[2]) * _PAGE


def copy_rate(sources: Sequence[Path], target: Path, size: int) -> float:
    """Bytes per second of plain copying on this disk, now: reads all inputs, writes ``size`` bytes."""
    buffer, read, written = bytearray(4 * 2**20), 0, 0
    begin = time.perf_counter()
    with target.open("wb") as out:
        for source in sources:
            for file in sorted(source.glob("*.safetensors")):
                with file.open("rb", buffering=0) as data:
                    while count := data.readinto(buffer):
                        read += count
                        if written < size:
                            written += out.write(memoryview(buffer)[:count])
    seconds = time.perf_counter() - begin
    target.unlink()
    return (read + written) / seconds


def bench(arguments: argparse.Namespace, size_gb: float, folder: Path) -> list[Result]:
    """All methods at one size."""
    shard_bytes = arguments.shard_gb * 1e9
    names = ["base", *(f"branch{k}" for k in range(arguments.models))]
    size = 0
    for number, name in enumerate(names):
        size = make_checkpoint(folder / name, size_gb * 1e9, shard_bytes, branch=number)
    print(f"{arguments.models} branches and a base of {size / 1e9:.2f} GB each in {folder}", flush=True)
    base, *branches = (folder / name for name in names)
    results = []
    for method in arguments.methods.split(","):
        recipe, out = folder / f"{method}.yaml", folder / "out"
        write_recipe(recipe, method, base, branches)
        ours = [sys.executable, str(ROOT / "tools" / "merge_branches.py"), str(recipe), "--out", str(out)]
        ours += ["--shard-size", str(int(shard_bytes))]
        ours += ["--threads", str(arguments.threads)] if arguments.threads else []
        theirs = [
            str(VENV / "bin" / "mergekit-yaml"),
            str(recipe),
            str(out),
            "--no-write-model-card",
            "--quiet",
        ]
        theirs += ["--no-copy-tokenizer", "--out-shard-size", str(int(shard_bytes))]
        inputs = branches if method == "linear" else [base, *branches]
        inputs = inputs[:2] if method == "slerp" else inputs
        turns: dict[str, list[Turn]] = {"ours": [], "mergekit": []}
        rates = []
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
            "HF_HUB_OFFLINE": "1"
        }
        for repeat in range(arguments.repeats):
            # Leaves the inputs in the page cache, as far as they fit, for both alike.
            rates.append(copy_rate(inputs, folder / "copy", size))
            # Who is first in a turn finds the cache as the other left it: take turns at that as well.
            order = [("ours", ours), ("mergekit", theirs)]
            for who, command in order if repeat % 2 == 0 else order[::-1]:
                turns[who].append(measure(command, environment))
                shutil.rmtree(out)
        results.append(Result(method, size / 1e9, turns["ours"], turns["mergekit"], rates))
        print(describe(results[-1], len(inputs)), flush=True)
    return results


def describe(result: Result, num_inputs: int) -> str:
    """A few lines on one method."""

    def spread(values: Sequence[float], digits: int = 2) -> str:
        low, high = min(values), max(values)
        return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    moved = (num_inputs + 1) * result.size_gb
    lines = [f"{result.method}, {num_inputs} x {result.size_gb:.2f} GB"]
    for who, turns in (("ours", result.ours), ("mergekit", result.theirs)):
        lines.append(
            f"  {who:9} {spread([t.seconds for t in turns])} s, "
            f"CPU {spread([t.cpu_seconds for t in turns])} s, "
            f"peak {spread([t.peak_bytes / 1e9 for t in turns])} GB, without files "
            f"{spread([t.anonymous_bytes / 1e9 for t in turns])} GB"
        )
    copying = moved * 1e9 / statistics.median(result.copy_bytes_per_second)
    ours = statistics.median(turn.seconds for turn in result.ours)
    cores = len(os.sched_getaffinity(0))
    busy = statistics.median(turn.cpu_seconds / turn.seconds for turn in result.ours) / cores
    lines.append(
        f"  bound     copying these {moved:.1f} GB takes {copying:.2f} s at "
        f"{spread([rate / 1e9 for rate in result.copy_bytes_per_second])} GB/s, {copying / ours:.0%} of our "
        f"time; we keep {busy:.0%} of {cores} cores busy: "
        f"{'the disk' if copying / ours > busy else 'the processor'} decides"
    )
    pairs = [a.seconds / b.seconds for a, b in zip(result.ours, result.theirs, strict=True)]
    peaks = [a.peak_bytes / b.peak_bytes for a, b in zip(result.ours, result.theirs, strict=True)]
    lines.append(f"  ratios    time {spread(pairs, 3)}, peak memory {spread(peaks, 3)}")
    return "\n".join(lines)


def ensure_mergekit() -> None:
    """Installs mergekit into its environment if it is not there.

    Raises:
        RuntimeError: no uv, or it cannot install.
    """
    if (VENV / "bin" / "mergekit-yaml").is_file():
        return
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise RuntimeError("bench_merge.py: mergekit's environment needs uv; install uv")
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(VENV)],
        [uv, "pip", "install", "--quiet", "--python", str(VENV / "bin" / "python"), MERGEKIT],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            raise RuntimeError(f"bench_merge.py: {' '.join(command)} failed: {done.stderr[-500:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse_arguments(argv)
    sizes = arguments.size_gb or [1.0, 4.0]
    needed = (max(sizes) * (arguments.models + 3) + 1) * 1e9
    work = Path(tempfile.mkdtemp(prefix="bench_merge_", dir=arguments.folder))
    results: list[Result] = []
    try:
        if shutil.disk_usage(work).free < needed:
            print(f"bench_merge.py: needs {needed / 1e9:.0f} GB free in {work.parent}", file=sys.stderr)
            return 2
        ensure_mergekit()
        for size in sizes:
            results += bench(arguments, size, work / f"{size:g}gb")
            shutil.rmtree(work / f"{size:g}gb")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(r) for r in results], default=vars, indent=2) + "\n")
    times, peaks = (
        math.exp(statistics.fmean(math.log(result.ratio(field)) for result in results))
        for field in ("seconds", "peak_bytes")
    )
    print(f"time_ratio={times:.3f} peak_memory_ratio={peaks:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
