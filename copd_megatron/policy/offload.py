"""What the actor keeps in device memory only while it trains: gradients, optimizer states, weights (option).

While vLLM samples, an update's memory lies idle. ``Offloader.release`` moves it to host memory and gives the
device's back, ``restore`` undoes that. Tensors stay the same objects and keep their views: only the storage
beneath them is emptied and filled again, so Megatron's buffers and optimizer know nothing of it. Gradients
are not kept: an update begins with zeros.

Nothing here asks for a GPU. On CPU the same bookkeeping runs on the same Megatron objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OffloadReport:
    """Bytes that one ``release`` or ``restore`` moved on this rank."""

    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    weight_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.gradient_bytes + self.optimizer_bytes + self.weight_bytes


class ParkedTensors:
    """Storages whose content lies in host memory for a while."""

    def __init__(self) -> None:
        self._parked: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._host: dict[int, Tensor] = {}
        """Host memory by the storage's identity, taken once: pinning is slow."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are parked now."""
        return sum(host.numel() for _, host in self._parked)

    def park(self, tensors: Iterable[Tensor]) -> int:
        """Copies the storages beneath ``tensors`` to the host and empties them; returns their bytes.

        Raises:
            RuntimeError: something is parked already.
        """
        if self._parked:
            raise RuntimeError(f"{self.num_bytes} bytes are parked already; restore them first")
        for storage in _storages(tensors):
            size = storage.nbytes()
            host = self._host.get(storage._cdata)
            if host is None or host.numel() != size:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._host[storage._cdata] = host
            host.copy_(_bytes(storage), non_blocking=True)
            self._parked.append((storage, host))
        if any(storage.device.type == "cuda" for storage, _ in self._parked):
            torch.cuda.synchronize()
        for storage, _ in self._parked:
            storage.resize_(0)
        return self.num_bytes

    def restore(self) -> int:
        """Fills the storages again; returns their bytes, 0 where nothing is parked."""
        moved = self.num_bytes
        for storage, host in self._parked:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        self._parked = []
        return moved


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Each non-empty storage once."""
    seen = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Offloader:
    """One actor's share of a device, given back and taken again."""

    def __init__(
        self,
        modules: list[Any],
        optimizer: Any,
        device: torch.device,
        *,
        gradients: bool = True,
        states: bool = True,
        weights: bool = False,
    ) -> None:
        """``modules``: Megatron's ``DistributedDataParallel`` chunks; ``optimizer``: its optimizer over them.
        The flags say what leaves the device."""
        self._modules, self._optimizer, self._device = modules, optimizer, device
        self._gradients, self._moves_states, self._moves_weights = gradients, states, weights
        self._states, self._weights = ParkedTensors(), ParkedTensors()
        self.released = False
        """Whether gradients and optimizer states are away."""

    @property
    def weights_released(self) -> bool:
        return self._weights.num_bytes > 0

    def release(self) -> OffloadReport:
        """Gives back what only an update needs; nothing where that was done."""
        if self.released:
            return OffloadReport()
        gradients = 0
        if self._gradients:
            gradients = sum(_num_bytes(buffer.grad_data) for buffer in self._buffers())
            for module in self._modules:
                module.offload_grad_buffers(synchronize=self._on_cuda, empty_cache=False)
        states = self._states.park(self._state_tensors()) if self._moves_states else 0
        self.released = True
        self._empty_cache()
        return OffloadReport(gradient_bytes=gradients, optimizer_bytes=states)

    def restore(self) -> OffloadReport:
        """Takes it back, the gradients as zeros; weights too."""
        weights = self.restore_weights()
        if not self.released:
            return OffloadReport(weight_bytes=weights)
        gradients = 0
        if self._gradients:
            for module in self._modules:
                module.restore_grad_buffers(synchronize=self._on_cuda)
            gradients = sum(_num_bytes(buffer.grad_data) for buffer in self._buffers())
        states = self._states.restore()
        self.released = False
        return OffloadReport(gradient_bytes=gradients, optimizer_bytes=states, weight_bytes=weights)

    def release_weights(self) -> OffloadReport:
        """Moves the weights to the host, where the option is set and they are not there yet: for the time in
        which vLLM samples. Nobody may read them until ``restore_weights``."""
        if not self._moves_weights or self.weights_released:
            return OffloadReport()
        moved = self._weights.park(self._weight_tensors())
        self._empty_cache()
        return OffloadReport(weight_bytes=moved)

    def restore_weights(self) -> int:
        """Brings the weights back, where they are away; their bytes."""
        return self._weights.restore()

    def _buffers(self) -> Iterator[Any]:
        for module in self._modules:
            yield from module.buffers
            yield from module.expert_parallel_buffers

    def _weight_tensors(self) -> Iterator[Tensor]:
        """Weights in Megatron's buffers, and those beside them (frozen ones)."""
        for module in self._modules:
            for parameter in module.parameters():
                if parameter.device == self._device:
                    yield parameter.data
        for buffer in self._buffers():
            if buffer.param_data is not None:
                yield buffer.param_data

    def _state_tensors(self) -> Iterator[Tensor]:
        """Moments and master weights; not the model's own weights, which in float32 are the masters."""
        models = {tensor.untyped_storage()._cdata for tensor in self._weight_tensors()}
        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = optimizer.optimizer
            if inner is None:  # a rank without trainable weights
                continue
            groups = [parameter for group in inner.param_groups for parameter in group["params"]]
            states = [value for state in inner.state.values() for value in state.values()]
            for value in (*groups, *states):
                if isinstance(value, Tensor) and value.device == self._device and value.numel() > 1:
                    tensor = value.data
                    if tensor.untyped_storage()._cdata not in models:
                        yield tensor

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _empty_cache(self) -> None:
        """Gives the freed blocks back to the device, where vLLM's own allocator takes them."""
        if self._on_cuda:
            torch.cuda.empty_cache()


def _num_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().nbytes()
