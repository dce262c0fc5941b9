"""vLLM's external-launcher executor, with separate shared memory for each branch on a host."""

from __future__ import annotations

from typing import Any


def external_launcher(identity: str, *, on_cuda: bool) -> Any:
    """The ``distributed_executor_backend`` of an engine whose ranks torchrun or srun has started.

    On CPU, vLLM names its shared-memory segments after the init method, and with ``env://`` all branches on a
    host would share a name. torch.distributed is already initialised, so the init method serves no other
    purpose, and this executor appends ``identity`` to it. The identity must be new at every launch, because a
    killed run leaves its segments in /dev/shm.
    """
    if on_cuda:
        return "external_launcher"
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class BranchExecutor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            _, rank, local_rank = super()._distributed_args()
            return f"env://:{identity}", rank, local_rank

    return BranchExecutor
