"""The supervised stage: a model imitates demonstrations. Independent of tasks, tokenizers and modalities.

A batch is a mapping with the model's inputs (``input_ids`` and, for a vision-language model, the output of
its processor), ``labels`` [B, T], aligned with ``input_ids`` and ``IGNORED`` at positions without loss, and
``normalizer``, the number of tokens by which the loss is divided.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copd_megatron.tiny.muon import Muon
from copd_megatron.tiny.recipe import WarmUpSettings
from copd_megatron.tiny.shares import ALONE, Share

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
IGNORED = -100
"""Label of positions without loss."""


@contextmanager
def reproducible(seed: int, num_threads: int) -> Iterator[None]:
    """Sets the number of threads, deterministic kernels and the seed of the generator; restores all
    afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


def pad_batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]], padding_id: int) -> dict[str, Tensor]:
    """Turns prompt and response ids into ``input_ids`` and ``labels`` [B, T], padded on the right. Only
    responses have a loss. With causal attention, padding on the right needs no mask."""
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), length), padding_id)
    labels = torch.full((len(rows), length), IGNORED)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, :end] = torch.tensor([*prompt, *response])
        labels[index, len(prompt) : end] = torch.tensor(response)
    return {"input_ids": input_ids, "labels": labels}


def imitation_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token cross-entropy, summed over the labelled tokens and divided by ``normalizer``."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "normalizer")}
    logits = model(**inputs, use_cache=False).logits
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return total / batch["normalizer"]


def optimizers(model: nn.Module, settings: WarmUpSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, Adam for embeddings, norms, biases and convolutions."""
    embeddings = {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters()
    }
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=settings.matrix_lr),
        torch.optim.Adam(others, lr=settings.vector_lr, betas=(0.9, 0.98)),
    ]


def lr_factor(step: int, num_steps: int, settings: WarmUpSettings) -> float:
    """Rises linearly over ``lr_warmup_steps``, then falls linearly to ``final_lr_fraction`` at
    ``num_steps``."""
    rise = min(1.0, (step + 1) / max(1, settings.lr_warmup_steps))
    return rise * max(settings.final_lr_fraction, 1.0 - step / max(1, num_steps))


def warm_up(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: WarmUpSettings,
    report: Callable[[int, float], None] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = imitation_loss,
    share: Share = ALONE,
) -> list[float]:
    """Trains ``model`` in place for ``settings.num_steps`` steps of one batch each. Returns the losses.

    Args:
        report: called as ``report(step, loss)`` after every step.
        loss: of this process's share of a batch, divided by the whole batch's ``normalizer``.
        share: this process's; all processes call this with equal models.

    Within ``reproducible``, the seed determines the weights.

    Raises:
        ValueError: ``batches`` ends early.
        RuntimeError: the loss is not finite.
        ShareError: another process ended.
    """
    model.train()
    updaters = optimizers(model, settings)
    peak_lrs = [[group["lr"] for group in updater.param_groups] for updater in updaters]
    losses: list[float] = []
    parameters = list(model.parameters())
    started = time.monotonic()
    source = iter(batches)
    for step in range(settings.num_steps):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step} of {settings.num_steps} steps. Provide more.")
        model.zero_grad(set_to_none=True)
        value = loss(model, batch)
        value.backward()
        losses.append(share.add_up(step, value, parameters))
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        factor = lr_factor(step, settings.num_steps, settings)
        for updater, lrs in zip(updaters, peak_lrs, strict=True):
            for group, lr in zip(updater.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
            updater.step()
        if losses[-1] != losses[-1] or losses[-1] == float("inf"):
            raise RuntimeError(
                f"warm-up: loss {losses[-1]} at step {step}. Lower matrix_lr or vector_lr in the recipe."
            )
        if report is not None:
            report(step, losses[-1])
    model.zero_grad(set_to_none=True)
    model.eval()
    logger.info("warm-up: %d steps in %.1f s", settings.num_steps, time.monotonic() - started)
    return losses
