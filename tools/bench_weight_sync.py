#!/usr/bin/env python3
"""Time the live weight sync against a plain copy of the same bytes and against the way through the disk.

    python tools/bench_weight_sync.py                                  about 400 MiB, TP 2, vLLM TP 1 and 2
    python tools/bench_weight_sync.py --tp 1 --pp 2 --rollout-tp 1 --size-mib 800 --json

Starts its own ranks, makes a random Qwen3-shaped model, and on the same ranks, in turn, ``--repeats`` times:

* live: Megatron shards to vLLM shards, as after every training step
* copy: ``Tensor.copy_`` of as many bytes as vLLM takes in on each rank
* disk: export to a Hugging Face folder, flushed and out of the page cache, then vLLM loads that folder
* page cache: the same without the flush, so that the bytes may never have met a disk

Times are those of the slowest rank. GB/s counts the bytes that vLLM takes in on all ranks (1 GB = 1e9 bytes).
Extra memory is the largest rise of one rank during a sync: resident set on CPU, torch's allocator on CUDA.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _numbers import amount, count

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mib", type=count, default=400, help="weights, in the type they are held in")
    parser.add_argument("--hidden", type=count, default=1024)
    parser.add_argument("--vocab", type=count, default=16384)
    parser.add_argument("--tied", action="store_true", help="tie the output head to the embedding")
    parser.add_argument("--tp", type=count, default=2)
    parser.add_argument("--pp", type=count, default=1)
    parser.add_argument("--dp", type=count, default=1)
    parser.add_argument("--rollout-tp", type=count, nargs="+", default=None, help="default: 1 and all ranks")
    parser.add_argument("--bucket-mib", type=amount, default=32.0)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the models; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# ---- one launch, measured on its ranks -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one layout gave; seconds of the slowest rank, one entry per repeat."""

    layout: str
    device: str
    num_ranks: int
    model_bytes: int
    loaded_bytes: int
    """Taken in by vLLM, all ranks together."""
    received_bytes: int
    """Of those, bytes that crossed between ranks."""
    bucket_bytes: int
    """As configured."""
    largest_bucket_bytes: int
    """As planned: above the former only where one fused parameter is larger."""
    live_seconds: list[float]
    stream_seconds: list[float]
    """The same pass with nobody loading: what the transport alone takes."""
    copy_seconds: list[float]
    export_seconds: list[float]
    flush_seconds: list[float]
    """Until the export is on the device, and out of the page cache."""
    cold_load_seconds: list[float]
    """vLLM takes in the folder from the device."""
    warm_load_seconds: list[float]
    """The same from the page cache."""
    extra_bytes: list[int]
    """Rise of the most affected rank during a sync."""
    stream_extra_bytes: list[int]
    """The same while only streaming: what of it is the sync's own."""

    @property
    def disk_seconds(self) -> list[float]:
        parts = zip(self.export_seconds, self.flush_seconds, self.cold_load_seconds, strict=True)
        return [sum(part) for part in parts]

    @property
    def page_cache_seconds(self) -> list[float]:
        return [a + b for a, b in zip(self.export_seconds, self.warm_load_seconds, strict=True)]


class _MemoryProbe:
    """Largest rise of this process's memory since ``start``."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        self._before = 0
        self._libc = None if on_cuda else ctypes.CDLL(None)

    def start(self) -> None:
        if self.on_cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        assert self._libc is not None
        # memory that the allocator kept from before would hide what is taken now
        self._libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")

    def rise(self) -> int:
        if self.on_cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self._before
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _slowest(action: Callable[[], object], on_cuda: bool) -> float:
    """Seconds of the slowest rank, all starting together."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    begin = time.perf_counter()
    action()
    if on_cuda:
        torch.cuda.synchronize()
    seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _sum(value: int) -> int:
    import torch
    import torch.distributed as dist

    total = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def _max(value: int) -> int:
    import torch
    import torch.distributed as dist

    largest = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def measure(arguments: argparse.Namespace, folder: Path, rollout_tp: int) -> Measurement:
    """Runs on every rank of a launch; the same on each."""
    import torch
    import torch.distributed as dist

    from copd_megatron.config.schema import ParallelConfig, RolloutConfig, TrainingConfig, WeightSyncConfig
    from copd_megatron.hf.folder import HFFolder
    from copd_megatron.policy.actor import MegatronActor
    from copd_megatron.rollout.engine import RolloutEngine
    from copd_megatron.weight_sync.export import export_hf
    from copd_megatron.weight_sync.sync import WeightSync

    on_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    actor = MegatronActor(
        model_path=folder,
        parallel=ParallelConfig(
            tensor_model_parallel_size=arguments.tp,
            pipeline_model_parallel_size=arguments.pp,
            data_parallel_size=arguments.dp,
        ),
        training=TrainingConfig(),
        optimizer=None,
        dtype=dtype,
        max_tokens=256,
        temperature=1.0,
        seed=1,
        total_steps=1,
    )
    engine = RolloutEngine(
        model_path=folder,
        config=RolloutConfig(tensor_parallel_size=rollout_tp, max_new_tokens=8, gpu_memory_utilization=0.3),
        branch="bench",
        run_id="bench",
        dtype=dtype,
        max_tokens=256,
        seed=1,
    )
    sync = WeightSync(actor, engine, WeightSyncConfig(bucket_bytes=int(arguments.bucket_mib * MIB)))
    sync()
    loaded = sync.stream.filled_bytes
    source = torch.ones(loaded, dtype=torch.uint8, device=actor.device)
    target = torch.zeros_like(source)
    out = folder.with_name(f"{folder.name}-export")

    def drain() -> None:
        for _ in sync.stream.buckets_filled():
            pass

    def load() -> None:
        engine.load_weights(HFFolder(out).iterate(), version=0)

    drain()
    probe = _MemoryProbe(on_cuda)
    times: dict[str, list[float]] = {
        name: [] for name in ("live", "stream", "copy", "export", "warm", "flush", "cold")
    }
    rises: dict[str, list[int]] = {"live": [], "stream": []}
    for _ in range(arguments.repeats):
        for name, action in (("live", sync), ("stream", drain)):
            probe.start()
            times[name].append(_slowest(action, on_cuda))
            rises[name].append(_max(probe.rise()))
        times["copy"].append(_slowest(lambda: target.copy_(source), on_cuda))
        times["export"].append(_slowest(lambda: export_hf(actor, out, source=folder), on_cuda))
        times["warm"].append(_slowest(load, on_cuda))
        times["flush"].append(_slowest(lambda: _to_device(out), on_cuda))
        times["cold"].append(_slowest(load, on_cuda))
    result = Measurement(
        layout=f"TP {arguments.tp} x PP {arguments.pp} x DP {arguments.dp} -> vLLM TP {rollout_tp}",
        device=torch.cuda.get_device_name() if on_cuda else "cpu",
        num_ranks=dist.get_world_size(),
        model_bytes=sum(spec.num_bytes for layout in HFFolder(folder).layouts for spec in layout.specs),
        loaded_bytes=_sum(loaded),
        received_bytes=_sum(sync.stream.received_bytes),
        bucket_bytes=int(arguments.bucket_mib * MIB),
        largest_bucket_bytes=max(
            sum(_numel(slot.shape) for slot in bucket.slots) * dtype.itemsize
            for bucket in sync.stream.buckets
        ),
        live_seconds=times["live"],
        stream_seconds=times["stream"],
        copy_seconds=times["copy"],
        export_seconds=times["export"],
        flush_seconds=times["flush"],
        cold_load_seconds=times["cold"],
        warm_load_seconds=times["warm"],
        extra_bytes=rises["live"],
        stream_extra_bytes=rises["stream"],
    )
    dist.barrier()
    dist.destroy_process_group()
    return result


def _to_device(folder: Path) -> None:
    """Waits until the first rank's files have left the page cache for the device."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


# ---- the model, the launches, the table -----------------------------------------------------------------


def make_model(folder: Path, *, size_bytes: int, hidden: int, vocab: int, tied: bool, multiple: int) -> int:
    """Writes a random Qwen3 of about ``size_bytes``: as many layers as that takes, a multiple of
    ``multiple``. Returns its bytes."""
    import torch
    from transformers import Qwen3Config

    from copd_megatron.hf.model_config import read_model_shape
    from copd_megatron.hf.planned_file import write_safetensors
    from copd_megatron.model.slots import slots
    from copd_megatron.tiny.tokenizer import build_tokenizer

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    folder.mkdir(parents=True, exist_ok=True)
    heads, head_dim = hidden // 64, 64
    per_layer = hidden * (2 * heads + 2 * (heads // 2)) * head_dim + 3 * hidden * 3 * hidden
    embeddings = hidden * vocab * (1 if tied else 2)
    layers = round((size_bytes / dtype.itemsize - embeddings) / per_layer / multiple) * multiple
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=max(layers, multiple),
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=1024,
    )
    config.save_pretrained(folder)
    build_tokenizer(vocab).save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", {"placeholder": torch.zeros(1)})
    shape = read_model_shape(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        slot.name: (torch.randn(slot.shape, generator=generator) * 0.02).to(dtype) for slot in slots(shape, 1)
    }
    write_safetensors(folder / "model.safetensors", tensors)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def launch(arguments: argparse.Namespace, folder: Path, rollout_tp: int) -> Measurement:
    """One torchrun of this file's ranks."""
    result = folder.with_name(f"rollout-tp-{rollout_tp}.json")
    ranks = arguments.tp * arguments.pp * arguments.dp
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--worker", str(result), "--folder", str(folder), "--rollout-tp", str(rollout_tp)]
    for name in ("tp", "pp", "dp", "bucket_mib", "repeats"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    return Measurement(**json.loads(result.read_text()))


def _spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(results: list[Measurement]) -> str:
    """Median [least, largest] over the repeats; one column per layout."""

    def rate(m: Measurement, seconds: list[float]) -> str:
        return f"{m.loaded_bytes / 1e9 / statistics.median(seconds):.2f}"

    def ratio(over: list[float], under: list[float]) -> str:
        return f"{statistics.median(over) / statistics.median(under):.2f}"

    def mib(count: float) -> str:
        return f"{count / MIB:.1f}"

    def extra(m: Measurement, values: list[int]) -> str:
        median = statistics.median(values)
        return (
            f"{mib(median)} [{mib(min(values))}, {mib(max(values))}] = {median / m.bucket_bytes:.2f} buckets"
        )

    rows: list[tuple[str, Callable[[Measurement], Any]]] = [
        ("device", lambda m: m.device),
        ("ranks", lambda m: m.num_ranks),
        ("model MiB", lambda m: mib(m.model_bytes)),
        ("taken in by vLLM, all ranks, MiB", lambda m: mib(m.loaded_bytes)),
        ("crossing between ranks, MiB", lambda m: mib(m.received_bytes)),
        ("bucket MiB (largest planned)", lambda m: f"{mib(m.bucket_bytes)} ({mib(m.largest_bucket_bytes)})"),
        ("repeats", lambda m: len(m.live_seconds)),
        ("live sync, s", lambda m: _spread(m.live_seconds)),
        ("  of which streaming alone, s", lambda m: _spread(m.stream_seconds)),
        ("plain copy, s", lambda m: _spread(m.copy_seconds)),
        ("disk: export, s", lambda m: _spread(m.export_seconds)),
        ("  flush, s", lambda m: _spread(m.flush_seconds)),
        ("  vLLM loads from the device, s", lambda m: _spread(m.cold_load_seconds)),
        ("  vLLM loads from the page cache, s", lambda m: _spread(m.warm_load_seconds)),
        ("live sync, GB/s", lambda m: rate(m, m.live_seconds)),
        ("plain copy, GB/s", lambda m: rate(m, m.copy_seconds)),
        ("live / copy", lambda m: ratio(m.live_seconds, m.copy_seconds)),
        ("disk / live", lambda m: ratio(m.disk_seconds, m.live_seconds)),
        ("page cache / live", lambda m: ratio(m.page_cache_seconds, m.live_seconds)),
        ("extra memory of a sync, MiB", lambda m: extra(m, m.extra_bytes)),
        ("  of which streaming, MiB", lambda m: extra(m, m.stream_extra_bytes)),
    ]
    cells = [["", *(m.layout for m in results)]]
    cells += [[name, *(str(value(m)) for m in results)] for name, value in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker is not None:
        result = measure(arguments, arguments.folder, arguments.rollout_tp[0])
        if int(os.environ["RANK"]) == 0:
            arguments.worker.write_text(json.dumps(asdict(result)))
        return 0
    ranks = arguments.tp * arguments.pp * arguments.dp
    with tempfile.TemporaryDirectory(prefix="bench_weight_sync_", dir=arguments.folder) as scratch:
        folder = Path(scratch) / "model"
        make_model(
            folder,
            size_bytes=arguments.size_mib * MIB,
            hidden=arguments.hidden,
            vocab=arguments.vocab,
            tied=arguments.tied,
            multiple=arguments.pp,
        )
        sizes = arguments.rollout_tp or sorted({1, ranks})
        results = [launch(arguments, folder, rollout_tp) for rollout_tp in sizes]
    print(json.dumps([asdict(m) for m in results], indent=2) if arguments.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
