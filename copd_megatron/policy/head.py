"""Log-probabilities, entropy and top-k from hidden states, vocab-parallel and in chunks.

The output layer is applied to the wanted positions only, ``chunk_tokens`` rows at a time, and its logits are
thrown away again; the backward pass recomputes them chunk by chunk. So at no time does a float32
``[tokens, vocab]`` tensor of the batch exist: the peak is ``chunk_tokens x vocab / tp`` floats.

Shape legend: ``N`` positions, ``H`` hidden, ``Vp`` vocabulary entries of this tensor-parallel rank
(padding included), ``V`` the model's vocabulary (without padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.objectives.divergence import Measure, Targets


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Where this rank's slice of the vocabulary lies."""

    group: dist.ProcessGroup | None
    """Tensor-parallel group; None: one rank."""
    start: int
    """First vocabulary entry of this rank."""
    vocab_size: int
    """V; rows of the weight that lie at or beyond it are padding and have probability 0."""

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def _chunk_logits(
    hidden_nh: Tensor, weight_vh: Tensor, shard: VocabShard, temperature: float, memory: Tensor | None = None
) -> Tensor:
    """Float32 logits [n, Vp] of a chunk; padding rows at -inf. ``memory`` [at least n, Vp] float32 may become
    theirs."""
    if hidden_nh.is_cuda and hidden_nh.dtype is not torch.float32:
        # sums are float32 anyway: rounded to bfloat16, a logit of 16 would be off by up to 0.06
        logits = torch.mm(hidden_nh, weight_vh.t(), out_dtype=torch.float32)
    elif memory is not None and hidden_nh.dtype is torch.float32:
        logits = torch.mm(hidden_nh, weight_vh.t(), out=memory[: hidden_nh.shape[0]])
    else:
        logits = torch.matmul(hidden_nh, weight_vh.t()).float()
    if temperature != 1.0:
        logits.div_(temperature)
    valid = shard.vocab_size - shard.start
    if valid < logits.shape[1]:
        logits[:, max(valid, 0) :] = float("-inf")
    return logits


def _log_normaliser(logits: Tensor, shard: VocabShard) -> Tensor:
    """log sum exp over the whole vocabulary, [n, 1]."""
    top = shard.all_reduce(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
    total = shard.all_reduce((logits - top).exp().sum(dim=-1, keepdim=True))
    return top + total.log()


def _local_targets(targets: Tensor, shard: VocabShard, width: int) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where it lies elsewhere) and whether it lies here."""
    local = targets - shard.start
    here = (local >= 0) & (local < width)
    return local.masked_fill(~here, 0), here


def _chunk_memory(hidden_nh: Tensor, weight_vh: Tensor, chunk_tokens: int) -> Tensor:
    """[chunk, Vp] float32 for one chunk's values after another: fresh memory costs a page fault every 4 KiB,
    which on a CPU takes as long as a pass over it."""
    rows = min(chunk_tokens, hidden_nh.shape[0])
    return torch.empty(rows, weight_vh.shape[0], dtype=torch.float32, device=hidden_nh.device)


def _logits_memory(hidden_nh: Tensor, weight_vh: Tensor, chunk_tokens: int) -> Tensor | None:
    """``_chunk_memory`` for ``_chunk_logits``; None where it has no use for it."""
    return _chunk_memory(hidden_nh, weight_vh, chunk_tokens) if hidden_nh.dtype is torch.float32 else None


class _LinearLogProbs(torch.autograd.Function):
    """With a = logits - max, w = exp(a), S = sum w and T = sum w a: log Z = max + log S and entropy =
    log S - T / S, so that one exponential serves both. The backward pass has log Z from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: Tensor,
        weight_vh: Tensor,
        targets_n: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        num = hidden_nh.shape[0]
        logprobs = torch.empty(num, dtype=torch.float32, device=hidden_nh.device)
        entropy, log_z = torch.empty_like(logprobs), torch.empty_like(logprobs)
        memory = _logits_memory(hidden_nh, weight_vh, chunk_tokens)
        powers = _chunk_memory(hidden_nh, weight_vh, chunk_tokens)
        for begin in range(0, num, chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits = _chunk_logits(hidden_nh[part], weight_vh, shard, temperature, memory)
            top = shard.all_reduce(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
            column, here = _local_targets(targets_n[part], shard, logits.shape[1])
            below = logits.sub_(top)
            picked = below.gather(1, column[:, None]).squeeze(1).masked_fill_(~here, 0.0)
            power = torch.exp(below, out=powers[: len(below)])
            total = power.sum(dim=-1)
            # the padding's -inf times its 0 would be no number
            below[:, max(0, shard.vocab_size - shard.start) :] = 0.0
            weighted = power.mul_(below).sum(dim=-1)
            picked, total, weighted = shard.all_reduce(torch.stack([picked, total, weighted]))
            log_total = total.log()
            logprobs[part] = picked - log_total
            entropy[part] = log_total - weighted / total
            log_z[part] = top.squeeze(1) + log_total
        ctx.save_for_backward(hidden_nh, weight_vh, targets_n, entropy, log_z)
        ctx.settings = (shard, temperature, chunk_tokens)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden_nh, weight_vh, targets_n, entropy_n, log_z_n = ctx.saved_tensors
        shard, temperature, chunk_tokens = ctx.settings
        grad_hidden = torch.empty_like(hidden_nh)
        grad_weight = torch.zeros_like(weight_vh, dtype=torch.float32)
        memory = _logits_memory(hidden_nh, weight_vh, chunk_tokens)
        # a GPU would have to be waited for to know
        of_entropy = grad_entropy.is_cuda or bool(grad_entropy.any())
        for begin in range(0, hidden_nh.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits = _chunk_logits(hidden_nh[part], weight_vh, shard, temperature, memory)
            column, here = _local_targets(targets_n[part], shard, logits.shape[1])
            log_p = logits.sub_(log_z_n[part, None])
            # d logprob / d logits = onehot - p;  d entropy / d logits = -p * (log p + entropy)
            if of_entropy:
                p = log_p.exp()
                inner = torch.where(log_p.isneginf(), 0.0, log_p).add_(entropy_n[part, None])
                grad_logits = p.mul_(
                    inner.mul_(grad_entropy[part, None]).add_(grad_logprobs[part, None]).neg_()
                )
            else:
                grad_logits = log_p.exp_().mul_(-grad_logprobs[part, None])
            grad_logits.scatter_add_(1, column[:, None], (grad_logprobs[part] * here)[:, None])
            _add_products(
                grad_logits, temperature, hidden_nh[part], weight_vh, grad_hidden[part], grad_weight
            )
        shard.all_reduce(grad_hidden)
        return grad_hidden, grad_weight.to(weight_vh.dtype), None, None, None, None


def _add_products(
    grad_logits: Tensor,
    temperature: float,
    hidden_nh: Tensor,
    weight_vh: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    """From a chunk's gradient with respect to logits / temperature: sets ``grad_hidden`` [n, H] and adds to
    ``grad_weight`` [Vp, H] float32. ``grad_logits`` is used up."""
    if temperature != 1.0:
        grad_logits.div_(temperature)
    if hidden_nh.dtype is torch.float32:
        torch.mm(grad_logits, weight_vh, out=grad_hidden)
        grad_weight.addmm_(grad_logits.t(), hidden_nh)
        return
    grad_logits = grad_logits.to(hidden_nh.dtype)
    grad_hidden.copy_(torch.matmul(grad_logits, weight_vh))
    grad_weight += torch.matmul(grad_logits.t(), hidden_nh).float()


def linear_logprobs(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    targets_n: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, in nats, both float32 [N].

    ``hidden_nh`` [N, H] is the same on every tensor-parallel rank; its gradient comes back summed over the
    ranks, that of ``weight_vh`` [Vp, H] for this rank's slice only. Both outputs are differentiable.
    """
    logprobs, entropy = _LinearLogProbs.apply(
        hidden_nh, weight_vh, targets_n, shard, temperature, chunk_tokens
    )
    return logprobs, entropy


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: Tensor,
        weight_vh: Tensor,
        targets: Targets,
        measure: Measure,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden_nh, weight_vh)
        ctx.settings = (targets, measure, shard, temperature, chunk_tokens)
        parts = [torch.zeros(0, dtype=torch.float32, device=hidden_nh.device)]
        for begin in range(0, hidden_nh.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits = _chunk_logits(hidden_nh[part], weight_vh, shard, temperature)
            log_p = logits.sub_(_log_normaliser(logits, shard))
            parts.append(_chunk_divergence(log_p, targets[part], measure, shard)[1])
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nh, weight_vh = ctx.saved_tensors
        targets, measure, shard, temperature, chunk_tokens = ctx.settings
        grad_hidden = torch.empty_like(hidden_nh)
        grad_weight = torch.zeros_like(weight_vh, dtype=torch.float32)
        for begin in range(0, hidden_nh.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits = _chunk_logits(hidden_nh[part], weight_vh, shard, temperature)
            log_p = logits.sub_(_log_normaliser(logits, shard))
            with torch.enable_grad():
                student, values = _chunk_divergence(log_p, targets[part], measure, shard)
                (slope,) = torch.autograd.grad(values, student, grads[0][part])
            grad_logits = _softmax_backward(log_p, slope, targets[part].ids, shard)
            _add_products(
                grad_logits, temperature, hidden_nh[part], weight_vh, grad_hidden[part], grad_weight
            )
        shard.all_reduce(grad_hidden)
        return grad_hidden, grad_weight.to(weight_vh.dtype), *[None] * 5


def _chunk_divergence(
    log_p: Tensor, targets: Targets, measure: Measure, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """(the student's log-probabilities that the divergence is a function of, the divergence [n]).

    The first are a leaf: [n, k] on the support, the same on every rank, or [n, v] on this rank's slice of the
    vocabulary."""
    if targets.ids is None:
        width = max(0, min(log_p.shape[1], shard.vocab_size - shard.start))
        student = log_p[:, :width].detach().requires_grad_()
        ours = Targets(
            ids=None,
            logprobs=targets.logprobs[:, shard.start : shard.start + width],
            forward_weight=targets.forward_weight,
        )
        values = measure.on_vocabulary(student, ours)
        # every rank differentiates its own slice, so the sum over ranks is no part of the graph
        rest = shard.all_reduce(values.detach().clone()) - values.detach()
        return student, values + rest
    student = _support_logprobs(log_p, targets.ids, shard).requires_grad_()
    return student, measure.on_support(student, targets)


def _support_logprobs(log_p: Tensor, ids_nk: Tensor, shard: VocabShard) -> Tensor:
    """[n, k] log-probabilities at vocabulary ids, on every rank; 0 in empty places."""
    column, here = _local_targets(ids_nk, shard, log_p.shape[1])
    return shard.all_reduce(log_p.gather(1, column).masked_fill(~here, 0.0))


def _softmax_backward(log_p: Tensor, slope: Tensor, ids_nk: Tensor | None, shard: VocabShard) -> Tensor:
    """[n, Vp] gradient of the logits from that of log-probabilities: d log p_i / d z_j = [i = j] - p_j."""
    total = slope.sum(dim=1, keepdim=True)
    if ids_nk is None:
        shard.all_reduce(total)
        grad_logits = log_p.exp() * -total
        grad_logits[:, : slope.shape[1]] += slope
        return grad_logits
    column, here = _local_targets(ids_nk, shard, log_p.shape[1])
    return (log_p.exp() * -total).scatter_add_(1, column, slope * here)


def linear_divergence(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    targets: Targets,
    measure: Measure,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Divergence of each state's distribution from its target, in nats, [N] float32, differentiable.

    Gradients come back as those of ``linear_logprobs``. Beside the chunk's logits there is nothing of the
    size of the vocabulary but what ``targets`` itself holds.
    """
    values: Tensor = _LinearDivergence.apply(
        hidden_nh, weight_vh, targets, measure, shard, temperature, chunk_tokens
    )
    return values


@torch.no_grad()
def linear_support_logprobs(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    ids_nk: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Log-probabilities of k vocabulary ids at each state, [N, k] float32, on every rank."""
    parts = [torch.zeros(0, ids_nk.shape[1], dtype=torch.float32, device=hidden_nh.device)]
    for begin in range(0, hidden_nh.shape[0], chunk_tokens):
        part = slice(begin, begin + chunk_tokens)
        logits = _chunk_logits(hidden_nh[part], weight_vh, shard, temperature)
        parts.append(_support_logprobs(logits.sub_(_log_normaliser(logits, shard)), ids_nk[part], shard))
    return torch.cat(parts)


@torch.no_grad()
def linear_full_logprobs(
    hidden_nh: Tensor, weight_vh: Tensor, *, shard: VocabShard, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities over this rank's slice of the vocabulary, [N, min(Vp, V - start)] float32.

    For the few states on which behaviour is measured; the caller keeps N small.
    """
    logits = _chunk_logits(hidden_nh, weight_vh, shard, temperature)
    log_p = logits.sub_(_log_normaliser(logits, shard))
    return log_p[:, : max(0, min(log_p.shape[1], shard.vocab_size - shard.start))]


@torch.no_grad()
def linear_topk(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    k: int,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The k most probable entries of each state: (log-probabilities [N, k], vocabulary ids [N, k])."""
    if not 0 < k <= shard.vocab_size:
        raise ValueError(f"top-k: k={k} must lie in 1..{shard.vocab_size} (the vocabulary)")
    num, device = hidden_nh.shape[0], hidden_nh.device
    values = torch.empty(num, k, dtype=torch.float32, device=device)
    ids = torch.empty(num, k, dtype=torch.int64, device=device)
    ranks = shard.group.size() if shard.group is not None else 1
    for begin in range(0, num, chunk_tokens):
        part = slice(begin, begin + chunk_tokens)
        logits = _chunk_logits(hidden_nh[part], weight_vh, shard, temperature)
        log_p = logits.sub_(_log_normaliser(logits, shard))
        width = min(k, log_p.shape[1])
        top, column = log_p.topk(width, dim=-1)
        column = column + shard.start
        if ranks > 1:
            tops = [torch.empty_like(top) for _ in range(ranks)]
            columns = [torch.empty_like(column) for _ in range(ranks)]
            dist.all_gather(tops, top.contiguous(), group=shard.group)
            dist.all_gather(columns, column.contiguous(), group=shard.group)
            top, column = torch.cat(tops, dim=-1), torch.cat(columns, dim=-1)
        best, where = top.topk(k, dim=-1)
        values[part], ids[part] = best, column.gather(1, where)
    return values, ids
