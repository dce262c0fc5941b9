"""One job per run directory. Imports neither torch nor Megatron."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from copd_megatron.config import ConfigError
from copd_megatron.untrusted.whole_file import open_appending

logger = logging.getLogger(__name__)

LOCK: Final = "run.lock"
_WAIT_SECONDS = 10.0
"""How long a job that was just killed has to end before the next one is refused."""
_POLL_SECONDS = 0.2
_MAX_HOLDER_BYTES = 500


class RunLock:
    """Keeps a second job out of a run directory, where it would truncate metrics and delete unfinished saves.

    A kernel lock on ``run.lock``: it goes when the process goes, however that ends.
    """

    def __init__(self, run_dir: Path, *, wait_seconds: float = _WAIT_SECONDS) -> None:
        self.path, self.wait_seconds = run_dir / LOCK, wait_seconds
        self._file: FileIO | None = None

    def __enter__(self) -> Self:
        """
        Raises:
            ConfigError: another process still holds it after ``wait_seconds``.
            OSError: the run directory cannot be written, or ``run.lock`` is a link, a FIFO or a folder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_appending(self.path)
        try:
            self._take(self._file)
        except ConfigError:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def _take(self, file: FileIO) -> None:
        deadline = time.monotonic() + self.wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read(_MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
                    raise ConfigError(
                        f"run.dir: {self.path.parent} is in use by {holder or 'another job'}: "
                        "stop that one first, or choose another run.name or run.dir"
                    ) from None
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): nothing keeps a second job out of it", self.path, error
                )
                return
            time.sleep(_POLL_SECONDS)
