"""vLLM's external-launcher executor, with shared memory that branches on one host do not fight over."""

from __future__ import annotations

from typing import Any


def external_launcher(identity: str, *, on_cuda: bool) -> Any:
    """The ``distributed_executor_backend`` for an engine whose ranks torchrun or srun has started.

    On CPU, vLLM names its shared-memory segments after the init method, and ``env://`` gives every branch
    on the host the same name. torch.distributed is up already, so the init method is used for nothing else:
    this executor appends an identity to it. It must be fresh for every launch, because a killed run leaves
    its segments behind in /dev/shm.
    """
    if on_cuda:
        return "external_launcher"
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class BranchExecutor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            _, rank, local_rank = super()._distributed_args()
            return f"env://:{identity}", rank, local_rank

    return BranchExecutor
