"""What an interrupted merge has finished: kept beside the half-written result, so that it can go on. A folder
without a journal is no merge's own."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from copd_megatron.merge.merger import ShardOutcome

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
        """The job whose journal this is; None: none, or one that was not even begun."""
        record = _read(self._folder / "job.json")
        return None if record is None else record["fingerprint"]

    def finished(self, shard: int) -> ShardOutcome | None:
        """A finished shard; None: it is not finished."""
        record = _read(self._folder / f"shard-{shard:05d}.json")
        return (
            None if record is None else ShardOutcome(digest=record["digest"], equals=tuple(record["equals"]))
        )

    def finish(self, shard: int, outcome: ShardOutcome) -> None:
        """Records that a shard is complete."""
        _write(self._folder / f"shard-{shard:05d}.json", asdict(outcome))

    def remove(self) -> None:
        """Takes the journal away once the result is complete."""
        shutil.rmtree(self._folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found
