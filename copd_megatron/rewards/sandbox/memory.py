"""Bounds the memory that all processes of one sandbox take together.

Each process has a limit of its own (``Limits.memory_bytes``), but a program may start several. Their sum is
bounded by the better of two means that this machine has:

- **A control group** (cgroup v2) per run, where this user may make groups with the memory controller. The
  kernel enforces the bound exactly, ends the whole sandbox at it, and counts files and kernel memory as well.
  Root usually may, and so may whatever runs below a user's systemd instance
  (``systemd-run --user --scope copd train ...``). Containers and SLURM steps usually get no such folder.
- **A watch** everywhere else. Every ``WATCH_SECONDS`` the memory of all processes of the sandbox
  is added up, and the sandbox is ended when the sum exceeds the bound. Between two looks the sum may
  overshoot, up to ``processes`` times ``memory_bytes``. Memory that belongs to no process is bounded
  otherwise: files by the size of the scratch folder, and ``system_calls.py`` refuses memory that outlives its
  mapping (memory files, System V segments and queues).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

WATCH_SECONDS = 0.05
_PREFIX = "copd-sandbox"
_GONE_SECONDS = 5.0
"""How long killed processes may take to leave their group."""
_KIB = 1024
_PRIVATE = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB", re.MULTILINE)
_PROPORTIONAL = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB", re.MULTILINE)
_numbers = itertools.count()


class Bound(Protocol):
    """The bound on one sandbox."""

    period: float
    """Seconds between two calls of ``is_exceeded`` while the sandbox runs."""

    @property
    def join(self) -> Callable[[], None] | None:
        """What the sandbox's first process calls before it runs anything; None: nothing."""

    def is_exceeded(self, pid: int | None) -> bool:
        """Whether the sandbox has used more than it may. ``pid`` is its first process, None once that has
        ended."""


@contextlib.contextmanager
def bounded(limit_bytes: int) -> Iterator[Bound]:
    """A bound for one run; at the end of the block nothing of its control group is left.

    Raises OSError: the control group cannot be made, although this user could make one before.
    """
    parent = delegated()
    if parent is None:
        yield Watch(limit_bytes)
        return
    group = Group(parent, limit_bytes)
    try:
        yield group
    finally:
        group.close()


class Watch:
    """Adds up the memory of processes from time to time."""

    period = WATCH_SECONDS

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes

    @property
    def join(self) -> None:
        """Processes below the first one need not join."""

    def is_exceeded(self, pid: int | None) -> bool:
        """Pages that several processes share count once, which takes longer to find out: only if needed."""
        if pid is None:
            return False
        processes = descendants(pid)
        if sum(_bytes(one, "status", _PRIVATE) for one in processes) <= self._limit_bytes:
            return False
        return sum(_shared_bytes(one) for one in processes) > self._limit_bytes


class Group:
    """A control group. Raises OSError where it cannot be made."""

    period = float("inf")

    def __init__(self, parent: Path, limit_bytes: int) -> None:
        _sweep(parent)
        self.folder = parent / f"{_own_prefix()}{os.getpid()}-{next(_numbers)}"
        self.folder.mkdir()
        try:
            (self.folder / "memory.max").write_text(str(limit_bytes))
            (self.folder / "memory.oom.group").write_text("1")
            with contextlib.suppress(FileNotFoundError):  # a kernel that does not account for swap
                (self.folder / "memory.swap.max").write_text("0")
            # opened here: whoever joins may have given up the rights that this takes
            self._members = os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            self.folder.rmdir()
            raise

    @property
    def join(self) -> Callable[[], None]:
        """Moves the process that calls it, and so all that it starts, into the group."""
        return lambda: _write(self._members, b"0")

    def is_exceeded(self, pid: int | None) -> bool:
        """Whether the kernel has ended a process of the group at the bound."""
        counts = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        return int(counts.get("oom_kill", 0)) > 0

    def close(self) -> None:
        """Ends what is in the group, and removes it."""
        os.close(self._members)
        with contextlib.suppress(OSError):  # Linux before 5.14; run.py has killed them by other means
            (self.folder / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + _GONE_SECONDS
        while not _removed(self.folder) and time.monotonic() < deadline:
            time.sleep(0.001)


@functools.cache
def delegated() -> Path | None:
    """The nearest control group, from this process's own upwards, in which it may make groups whose memory is
    bounded; None where there is none. Makes one to find out."""
    own = _own_group()
    if own is None:
        return None
    mount, folder = own
    for parent in (folder, *folder.parents):
        if not parent.is_relative_to(mount):
            return None
        if _can_hold(parent):
            return parent
    return None


def means() -> str:
    """How the sum is bounded on this machine, for people."""
    parent = delegated()
    return f"checked every {WATCH_SECONDS} s" if parent is None else f"bounded by the kernel in {parent}"


def descendants(pid: int) -> list[int]:
    """A process and all below it, as far as they live."""
    found, place = [pid], 0
    while place < len(found):
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{found[place]}/task"):
                children = Path(f"/proc/{found[place]}/task/{thread}/children").read_text()
                found += [int(child) for child in children.split()]
        place += 1
    return found


def _own_group() -> tuple[Path, Path] | None:
    """Where cgroup v2 is mounted, and this process's group there."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mount = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    own = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), None)
    return None if mount is None or own is None else (mount, mount / own.strip("/"))


def _can_hold(parent: Path) -> bool:
    """Whether a process can be started in a bounded group below this one."""
    try:
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            return False
        group = Group(parent, 1 << 30)
    except OSError:
        return False
    try:
        found = subprocess.run(["/bin/true"], preexec_fn=group.join, capture_output=True, check=False)
        return found.returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        group.close()


def _own_prefix() -> str:
    """How the names of this process namespace's groups begin."""
    return f"{_PREFIX}-{os.stat('/proc/self/ns/pid').st_ino}-"


def _sweep(parent: Path) -> None:
    """Removes groups that killed graders have left."""
    for folder in parent.glob(f"{_own_prefix()}*"):
        owner = folder.name.removeprefix(_own_prefix()).partition("-")[0]
        if not Path(f"/proc/{owner}").exists():
            _removed(folder)


def _removed(folder: Path) -> bool:
    """Whether the group is gone. One with processes in it stays."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _write(descriptor: int, data: bytes) -> None:
    os.write(descriptor, data)


def _bytes(pid: int, file: str, fields: re.Pattern[str]) -> int:
    """The sum of some fields of a process's file; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return _KIB * sum(map(int, fields.findall(Path(f"/proc/{pid}/{file}").read_text())))
    return 0


def _shared_bytes(pid: int) -> int:
    """What a process takes, counting only its share of pages that others use, too. Where the kernel does not
    say, these count in full."""
    return _bytes(pid, "smaps_rollup", _PROPORTIONAL) or _bytes(pid, "status", _PRIVATE)
