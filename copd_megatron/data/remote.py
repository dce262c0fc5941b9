"""Shards that are not files of this machine: fetched whole by webdataset, then read like any other.

A run reads samples in an order of its own and by reference, so it needs the whole shard at hand. A pattern
with one of webdataset's schemes, such as ``https://host/math-{000000..000007}.tar``, ``gs://...`` or
``pipe:aws s3 cp s3://bucket/math-000000.tar -``, names what ``webdataset.gopen`` opens; the bytes go to a
folder on this machine, once for all its ranks. ``WDS_CACHE``, webdataset's own variable, names the folder. A
shard that was fetched is not fetched again: delete it if the original has changed.

Who sends may send without end. A shard may have ``COPD_MAX_SHARD_GIB`` (64), and never so much that the disk
it goes to is left with less than 1 GiB; nothing of it is kept otherwise. A source that sends less than 1 MiB
in ten minutes is given up.

``pipe:`` runs a shell command out of the configuration, as it is meant to.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from copd_megatron.data.tar_scan import TarDamageError, scan_open_tar
from copd_megatron.errors import DataError
from copd_megatron.untrusted.whole_file import open_appending, replacing

logger = logging.getLogger(__name__)

_SCHEME = re.compile(r"(pipe|https?|sftp|ftps|scp|gs|hf|ais):")
_NAME = re.compile(r"([\w.-]+)\.tar\b")
_CHUNK_BYTES = 1 << 20
_SILENCE_SECONDS = 600.0
"""For which a source may send as good as nothing. Other ranks wait for the one that fetches."""
_LEAST_BYTES = 1 << 20
"""That arrive in this time."""
_END_SECONDS = 60.0
"""For which a program may run on that has closed its output."""
_MAX_GIB: Final = "COPD_MAX_SHARD_GIB"
_DEFAULT_MAX_GIB = 64.0
_KEPT_FREE_BYTES = 1 << 30


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
        limit, problem = _limit(path.parent)
        with replacing(path) as file:
            with _ended(gopen(source, "rb")) as stream:
                arrived = 0
                for chunk in _arriving(stream):
                    arrived += len(chunk)
                    if arrived > limit:
                        raise OSError(errno.EFBIG, problem)
                    file.write(chunk)
            file.flush()
            for _ in scan_open_tar(file.fileno()):
                pass
    except TarDamageError as error:
        raise DataError(
            f"shard {source}: what arrived is not a whole tar ({error}). Fetch it again."
        ) from error


def _limit(folder: Path) -> tuple[int, str]:
    """Most bytes that a shard may have, and what is said of one that has more."""
    text = os.environ.get(_MAX_GIB) or str(_DEFAULT_MAX_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 < gib <= 2**30:
        raise DataError(f"{_MAX_GIB}={text!r} is no number of GiB above 0.")
    room = shutil.disk_usage(folder).free - _KEPT_FREE_BYTES
    if room < gib * 2**30:
        return max(room, 0), f"it has more than {max(room, 0)} bytes, which the disk of {folder} has room for"
    return int(gib * 2**30), f"it has more than {gib:g} GiB, the limit; is it a shard? {_MAX_GIB} allows more"


@contextmanager
def _ended(stream: Any) -> Iterator[Any]:
    """webdataset's ``Pipe``, whose program has ended behind the block. Its exit status is checked, unless
    the block raised. Raises OSError."""
    try:
        yield stream
        stream.timeout = _END_SECONDS
        stream.close()
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"its program has sent all, and runs on for {_END_SECONDS:.0f} s") from error
    finally:
        stream.ignore_errors = True  # where it still runs, its end is our doing
        if stream.proc.poll() is None:
            stream.proc.kill()
            stream.proc.wait()
        stream.stream.close()


def _arriving(stream: Any) -> Iterator[bytes]:
    """What webdataset's ``Pipe`` reads from its program. Raises OSError if too little comes for too long."""
    pipe, window_bytes, window_ends = stream.stream, 0, time.monotonic() + _SILENCE_SECONDS
    while True:
        left = window_ends - time.monotonic()
        if left <= 0 and window_bytes >= _LEAST_BYTES:
            window_bytes, window_ends = 0, time.monotonic() + _SILENCE_SECONDS
            continue
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            if window_bytes >= _LEAST_BYTES:
                continue
            what = f"only {window_bytes} bytes have" if window_bytes else "nothing has"
            raise TimeoutError(f"{what} arrived for {_SILENCE_SECONDS:.0f} s")
        if not (chunk := pipe.read1(_CHUNK_BYTES)):
            return
        window_bytes += len(chunk)
        yield chunk
