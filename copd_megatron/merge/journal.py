"""What an interrupted merge has finished: kept beside the half-written result, so that it can go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

_FOLDER = ".merge"


class Journal:
    """One small file per finished shard, each renamed into place: ranks write theirs without locks.

    Args:
        folder: the unfinished result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _FOLDER

    def begin(self, fingerprint: str) -> None:
        """Starts a journal for the job that ``fingerprint`` describes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / "job.json", {"fingerprint": fingerprint})

    def fingerprint(self) -> str | None:
        """The job whose journal lies here; None: none, or one that was not even begun."""
        return _read(self._folder / "job.json", "fingerprint")

    def finished(self, shard: int) -> str | None:
        """Digest of a finished shard; None: it is not finished."""
        return _read(self._folder / f"shard-{shard:05d}.json", "digest")

    def finish(self, shard: int, digest: str) -> None:
        """Records that a shard is complete."""
        _write(self._folder / f"shard-{shard:05d}.json", {"digest": digest})

    def remove(self) -> None:
        """Takes the journal away once the result is complete."""
        shutil.rmtree(self._folder)


def _write(path: Path, content: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def _read(path: Path, key: str) -> str | None:
    if not path.is_file():
        return None
    found: str = json.loads(path.read_text())[key]
    return found
