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


def switches(topology: str) -> dict[str, str]:
    """Host to the switch that it hangs on, of what ``scontrol --oneliner show topology`` prints; empty where
    the cluster describes no topology.

    ``SwitchName=s1 Level=0 LinkSpeed=1 Nodes=n[1-2]``
    """
    found: dict[str, str] = {}
    for line in topology.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("Level") == "0" and "Nodes" in fields:
            found |= dict.fromkeys(hosts_of(fields["Nodes"]), fields.get("SwitchName", ""))
    return found


def hosts_of(node_list: str) -> list[str]:
    """All hosts of a SLURM node list: ``gpu[004-006,9],login1`` is gpu004, gpu005, gpu006, gpu9, login1.

    Raises:
        ValueError: not a node list.
    """
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list):
        match = re.fullmatch(r"([^\[\]]*)(?:\[([\d,-]+)\])?([^\[\]]*)", part)
        if match is None:
            raise ValueError(f"{node_list!r} is not a SLURM node list")
        before, ranges, behind = match.groups()
        for numbers in (ranges or "").split(","):
            first, _, last = numbers.partition("-")
            if not first:
                found.append(before + behind)
                continue
            width = len(first)
            found += [f"{before}{n:0{width}d}{behind}" for n in range(int(first), int(last or first) + 1)]
    return found


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: ``gpu[004-007,9],login1`` gives ``gpu004``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if first is None:
        raise ValueError(f"{node_list!r} is not a SLURM node list")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
