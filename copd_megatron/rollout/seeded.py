"""Sampling on a CPU with a seed for each response, for the whole batch at once.

vLLM gives a request that has a seed a random generator of its own, and at every step asks one generator after
the other for as many numbers as the vocabulary has tokens. For 256 responses of a small model on a CPU, that
was a sixth of all sampling. Here, the random numbers of a step are a function of (seed, position, token),
computed for all rows by a few operations on whole tensors. So a response still depends on nothing but its
seed and its log-probabilities, whatever else is in the batch, and there is no state that a preempted request
could lose.

The law is vLLM's: of exponentially distributed arrival times with rate p(token), the first one wins, which is
token t with probability p(t). The numbers come from a hash with 64 bits of key a row; uniform numbers have 31
bits, and full precision where they are small, which is where winners are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MANY = 2**17
"""Numbers made at a time: as many as a core's cache holds, with the intermediate ones."""
_GOLDEN = 0x9E3779B97F4A7C15


def row_keys(seeds: Sequence[int], positions: npt.NDArray[np.integer[Any]]) -> Tensor:
    """The keys of rows: [R, 2] int32, a function of each row's seed and of the position of its next token."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2 ** 64
        mixed = _mix(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))
        mixed = _mix(mixed + positions.astype(np.uint64) * np.uint64(_GOLDEN))
    return torch.from_numpy(mixed.view(np.int32).reshape(-1, 2))


def first_arrivals(probabilities: Tensor, keys: Tensor) -> Tensor:
    """One token per row, drawn with the row's ``probabilities``: [R] int64.

    Args:
        probabilities: [R, V] float32, of each row proportional to the law.
        keys: [R, 2] of ``row_keys``.
    """
    num_tokens = probabilities.shape[1]
    tokens = _token_keys(num_tokens)
    rows = max(1, _MANY // num_tokens)
    parts = [
        # the first to arrive has the largest rate / time, and the times are negative
        part.div(_negative_times(tokens, key)).min(dim=-1).indices
        for part, key in zip(probabilities.split(rows), keys.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _negative_times(tokens: Tensor, keys: Tensor) -> Tensor:
    """[R, V] float32: minus exponentially distributed numbers, of the keys of rows and of tokens.

    Two rounds of a multiplication and a shift, as in the finalizers of hash tables, with 32 bits of the row's
    key before each. A multiplication carries every bit upwards, and the shift brings the upper ones down.
    """
    bits = tokens ^ keys[:, :1]
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)  # the shift copies the sign
    bits += keys[:, 1:]
    bits *= 0x846CA68B - 2**32
    bits &= 0x7FFFFFFF
    bits ^= bits >> 16
    # minus a uniform number, from 2 ** -32 to 1 - 2 ** -23, so that no time is zero and none infinite
    return bits.to(torch.float32).mul_(-(2.0**-31) * (1 - 2.0**-23)).sub_(2.0**-32).log1p_()


@functools.lru_cache(maxsize=4)
def _token_keys(num_tokens: int) -> Tensor:
    """[V] int32, of each token."""
    with np.errstate(over="ignore"):
        mixed = _mix(np.arange(1, num_tokens + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    return torch.from_numpy((mixed >> np.uint64(32)).astype(np.uint32).view(np.int32))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64: a bijection under which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def prepare(worker: Any) -> None:
    """Lets a CPU's worker sample like that whenever all rows have seeds. Runs inside the worker.

    Its log-probabilities are those of the law that is sampled from (``processed_logprobs``). Ranks of tokens,
    which nobody asked for, are zero.

    Raises:
        RuntimeError: the worker's model runner is not the one that this was written for.
    """
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner = worker.model_runner
    if not isinstance(runner, CPUModelRunner):
        raise RuntimeError(
            f"vLLM runs models by {type(runner).__name__} and not by CPUModelRunner, whose sampler is known; "
            "install the pinned version (requirements-cpu.txt), or unset VLLM_USE_V2_MODEL_RUNNER"
        )

    class Draw(torch.nn.Module):
        """Top-k, top-p and a draw."""

        def __init__(self) -> None:
            super().__init__()
            self.for_rows_without_seeds = TopKTopPSampler("processed_logprobs")

        def forward(
            self, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            num_rows = len(logits)
            if len(generators) != num_rows:  # of a trial run, before anything is sampled
                return self.for_rows_without_seeds(logits, generators, k, p)
            seeds = [generators[row].initial_seed() for row in range(num_rows)]
            lengths = runner.optimistic_seq_lens_cpu[:num_rows].numpy()
            logprobs = apply_top_k_top_p(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
            return first_arrivals(logprobs.exp(), row_keys(seeds, lengths)), logprobs

    class SeededSampler(Sampler):
        """vLLM's sampler, which counts no ranks."""

        def __init__(self) -> None:
            super().__init__("processed_logprobs")
            self.topk_topp_sampler = Draw()

        @staticmethod
        def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
            if num_logprobs:
                return Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
            chosen = token_ids.unsqueeze(-1)
            return LogprobsTensors(
                chosen.to(torch.int32), logprobs.gather(-1, chosen), torch.zeros_like(token_ids)
            )

    runner.sampler = SeededSampler()
