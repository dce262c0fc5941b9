"""The one module that patches: what it changes, what it leaves alone, when it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_megatron.policy import cpu
from tests.support.distributed import run_distributed

needs_cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the module refuses a machine with CUDA"
)

PATCHED = ("current_device", "synchronize", "current_stream", "manual_seed", "get_rng_state", "set_rng_state")


def _results() -> dict[str, Any]:
    """What torch computes, from arithmetic to random numbers and devices."""
    torch.manual_seed(11)
    x = torch.randn(5, 7, requires_grad=True)
    layer = torch.nn.Linear(7, 3)
    loss = torch.nn.functional.silu(layer(x)).pow(2).mean()
    loss.backward()
    assert x.grad is not None
    return {
        "loss": loss.item(),
        "grad": x.grad.tolist(),
        "zeros": torch.zeros(2, device="cpu").tolist(),
        "type": x.detach().type(),
        "double": x.detach().type(torch.float64).tolist(),
        "random": torch.rand(3).tolist(),
        "to": x.detach().to("cpu").device.type,
    }


def _in_a_process_of_its_own() -> dict[str, Any]:
    from megatron.core.tensor_parallel import random as megatron_random

    names = [name for name in dir(torch.cuda) if not name.startswith("__")]
    before = {name: getattr(torch.cuda, name) for name in names}
    plain = _results()
    cpu.enable()
    once = {name: getattr(torch.cuda, name) for name in names}
    cpu.enable()
    twice = {name: getattr(torch.cuda, name) for name in names}
    enabled = _results()
    with cpu.cuda_to_cpu():
        inside = _results()
        mapped = {
            "zeros": torch.zeros(3, device="cuda").device.type,
            "indexed": torch.empty(3, device="cuda:0").device.type,
            "object": torch.tensor([1.0], device=torch.device("cuda")).device.type,
            "current": torch.ones(1, device=torch.cuda.current_device()).device.type,
            "to": torch.ones(1).to(device="cuda").device.type,
            "cuda": torch.ones(1).cuda().device.type,
            "type": torch.ones(1).type(),
            "integer type": torch.ones(1, dtype=torch.int64).type(),
        }
    torch.cuda.manual_seed(5)
    seeded = torch.rand(4)
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4)
    torch.cuda.set_rng_state(state)
    redrawn = torch.rand(4)
    after_context = None
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        after_context = type(error).__name__
    return {
        "changed": sorted(name for name in names if once[name] is not before[name]),
        "changed again": sorted(name for name in names if twice[name] is not once[name]),
        "plain": plain,
        "enabled": enabled,
        "inside": inside,
        "mapped": mapped,
        "seeded": torch.equal(seeded, drawn),
        "restored": torch.equal(drawn, redrawn),
        "megatron": torch.equal(megatron_random._get_cuda_rng_state(), torch.get_rng_state()),
        "still no cuda": after_context is not None and not torch.cuda.is_available(),
    }


@pytest.fixture(scope="module")
def process() -> dict[str, Any]:
    return run_distributed(_in_a_process_of_its_own, 1, megatron=True)[0]


@needs_cpu_only
def test_enable_replaces_the_named_functions_only_and_once(process: dict[str, Any]) -> None:
    assert set(process["changed"]) == set(PATCHED)
    assert set(process["changed again"]) <= {"current_device", "current_stream"}, "made anew, but alike"


@needs_cpu_only
def test_results_of_torch_do_not_change(process: dict[str, Any]) -> None:
    assert process["enabled"] == process["plain"]
    inside = dict(process["inside"])
    assert inside.pop("type") == "torch.cuda.FloatTensor"
    assert inside == {name: value for name, value in process["plain"].items() if name != "type"}


@needs_cpu_only
def test_context_maps_cuda_to_cpu(process: dict[str, Any]) -> None:
    mapped = dict(process["mapped"])
    assert mapped.pop("type") == "torch.cuda.FloatTensor"
    assert mapped.pop("integer type") == "torch.LongTensor"
    assert set(mapped.values()) == {"cpu"}


@needs_cpu_only
def test_cuda_generator_is_the_cpu_generator(process: dict[str, Any]) -> None:
    assert process["seeded"]
    assert process["restored"]
    assert process["megatron"]


@needs_cpu_only
def test_outside_the_context_cuda_stays_absent(process: dict[str, Any]) -> None:
    assert process["still no cuda"]


@needs_cpu_only
@pytest.mark.parametrize("unknown", ["0.20.0", "1.19.2", "0.1.9"])
def test_unknown_megatron_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str) -> None:
    """The version is read from installed metadata; a folder in front of it says otherwise."""
    metadata = tmp_path / f"megatron_core-{unknown}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {unknown}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = torch.cuda.current_device
    with pytest.raises(RuntimeError, match=rf"megatron-core {unknown} on CPU is untested.*requirements-cpu"):
        cpu.enable()
    assert torch.cuda.current_device is before


@pytest.mark.gpu
def test_enable_refuses_a_machine_with_cuda() -> None:
    with pytest.raises(RuntimeError, match=r"run\.device=cuda"):
        cpu.enable()
    with cpu.cuda_to_cpu():
        assert torch.zeros(1, device="cuda").is_cuda
