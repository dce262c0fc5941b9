"""A world of one process, for commands that need what a branch has without being a job."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator

import torch
import torch.distributed as dist

from copd_megatron.topology.loopback import only_this_machine

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@contextlib.contextmanager
def single_process() -> Iterator[str]:
    """torch.distributed with one rank and a store in this process; yields a new run identifier.

    Raises:
        RuntimeError: this is one of several ranks, each of which would make a world of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise RuntimeError("this command runs as one process: start it without torchrun or srun")
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **only_this_machine()}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield uuid.uuid4().hex[:12]
    finally:
        dist.destroy_process_group()
        for name in _OF_RANKS:  # whoever tells of an error should not take this for a rank of a job
            if name not in before:
                os.environ.pop(name, None)
