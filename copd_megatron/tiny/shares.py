"""The gradient of a batch from several processes, each of which takes a share of the batch's rows.

The matrices of a tiny model are too small for threads, so a second core is of use to a second process only.
The processes are forked from the one that asks. All of them make the same batches and the same updates, and
add their gradients in the same order, so that all of them hold the same model, bit for bit.

A forked process has none of the threads of the one before. What it runs must need no library that has started
some: torch with one thread will do, encoding videos will not.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

_PATIENCE_SECONDS = 900.0
"""How long a process waits for the others. They may only differ by what else the machine does."""

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 10.0
"""How long the others may take to end when one has."""


class ShareError(RuntimeError):
    """Another process of the warm-up ended. It has said why."""


@dataclass(frozen=True)
class Share:
    """One process's part in making gradients; by default all of it."""

    number: int = 0
    """0 .. ``count`` - 1; 0 is the process that asked."""
    count: int = 1
    _buffers: Sequence[Sequence[Tensor]] = ()
    """Per process two [parameters + 1] buffers for odd and even steps: a process that is ahead must not
    overwrite what another still reads."""
    _arrived: threading.Barrier | None = None

    @property
    def rows(self) -> slice:
        """Which rows of a batch are this process's."""
        return slice(self.number, None, self.count)

    def add_up(self, step: int, loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
        """Replaces gradients by their sum over the processes, and returns the sum of the losses.

        Raises:
            ShareError: another process ended.
        """
        if self._arrived is None:
            return float(loss.detach())
        mine = self._buffers[self.number][step % 2]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in gradients)], out=mine)
        try:
            self._arrived.wait(_PATIENCE_SECONDS)
        except threading.BrokenBarrierError as error:
            raise ShareError("another process of the warm-up ended; its message is above") from error
        total = self._buffers[0][step % 2].clone()
        for buffers in self._buffers[1:]:
            total += buffers[step % 2]
        value, *parts = total.split([1, *(p.numel() for p in parameters)])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return float(value)


ALONE: Final = Share()


def in_shares[R](count: int, num_parameters: int, work: Callable[[Share], R]) -> R:
    """``work(share)`` in ``count`` processes; the result of this one.

    Args:
        num_parameters: floats that a gradient has.
    """
    if count == 1:
        return work(ALONE)
    context = multiprocessing.get_context("fork")
    buffers = [[torch.zeros(num_parameters + 1).share_memory_() for _ in range(2)] for _ in range(count)]
    arrived = context.Barrier(count)
    others = [
        context.Process(target=_help, args=(work, Share(number, count, buffers, arrived)), daemon=True)
        for number in range(1, count)
    ]
    with _ended(others, arrived):
        for other in others:
            other.start()
        return work(Share(0, count, buffers, arrived))


def _help(work: Callable[[Share], object], share: Share) -> None:
    """The whole life of a forked process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # if that one is killed, so is this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked, which ends this one
    assert share._arrived is not None
    try:
        work(share)
    except ShareError:  # whoever broke it off has said why
        return
    except BaseException:
        share._arrived.abort()
        raise


@contextlib.contextmanager
def _ended(
    others: Sequence[multiprocessing.process.BaseProcess], arrived: threading.Barrier
) -> Iterator[None]:
    """No process outlives the block. One that fails has the time to say why."""
    try:
        yield
    except BaseException:
        arrived.abort()
        raise
    finally:
        for other in others:
            if other.pid is not None:
                other.join(_GRACE_SECONDS)
                other.kill()
                other.join()
