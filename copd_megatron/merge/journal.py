"""What an interrupted merge has finished: kept beside the half-written result, so that it can go on. A folder
without a journal is no merge's own."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from copd_megatron.merge.merger import ShardOutcome
from copd_megatron.untrusted.json_text import load_file, made
from copd_megatron.untrusted.whole_file import write_whole

logger = logging.getLogger(__name__)

_FOLDER = ".merge"


class Journal:
    """One small file per finished shard, each renamed into place: ranks write theirs without locks.

    Args:
        folder: the unfinished result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _FOLDER

    def begin(self, fingerprint: str) -> None:
        """Starts a journal for the job that ``fingerprint`` describes, or goes on with it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / "job.json", {"fingerprint": fingerprint})

    @property
    def exists(self) -> bool:
        """Whether a merge has begun in the folder."""
        return self._folder.is_dir()

    def fingerprint(self) -> str | None:
        """The job whose journal this is; None: none, one that was not even begun, or one that is damaged."""
        record = _read(self._folder / "job.json", _Job)
        return None if record is None else record.fingerprint

    def finished(self, shard: int) -> ShardOutcome | None:
        """A finished shard; None: it is not finished, or its record is damaged."""
        return _read(self._folder / f"shard-{shard:05d}.json", ShardOutcome)

    def finish(self, shard: int, outcome: ShardOutcome) -> None:
        """Records that a shard is complete."""
        _write(self._folder / f"shard-{shard:05d}.json", asdict(outcome))

    def remove(self) -> None:
        """Takes the journal away once the result is complete."""
        shutil.rmtree(self._folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, allow_nan=False))


@dataclass(frozen=True)
class _Job:
    fingerprint: str


def _read[T](path: Path, kind: type[T]) -> T | None:
    try:
        return made(kind, load_file(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged (%s); what it records is done again", path, error)
        return None
