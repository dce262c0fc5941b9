"""What srun tells its tasks, under the names that torch.distributed reads. No torch.

    srun --ntasks=24 copd train config.yaml

Every task is a rank: its number is the global rank, and its number on its node is the device. The launchers
(``launchers/slurm.sh``) do the same, with ranks assigned to nodes by ``launch.placement``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 12000, 18000
"""Below the ports that Linux assigns by itself (from 32768)."""


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that make this process a rank of an srun step; empty if it is none.

    It is none outside SLURM, under torchrun (RANK is set), and in a step of one task, unless
    ``COPD_LAUNCHER=srun`` says so: a single task may also be a shell in which a local run is started.
    MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS keep their values where they are set.

    Args:
        environment: the process's.

    Raises:
        ValueError: the variables of the step do not fit together.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if "RANK" in environment or not tasks or "SLURM_PROCID" not in environment:
        return {}
    if tasks == "1" and environment.get("COPD_LAUNCHER") != "srun":
        return {}
    job, step = environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"]
    rank, local_rank = environment["SLURM_PROCID"], environment["SLURM_LOCALID"]
    if int(rank) >= int(tasks):
        raise ValueError(
            f"SLURM_PROCID {rank} in a step of {tasks} tasks (SLURM_STEP_NUM_TASKS): these variables belong "
            "to different steps; start the ranks with srun"
        )
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    if devices and "," not in devices:
        local_rank = "0"  # --gpus-per-task: the one GPU that this task sees is its own
    # the store and Gloo use the interface of this address: a step on one node cannot be reached from another
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    found = {
        "RANK": rank,
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": "127.0.0.1" if alone else first_host(environment["SLURM_STEP_NODELIST"]),
        # a different port for every step, so that a restart does not meet its predecessor's
        "MASTER_PORT": str(_FIRST_PORT + (int(job) * 101 + int(step)) % _NUM_PORTS),
        "COPD_RUN_ID": f"slurm-{job}-{step}-{environment.get('SLURM_RESTART_COUNT', '0')}",
        "OMP_NUM_THREADS": environment.get("SLURM_CPUS_PER_TASK", "1"),
    }
    given = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    return {name: value for name, value in found.items() if name not in given or name not in environment}


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: ``gpu[004-007,9],login1`` gives ``gpu004``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if first is None:
        raise ValueError(f"{node_list!r} is not a SLURM node list")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
