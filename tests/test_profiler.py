"""Windows of torch's profiler and of CUDA memory snapshots."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from copd_megatron.config.schema import ProfilingConfig
from copd_megatron.errors import ConfigError
from copd_megatron.metrics.profiler import ProfilerWindow
from copd_megatron.metrics.rank_log import RankPlace


def place(rank: int, branch: str = "text", branch_rank: int = 0, size: int = 2) -> RankPlace:
    return RankPlace(rank=rank, branch=branch, branch_rank=branch_rank, branch_size=size)


def test_the_profiler_records_its_window(tmp_path: Path) -> None:
    options = ProfilingConfig(torch_profiler=True, step_start=2, step_end=3, ranks=[5], record_shapes=True)
    for rank in (0, 5):
        window = ProfilerWindow(options, tmp_path, place(rank), cuda=False)
        for step in (1, 2, 3, 4):
            window.begin(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(64, 64) @ torch.ones(64, 64)
            window.end(step)
        window.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "text_rank_00005_steps_2-3.trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"step 2", "step 3", "aten::mm"} <= names and not {"step 1", "step 4"} & names
    # a run that is stopped inside the window writes what there is
    cut = ProfilerWindow(
        ProfilingConfig(torch_profiler=True, step_end=9), tmp_path / "cut", place(0), cuda=False
    )
    cut.begin(3)
    torch.ones(2).sum()
    cut.end(3)
    cut.close()
    assert [p.name for p in (tmp_path / "cut" / "profile").iterdir()] == [
        "text_rank_00000_steps_3-9.trace.json.gz"
    ]


def test_memory_snapshots_need_cuda(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profiling\.memory_snapshot: .* actors run on the CPU"):
        ProfilerWindow(ProfilingConfig(memory_snapshot=True), tmp_path, place(0), cuda=False)


@pytest.mark.gpu
def test_a_memory_snapshot_holds_the_windows_allocations(tmp_path: Path) -> None:
    import pickle

    window = ProfilerWindow(ProfilingConfig(memory_snapshot=True), tmp_path, place(0), cuda=True)
    window.begin(2)
    held = torch.empty(12_345_678, dtype=torch.uint8, device="cuda")
    window.end(2)
    (path,) = (tmp_path / "profile").iterdir()
    events = pickle.loads(path.read_bytes())["device_traces"][torch.cuda.current_device()]
    assert any(e["action"] == "alloc" and e["size"] >= held.numel() for e in events)
