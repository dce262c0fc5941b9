"""A file that one process at a time appends to."""

from __future__ import annotations

import fcntl
from typing import IO, Any

from copd_megatron.errors import DataError


def write_alone(file: IO[Any], refusal: str) -> None:
    """Keeps other processes from writing an open file until it is closed, or this process ends.

    Raises:
        DataError: another one writes it; the message is ``refusal``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(refusal) from error
