"""Megatron-Core on a CPU: the only module that patches anything.

Megatron-Core 0.19 trains correctly over Gloo, but a few places name CUDA outright: bookkeeping tensors made
with ``device="cuda"``, ``torch.cuda.current_device()`` as the device of new buffers, the CUDA generator as
the source of random states, and parameter sorting by the type string ``torch.cuda.FloatTensor``. This
module answers those calls with the CPU. Upstream: Megatron-LM ``optimizer/optimizer.py``,
``pipeline_parallel/schedules.py``, ``tensor_parallel/random.py`` (core v0.19). It goes once they take the
device from the parameters. Nothing here changes a number: the same kernels of torch run, on CPU tensors.

Two parts:

``enable()``     once per process: torch.cuda's device query, synchronisation and random state.
``cuda_to_cpu()``  a context around the calls into Megatron that make CUDA tensors (schedules, optimizer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SUPPORTED = ("0.19.",)


def enable() -> None:
    """Point torch.cuda's device, synchronisation and generator calls at the CPU. Idempotent.

    Raises:
        RuntimeError: on a machine with CUDA, or under a Megatron-Core that this was not written for.
    """
    if torch.cuda.is_available():
        raise RuntimeError("policy.cpu.enable() on a machine with CUDA: set run.device=cuda")
    core = version("megatron-core")
    if not core.startswith(SUPPORTED):
        raise RuntimeError(
            f"megatron-core {core} on CPU is untested: this module knows {', '.join(SUPPORTED)}x. "
            "Install the pinned version (requirements-cpu.txt)"
        )
    from megatron.core.tensor_parallel import random as megatron_random

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = _nothing
    torch.cuda.current_stream = lambda *args: None  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = _set_rng_state
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state


def _nothing(*args: Any, **kwargs: Any) -> None:
    """There is nothing to wait for on a CPU."""


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


class _CudaToCpu(TorchFunctionMode):
    """Factory calls for CUDA make CPU tensors; ``.cuda()`` is the identity; type strings say CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _TYPE_NAMES.get(args[0].dtype) or func(*args)
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_to_cpu() -> Iterator[None]:
    """Context for calls into Megatron that name CUDA; does nothing where CUDA exists."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaToCpu():
        yield
