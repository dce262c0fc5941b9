"""Shards that are not files of this machine: fetched whole by webdataset, then read like any other.

A run reads samples in an order of its own and by reference, so it needs the whole shard at hand. A pattern
with one of webdataset's schemes, such as ``https://host/math-{000000..000007}.tar``, ``gs://...`` or
``pipe:aws s3 cp s3://bucket/math-000000.tar -``, names what ``webdataset.gopen`` opens; the bytes go to a
folder on this machine, once for all its ranks. ``WDS_CACHE``, webdataset's own variable, names the folder. A
shard that was fetched is not fetched again: delete it if the original has changed.

``pipe:`` runs a shell command out of the configuration, as it is meant to.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copd_megatron.data.tar_scan import TarDamageError, scan_open_tar
from copd_megatron.errors import DataError
from copd_megatron.untrusted.whole_file import open_appending, replacing

logger = logging.getLogger(__name__)

_SCHEME = re.compile(r"(pipe|https?|sftp|ftps|scp|gs|hf|ais):")
_NAME = re.compile(r"([\w.-]+)\.tar\b")
_CHUNK_BYTES = 1 << 20
_SILENCE_SECONDS = 600.0
"""For which a source may send nothing. Other ranks wait for the one that fetches."""


def is_remote(pattern: str) -> bool:
    """Whether a shard pattern names something that has to be fetched."""
    return _SCHEME.match(pattern) is not None


def fetch(source: str) -> Path:
    """The local copy of a remote shard, fetched if it is not there yet.

    The file is named as the last ``<name>.tar`` in ``source``, in a folder of its own. Processes that ask at
    the same time wait for the first.

    Raises DataError: it cannot be fetched, or what arrives is not a whole tar.
    """
    digest = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    names = _NAME.findall(source)
    path = _folder() / digest / f"{names[-1] if names else f'shard-{digest}'}.tar"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if not path.exists():
                _fetch_to(path, source)
    except OSError as error:
        raise DataError(
            f"shard {source}: cannot be fetched to {path} ({error}). Check the address, and that curl (or "
            "what the scheme needs) works on this machine; WDS_CACHE names another folder."
        ) from error
    return path


def _folder() -> Path:
    if named := os.environ.get("WDS_CACHE"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "copd_megatron" / "shards"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time; the lock ends with the process that holds it."""
    with open_appending(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_to(path: Path, source: str) -> None:
    from webdataset.gopen import gopen  # here, because it imports torch

    logger.info("fetching shard %s to %s", source, path)
    try:
        with replacing(path) as file:
            with gopen(source, "rb") as stream:  # its end checks the exit status
                for chunk in _arriving(stream):
                    file.write(chunk)
            file.flush()
            for _ in scan_open_tar(file.fileno()):
                pass
    except TarDamageError as error:
        raise DataError(
            f"shard {source}: what arrived is not a whole tar ({error}). Fetch it again."
        ) from error


def _arriving(stream: Any) -> Iterator[bytes]:
    """What webdataset's ``Pipe`` reads from its program. Raises OSError if nothing comes for too long."""
    pipe = stream.stream
    while True:
        if not select.select([pipe], [], [], _SILENCE_SECONDS)[0]:
            stream.ignore_errors = True  # its end is our doing
            stream.proc.kill()  # else closing would wait for it
            raise TimeoutError(f"nothing has arrived for {_SILENCE_SECONDS:.0f} s")
        if not (chunk := pipe.read1(_CHUNK_BYTES)):
            return
        yield chunk
