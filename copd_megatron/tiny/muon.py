"""Muon in float32: momentum with orthogonalised updates (Jordan et al., 2024).

PyTorch's own version orthogonalises in bfloat16, which is slow on CPUs without support for it. For the
matrices of tiny models, Muon needs a fraction of Adam's steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a quintic Newton-Schulz iteration that moves singular values to about one, quickly rather than
exactly."""


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Maps [N, rows, columns] to matrices with the same singular vectors and singular values of 0.7 to
    1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For two-dimensional parameters. Updates are scaled to a root mean square of 0.2, as Adam's have."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon: a parameter has shape {tuple(parameter.shape)}. Muon updates matrices only; "
                        "use another optimizer for the rest."
                    )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all matrices, batched by shape. Raises ValueError if given a ``closure``."""
        if closure is not None:
            raise ValueError("Muon.step takes no closure: compute the gradients first.")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = orthogonalize(
                    torch.stack([self._nesterov(parameter, group["momentum"]) for parameter in parameters])
                )
                scale = 0.2 * max(shape) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(direction, alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)
