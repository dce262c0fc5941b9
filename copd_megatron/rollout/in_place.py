"""Loading weights straight into vLLM's parameters, if these have the same form as in a checkpoint.

vLLM's own ``reload_weights`` rebuilds every layer, loads it, processes it and copies it back. That is right
for any quantised or reordered weights, but moves and holds several times the bytes. A dense, unquantised
model needs none of it: its weight loaders can write into the live parameters.

The loaders look up each tensor's place by names and prefixes, which for the 400 tensors of a 4B model takes
as long as copying them within a GPU. So the first load records what is copied where, and later loads repeat
those copies.

On CPU, vLLM packs the weight of each linear layer for oneDNN and discards the plain one. ``prepare`` restores
the plain weights, and ``load`` packs them again after it has changed them. (Without packing, a tiny model
would lose a sixth of its sampling speed.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def prepare(worker: Any) -> bool:
    """Prepares the worker's model for loading in place, if its kind allows that. Runs inside the worker.

    Returns False, with the model unchanged, if it does not.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    methods = [(module, getattr(module, "quant_method", None)) for module in worker.get_model().modules()]
    if any(method is not None and not isinstance(method, plain) for _, method in methods):
        return False
    if torch.cuda.is_available():
        return True
    for module, method in methods:
        if isinstance(method, UnquantizedLinearMethod):
            info = get_layerwise_info(module)
            restore_layer_on_meta(module, info)
            materialize_layer(module, info)
    return True


@torch.no_grad()
def load(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a stream of (Hugging Face name, full-shape tensor) into the parameters. Runs inside the worker.

    Each tensor is read before the next one is requested.

    Raises:
        RuntimeError: the stream ended without some of the model's parameters.
    """
    model: nn.Module = worker.get_model()
    known = _PLACES.get(model)
    if known is not None and known.addresses == _addresses(model):
        missing = _repeat(known, weights)
    else:
        missing = _load_and_record(model, weights)
    if missing:
        raise RuntimeError(
            f"the weight stream ended without {len(missing)} of vLLM's parameters, the first: "
            f"{', '.join(missing[:5])}; do the weights in the model folder match its config.json?"
        )
    if not torch.cuda.is_available():
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in _multiplying(model):
            module.cpu_linear = torch.nn.functional.linear  # frees the memory of the old packing first
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


# ---- where tensors go ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """Part of a streamed tensor, and the part of a parameter to which it is copied."""

    target: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements, from the start of the streamed tensor."""


@dataclass(kw_only=True)
class _Places:
    """Everything that a model's loaders do with a stream of contiguous tensors."""

    addresses: list[int]
    """Of the parameters when this was recorded."""
    copies: dict[str, list[_Copy]] = field(default_factory=dict)
    """By Hugging Face name; empty if this rank keeps nothing of a tensor."""
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    """Shapes of the streamed tensors."""
    zeros: list[Tensor] = field(default_factory=list)
    """Padding, whose content is lost when the engine sleeps, as are the weights."""


_PLACES: WeakKeyDictionary[nn.Module, _Places] = WeakKeyDictionary()


def _addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def _repeat(known: _Places, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Repeats the recorded copies. Returns the names that the stream lacked."""
    awaited = set(known.copies)
    for name, value in weights:
        if value.shape != known.shapes.get(name):
            raise RuntimeError(
                f"the weight stream holds {name} {tuple(value.shape)}, the first stream had "
                f"{tuple(known.shapes.get(name, ())) or 'no such tensor'}"
            )
        awaited.discard(name)
        tensor = value.contiguous()
        for copy in known.copies[name]:
            part = tensor.as_strided(copy.shape, copy.stride, tensor.storage_offset() + copy.offset)
            copy.target.copy_(part)
    for target in known.zeros:
        target.zero_()
    return sorted(awaited)


def _load_and_record(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Runs vLLM's loaders and returns the parameters that they did not fill. Records what they did, if they
    did nothing but copy."""
    recorder = _Recorder(model)
    with recorder:
        loaded = model.load_weights(recorder.watched(weights))  # type: ignore[operator]
    if recorder.complete:
        _PLACES[model] = recorder.places
    return sorted({name for name, _ in model.named_parameters()} - loaded)


class _Recorder(TorchDispatchMode):
    """Observes every write to a parameter while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = _Places(addresses=_addresses(model))
        self._missing = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
        """Number of elements of each parameter that have not been written yet."""
        self._name, self._tensor = "", torch.empty(0)
        # parameters that share memory cannot be told apart
        self._only_copies = len(self._missing) == len(self.places.addresses)

    @property
    def complete(self) -> bool:
        """Whether the record covers every element of every parameter."""
        return self._only_copies and not any(self._missing.values())

    def watched(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream, noting which tensor is being loaded."""
        for name, value in weights:
            self._name, self._tensor = name, value.contiguous()
            self.places.copies[name], self.places.shapes[name] = [], value.shape
            yield name, self._tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # names of in-place operations end in an underscore
        if func.__name__.split(".")[0].endswith("_") and isinstance(args[0], Tensor):
            storage = args[0].untyped_storage().data_ptr()
            if storage in self._missing:
                self._missing[storage] -= args[0].numel()
                self._note(func, *args)
        return result

    def _note(self, func: Any, target: Tensor, *rest: Any) -> None:
        if func is torch.ops.aten.copy_.default and _within(rest[0], self._tensor):
            source = rest[0]
            copy = _Copy(
                target=target,
                shape=tuple(source.shape),
                stride=tuple(source.stride()),
                offset=source.storage_offset() - self._tensor.storage_offset(),
            )
            self.places.copies[self._name].append(copy)
        elif func is torch.ops.aten.zero_.default or (func is torch.ops.aten.fill_.Scalar and rest[0] == 0):
            self.places.zeros.append(target)
        else:
            self._only_copies = False


def _within(part: Tensor, whole: Tensor) -> bool:
    """Whether ``part`` is a view of ``whole``, which may itself be part of a larger storage."""
    first = part.storage_offset() - whole.storage_offset()
    last = first + sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return same and first >= 0 and last < whole.numel()


def _multiplying(model: nn.Module) -> Iterator[Any]:
    """Modules that multiply by a packed weight: linear layers and the output head."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, LinearBase | ParallelLMHead) and not getattr(
            module, "skip_weight_relayout", False
        ):
            yield module
