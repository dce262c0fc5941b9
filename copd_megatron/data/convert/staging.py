"""Where new files wait until all of them are complete: a hidden folder in the one that they are for.

From there they are published by renaming, which needs no room on the disk. The folder is locked for as long
as its process lives, however that ends, so that a later command knows what a killed one has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_PREFIX: Final = ".copd-unfinished-"
_LOCK: Final = "lock"
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Staging:
    """A staging folder in ``out``. What is not published when it closes is deleted."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / f"{_PREFIX}{secrets.token_hex(6)}"
        self._lock = -1

    def __enter__(self) -> Self:
        """Also deletes what killed processes have left in ``out``.

        Raises:
            OSError: nothing can be written there.
        """
        for left in self.out.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        with self.failures():
            try:
                while not self._take():  # another command took it for one that was left, before it was locked
                    pass
            except BaseException:
                _remove(self.folder)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self.folder)
        os.close(self._lock)

    def _take(self) -> bool:
        """Makes and locks the folder; False if it was gone before it was locked."""
        self.folder.mkdir(exist_ok=True)
        try:
            self._lock = os.open(self.folder / _LOCK, _FLAGS, 0o600)
        except FileNotFoundError:
            return False
        with contextlib.suppress(OSError):  # a file system without locks: there nothing counts as left
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if (self.folder / _LOCK).exists():
            return True
        os.close(self._lock)
        return False

    @contextlib.contextmanager
    def failures(self, name: str = "", state: str = "") -> Iterator[None]:
        """Makes of an OSError one that names the file and says how ``out`` was left.

        Args:
            name: of the file that is written; empty: it is the folder.
            state: how ``out`` is left; empty: as it was.
        """
        try:
            yield
        except OSError as error:
            state = state or "was left as it was; free some room or choose another folder"
            why = f"cannot be written ({error.strerror or error}); {self.out} {state}, and start again"
            raise OSError(error.errno, why, str(self.out / name)) from error

    def publish(self, new: Mapping[str, Sequence[str]], old: Mapping[str, Sequence[Path]]) -> None:
        """Gives all files their places, by renaming, and deletes older ones that no new one replaces.

        Killed in between, it leaves sets without files, but never files of a new first set beside those of
        an older other one, whose prompts they may hold: those are deleted first, and published last.

        Args:
            new: names of files here, by set; the training set first.
            old: what each set has in ``out``.

        Raises:
            OSError: it says which files are in their places.
        """
        first, *others = new
        started = False
        for prefix in (*others, first):
            for path in old[prefix]:
                if prefix == first and path.name in new[first]:
                    continue
                with self.failures(path.name, _half_way(new) if started else ""):
                    path.unlink()
                started = True
        for names in new.values():
            for name in names:
                with self.failures(name, _half_way(new) if started else ""):
                    os.replace(self.folder / name, self.out / name)
                started = True


def _half_way(sets: Iterable[str]) -> str:
    patterns = " and ".join(f"{prefix}-*.tar" for prefix in sets)
    return f"holds some of the new shards and lacks some; delete {patterns} there"


def _remove_if_left(folder: Path) -> None:
    """Deletes a staging folder of ours whose process is gone."""
    with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile: not in our way
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return
        lock = os.open(folder / _LOCK, _FLAGS, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Deletes a staging folder and its files; the lock last, since it says that the folder is in use."""
    with contextlib.suppress(OSError):
        for path in (*folder.glob("*.tar"), folder / _LOCK):
            path.unlink(missing_ok=True)
        folder.rmdir()
