"""Many rollouts as a few flat arrays: what the replicas of a branch send each other. Pure.

Prompts do not travel, since every rank of a branch has them; a packed rollout holds its response alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from copd_megatron.records import FloatArray, IntArray, Prompt, Rollout
from copd_megatron.topology.messages import MessageError, register

_COLUMNS = 8


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRollouts:
    """``n`` rollouts with ``T`` response tokens in all and ``B`` bytes of text."""

    table: npt.NDArray[np.int64]
    """[n, 8]: sample index, response tokens, bytes of text, weight version, seed, and, 0 or 1, truncated,
    unfinished, graded."""
    rewards: npt.NDArray[np.float64]
    """[n]; 0 where a rollout is not graded."""
    token_ids: IntArray
    """[T]"""
    logprobs: FloatArray
    """[T]"""
    text: npt.NDArray[np.uint8]
    """[B], UTF-8."""

    def __len__(self) -> int:
        return len(self.table)


def pack_rollouts(rollouts: Sequence[Rollout]) -> PackedRollouts:
    """Rollouts without their prompts."""
    texts = [_encoded(r.text) for r in rollouts]
    rows = [
        (
            *(r.sample_index, r.response_length, len(text), r.weight_version, r.seed),
            *(r.truncated, r.unfinished, r.reward is not None),
        )
        for r, text in zip(rollouts, texts, strict=True)
    ]
    return PackedRollouts(
        table=np.array(rows, dtype=np.int64).reshape(len(rows), _COLUMNS),
        rewards=np.array([0.0 if r.reward is None else r.reward for r in rollouts], dtype=np.float64),
        token_ids=_joined((r.token_ids[r.prompt_length :] for r in rollouts), np.int32),
        logprobs=_joined((r.rollout_logprobs for r in rollouts), np.float32),
        text=np.frombuffer(b"".join(texts), dtype=np.uint8),
    )


def unpack_rollouts(packed: PackedRollouts, prompts: Sequence[Prompt]) -> Iterator[Rollout]:
    """The rollouts, in their order.

    Args:
        prompts: of each rollout.

    Raises:
        MessageError: the arrays do not fit each other or the prompts.
    """
    _check(packed, len(prompts))
    columns = packed.table.tolist()
    text = packed.text.tobytes()
    token, byte = 0, 0
    for prompt, reward, row in zip(prompts, packed.rewards.tolist(), columns, strict=True):
        sample, num_tokens, num_bytes, version, seed, truncated, unfinished, graded = row
        response = packed.token_ids[token : token + num_tokens]
        yield Rollout(
            prompt=prompt,
            sample_index=sample,
            token_ids=np.concatenate([prompt.token_ids, response]).astype(np.int32, copy=False),
            # a view would keep the arrays of the whole batch alive
            rollout_logprobs=packed.logprobs[token : token + num_tokens].copy(),
            text=_decoded(text[byte : byte + num_bytes]),
            truncated=bool(truncated),
            weight_version=version,
            seed=seed,
            reward=reward if graded else None,
            unfinished=bool(unfinished),
        )
        token, byte = token + num_tokens, byte + num_bytes


def _check(packed: PackedRollouts, num_prompts: int) -> None:
    lengths = packed.table[:, 1:3] if packed.table.shape[1:] == (_COLUMNS,) else np.full((1, 2), -1)
    tokens, size = lengths.sum(axis=0).tolist()
    found = (len(packed.table), len(packed.rewards), len(packed.token_ids), len(packed.logprobs))
    if (lengths < 0).any() or (*found, len(packed.text)) != (num_prompts, num_prompts, tokens, tokens, size):
        raise MessageError(
            f"packed rollouts that do not fit: {num_prompts} expected, with {tokens} tokens and {size} bytes "
            f"of text by their table; arrived: {found[0]} rows, {found[1]} rewards, {found[2]} tokens, "
            f"{found[3]} log-probabilities, {len(packed.text)} bytes; every rank must run the same code"
        )


def _joined(parts: Iterable[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _encoded(text: str) -> bytes:
    """Lone surrogates too come back as they were."""
    return text.encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise MessageError(f"text of a packed rollout: {error}") from error
