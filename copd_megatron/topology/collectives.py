"""Messages between the ranks of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.topology.messages import MessageError, decode, encode

MAX_MESSAGE_BYTES = 4 * 2**30
"""Of one rank: above any batch of rollouts. A damaged size must not become an allocation of its own."""

_SMALL_BYTES = 512
"""Messages of at most so many bytes are gathered together, padded to one length."""
_PADDING_WORTH = 4
"""Padding all messages to the longest may make them so many times as long; beyond, the long ones are sent one
by one. Else n ranks would hold n times what one long message takes."""

AllGather = Callable[[list[Tensor], Tensor], None]
"""Fills the list with the tensor of every rank, which all have one shape."""


Broadcast = Callable[[Tensor, int], None]
"""Fills a tensor with that of a group rank."""


def all_gather_messages(
    value: Any,
    *,
    num_ranks: int | None = None,
    all_gather: AllGather = dist.all_gather,
    broadcast: Broadcast | None = None,
) -> list[Any]:
    """Small values of all ranks, by rank, on every one of them. Collective.

    Args:
        value: anything that ``messages.encode`` takes; it may differ in size from rank to rank.
        num_ranks: ranks of the group; None: of the default group.
        all_gather: of the group, for CPU tensors.
        broadcast: of the group, for CPU tensors; None: the default group's.

    Raises:
        MessageError: a rank has sent something else than a message, or one of more than
            ``MAX_MESSAGE_BYTES``.
    """
    count = dist.get_world_size() if num_ranks is None else num_ranks
    data, sizes = _sized(value, count, all_gather)
    length = max(sizes)
    long = [rank for rank, size in enumerate(sizes) if size > _SMALL_BYTES]
    if count * length > _PADDING_WORTH * (sum(sizes) + count * _SMALL_BYTES):
        length = _SMALL_BYTES
    parts = [torch.empty(length, dtype=torch.uint8) for _ in range(count)]
    all_gather(parts, _padded(data[:length], length))
    if length < max(sizes):
        for rank in long:
            parts[rank] = _sent(data, sizes, rank, broadcast or _broadcast)
    return [_read(part, size) for part, size in zip(parts, sizes, strict=True)]


def _sent(data: Tensor, sizes: list[int], rank: int, broadcast: Broadcast) -> Tensor:
    """One rank's message, sent to all; ``data`` is this rank's own."""
    tensor = torch.zeros(sizes[rank], dtype=torch.uint8)
    tensor[: min(len(data), sizes[rank])] = data[: sizes[rank]]
    broadcast(tensor, rank)
    return tensor


def _broadcast(tensor: Tensor, source: int) -> None:
    dist.broadcast(tensor, src=source)


def gather_messages(value: Any) -> list[Any] | None:
    """Small values of all ranks of the default group, on its first rank; None elsewhere. Collective.

    Raises:
        MessageError: as ``all_gather_messages``.
    """
    count = dist.get_world_size()
    data, sizes = _sized(value, count, dist.all_gather)
    first = dist.get_rank() == 0
    parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in range(count)] if first else None
    dist.gather(_padded(data, max(sizes)), parts, dst=0)
    if parts is None:
        return None
    return [_read(part, size) for part, size in zip(parts, sizes, strict=True)]


def _sized(value: Any, count: int, all_gather: AllGather) -> tuple[Tensor, list[int]]:
    """This rank's message, and the size of every rank's."""
    data = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
    size = torch.tensor([data.numel()], dtype=torch.int64)
    sizes = [torch.empty_like(size) for _ in range(count)]
    all_gather(sizes, size)
    found = [int(one) for one in sizes]
    for rank, one in enumerate(found):
        if not 0 < one <= MAX_MESSAGE_BYTES:
            raise MessageError(
                f"group rank {rank} announces a message of {one} bytes (1 .. {MAX_MESSAGE_BYTES} allowed); "
                "every rank must run the same code and take part in the same collectives"
            )
    return data, found


def _padded(data: Tensor, length: int) -> Tensor:
    padded = torch.zeros(length, dtype=torch.uint8)
    padded[: data.numel()] = data
    return padded


def _read(part: Tensor, size: int) -> Any:
    return decode(part[:size].numpy().tobytes())
