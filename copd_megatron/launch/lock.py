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
from typing import BinaryIO, Final, Self

from copd_megatron.config import ConfigError
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import open_appending

logger = logging.getLogger(__name__)

LOCK: Final = "run.lock"
LOCK_WAIT_SECONDS: Final = 10.0
"""How long a job that was just killed has to end before the next one is refused."""
_POLL_SECONDS = 0.2
_MAX_HOLDER_BYTES = 500


class RunLock:
    """Keeps a second job out of a run directory, where it would truncate metrics and delete unfinished saves.

    A kernel lock on ``run.lock``: it goes when the process goes, however that ends.
    """

    def __init__(self, run_dir: Path, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> None:
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
            _take(self._file, self.path, fcntl.LOCK_EX, self.wait_seconds)
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


def refuse_in_use(run_dir: Path, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> None:
    """Whether another job uses a run directory. Makes no file, and leaves the lock to whoever wants it.

    Raises:
        ConfigError: one still does after ``wait_seconds``, or ``run.lock`` cannot be read.
    """
    path = run_dir / LOCK
    if not os.path.lexists(path):
        return
    try:
        file = open_regular(path, inside=run_dir, buffered=False)
    except OSError as error:
        raise ConfigError(
            f"run.dir: {path} cannot be opened ({error.strerror or error}): remove it if no job uses "
            f"{run_dir}, or choose another run.name or run.dir"
        ) from error
    with file:
        _take(file, path, fcntl.LOCK_SH, wait_seconds)


def _take(file: FileIO | BinaryIO, path: Path, kind: int, wait_seconds: float) -> None:
    """``kind``: ``LOCK_EX`` to have it alone; ``LOCK_SH`` to ask, which does not keep others from asking."""
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read(_MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
                raise ConfigError(
                    f"run.dir: {path.parent} is in use by {holder or 'another job'}: "
                    "stop that one first, or choose another run.name or run.dir"
                ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nothing keeps a second job out of it", path, error)
            return
        time.sleep(_POLL_SECONDS)
