"""Errors that several rooms raise and that a person can do something about: settings, data, divergence."""

from __future__ import annotations

import errno
from typing import Final

EXIT_HOPELESS: Final = 78
"""Exit status of a rank in a job that failed for a reason that no restart can mend (EX_CONFIG).
launchers/slurm.sh knows it too."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot run: says where, what, and the remedy."""


class DivergedError(RuntimeError):
    """Training has diverged: too many updates in a row had to be skipped."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; says which, why, and the remedy."""


class DataError(ValueError):
    """Data that a run cannot start with: the message says what, where and the remedy."""


class RunStorageError(RuntimeError):
    """What a run cannot do without cannot be written to its directory, because the disk is full for
    example."""


class BadSampleError(DataError):
    """One sample that cannot be used. The stream skips, counts and logs it; start-up checks refuse it.

    ``reason`` is a short stable word for counters: ``not_json``, ``no_json``, ``too_nested``, ``bad_text``,
    ``missing_field``, ``bad_type``, ``unknown_verifier``, ``too_long``, ``empty_prompt``, ``chat_template``;
    with media ``no_member``, ``media_unsupported``, ``media_mismatch``, ``unknown_format``,
    ``corrupt_image``, ``corrupt_video``, ``truncated_video``, ``too_many_pixels``, ``bad_size``; and
    ``unexpected`` for a failure that none of these foresees. The converters have a few of their own.
    """

    def __init__(self, where: str, reason: str, problem: str, remedy: str) -> None:
        super().__init__(f"{where}: {problem}. {remedy}")
        self.reason = reason
        self.told: Final = (where, reason, problem, remedy)
        """What it was made of."""

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str, str, str]]:
        return BadSampleError, self.told

    def again(self) -> BadSampleError:
        """An equal error without traceback and cause, which would keep what the failed calls held."""
        return BadSampleError(*self.told)


HOPELESS: Final = (ConfigError, DataError, DivergedError, CheckpointError, RunStorageError)
"""Errors that no restart can mend, whose messages are for people."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_hopeless(error: BaseException | None) -> bool:
    """Whether a run that is started again without a change would fail in the same way."""
    return isinstance(error, HOPELESS) or (isinstance(error, OSError) and error.errno in _NO_ROOM)
