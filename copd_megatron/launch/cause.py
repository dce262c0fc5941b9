"""Why a run ended, from what its ranks logged and how they exited: the last thing that a person sees."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

from copd_megatron.metrics.rank_log import ENDED_BY, TIME_FORMAT, Selection, merged
from copd_megatron.topology.who_waits import JOB_ENDS

_PLACE: Final = r"\[(?P<branch>[^\s,]+)(?: (?P<branch_rank>\d+)/\d+)?, rank (?P<rank>\d+)\]"
_ENDED: Final = re.compile(rf".*?{_PLACE} \S+ {ENDED_BY}(?P<error>\w+): (?P<message>.*)")
_STUCK: Final = re.compile(rf".*?{_PLACE} \S+ watch: (?P<message>.*without progress for.*)")
_JOB_ENDS: Final = re.compile(rf".*?{_PLACE} \S+ {JOB_ENDS}(?P<message>.*)")
_ELSEWHERE: Final = ("CollectiveError",)
"""Errors of a rank that another one's end has brought about."""


_NO_ROOM: Final = re.compile(rf".*?{_PLACE} (?P<message>.*/dev/shm.*No space left on device.*)")
"""NCCL says so in a later line of an error that begins with something else."""
_SHARED_MEMORY: Final = (
    "/dev/shm is full: remove what killed runs left there (copd doctor names it), or give the container more "
    "(docker run --shm-size=8g, or --ipc=host)"
)
_LESS_MEMORY: Final = (
    "give the job more memory, start fewer ranks on this machine, or lower training.micro_batch_tokens, "
    "rollout.max_num_seqs or rollout.cpu_kv_cache_gib"
)


def memory_kills(vmstat: Path = Path("/proc/vmstat")) -> int | None:
    """How many processes of this machine the kernel has killed for want of memory; None if unknown."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def why_it_ended(
    run_dir: Path, exits: Mapping[int, int], *, since: datetime, kills_before: int | None = None
) -> str:
    """The cause of a failure, in one sentence.

    Args:
        exits: exit status of each rank that failed, by global rank; negative if a signal killed it.
        since: when the ranks were started; what is logged before belongs to an earlier start.
        kills_before: what ``memory_kills`` said then.
    """
    try:
        lines = list(merged(run_dir, Selection(level="ERROR")))
    except FileNotFoundError:  # they failed before they could log, or log no files
        lines = []
    recent = [line for line in lines if line >= since.strftime(TIME_FORMAT)]
    ended = [match for line in recent if (match := _ENDED.match(line))]
    stuck = [match for line in recent if (match := _STUCK.match(line))]
    first = next((match for match in ended if match["error"] not in _ELSEWHERE), None)
    if first is not None:
        return _told(first)
    hopeless = next((match for line in recent if (match := _JOB_ENDS.match(line))), None)
    if hopeless is not None:
        return hopeless["message"]
    no_room = next((match for line in recent if (match := _NO_ROOM.match(line))), None)
    if no_room is not None:
        return f"{_rank_of(no_room)}: {_SHARED_MEMORY}: {no_room['message'].strip()}"
    killed = _killed_first({rank: -status for rank, status in exits.items() if status < 0})
    if killed:
        kills = memory_kills()
        for_memory = kills_before is not None and kills is not None and kills > kills_before
        return "; ".join(_killed(rank, number, for_memory) for rank, number in killed.items())
    if stuck:
        return stuck[0]["message"]
    return _told(ended[0]) if ended else _statuses(exits.items())


def _told(match: re.Match[str]) -> str:
    return f"{_rank_of(match)}: {match['error']}: {match['message']}"


def _rank_of(match: re.Match[str]) -> str:
    place = match["branch"] + (f" rank {match['branch_rank']}" if match["branch_rank"] else "")
    return f"{place} (global rank {match['rank']})"


def _killed_first(killed: Mapping[int, int]) -> dict[int, int]:
    """Without the ranks that torchrun ended by SIGTERM because of what had happened to another."""
    elsewhere = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    return elsewhere or dict(killed)


def _killed(rank: int, number: int, for_memory: bool) -> str:
    """``for_memory``: since the ranks were started, the kernel has killed a process for want of memory."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hints = {
        "SIGKILL": f", by the kernel for want of memory: {_LESS_MEMORY}"
        if for_memory
        else ", as by the kernel when memory runs out (see dmesg)",
        "SIGBUS": f", as when {_SHARED_MEMORY}",
    }
    return f"global rank {rank} was killed by {name}{hints.get(name, '')}"


def _statuses(exits: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"global rank {rank} exited with status {status}" for rank, status in exits)
