"""Loading weights straight into vLLM's parameters, where those lie as a checkpoint has them.

vLLM's own ``reload_weights`` builds every layer anew, loads, processes and copies it back: right for any
quantised or shuffled layout, but several times the bytes in traffic and memory. A dense, unquantised model
needs none of that: its loaders can write into the live parameters.

On CPU, vLLM packs each linear layer's weight for oneDNN and throws the plain one away. ``prepare`` gives the
layers their plain weights back, and ``load`` packs them again once they are new. (Going without the packing
would cost a tiny model a sixth of its sampling speed.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def prepare(worker: Any) -> bool:
    """Makes the worker's model loadable in place, if it is of a kind that can be; runs inside the worker.

    False leaves the model as it was.
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
    """Writes a stream of (Hugging Face name, full-shape tensor) into the parameters; runs inside the worker.

    Each tensor is read before the next is asked for.

    Raises:
        RuntimeError: the stream ended without something that the model has.
    """
    model: nn.Module = worker.get_model()
    loaded = model.load_weights(weights)  # type: ignore[operator]
    if missing := sorted({name for name, _ in model.named_parameters()} - loaded):
        raise RuntimeError(
            f"the weight stream ended without {len(missing)} of vLLM's parameters, the first: "
            f"{', '.join(missing[:5])}; does the model in the folder fit its config.json?"
        )
    if not torch.cuda.is_available():
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in _multiplying(model):
            module.cpu_linear = torch.nn.functional.linear  # gives the old packing's memory back first
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _multiplying(model: nn.Module) -> Iterator[Any]:
    """The modules that multiply by a packed weight: linear layers and the output head."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, LinearBase | ParallelLMHead) and not getattr(
            module, "skip_weight_relayout", False
        ):
            yield module
