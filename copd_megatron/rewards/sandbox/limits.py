"""What a program in the sandbox may use."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one run. CPU time counts per process, so that the worst case is ``processes`` times as much;
    the wall-clock time and ``total_memory_bytes`` bound the whole."""

    cpu_seconds: float = 4.0
    """Rounded up to whole seconds."""
    wall_seconds: float = 8.0
    """Larger than the CPU time, so that a busy machine does not change a grade."""
    memory_bytes: int = 512 * MIB
    """Address space of each process."""
    total_memory_bytes: int = 1024 * MIB
    """Memory of all processes together; ``memory.py`` says how exactly it is kept."""
    processes: int = 8
    """Processes and threads, the sandbox's own process included."""
    file_bytes: int = 8 * MIB
    """The largest file."""
    scratch_bytes: int = 16 * MIB
    """All files in the scratch folder together."""
    open_files: int = 64
    output_bytes: int = 4 * MIB
    """Bytes on stdout. More ends the run."""

    def to_json(self) -> str:
        """The limits that ``inside.py`` sets, by the names of Python's ``resource`` module."""
        return json.dumps(
            {
                "RLIMIT_CPU": math.ceil(self.cpu_seconds),
                "RLIMIT_AS": self.memory_bytes,
                "RLIMIT_NPROC": self.processes,
                "RLIMIT_FSIZE": self.file_bytes,
                "RLIMIT_NOFILE": self.open_files,
                "RLIMIT_CORE": 0,
            }
        )
