"""Shards that are not files of this machine: fetched once, whole or not at all."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.data import (
    DataError,
    ShardSet,
    check_shards,
    remote,
)
from tests.support.shards import write


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fetched(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


def test_piped_shards_are_fetched_once_and_read_like_files(tmp_path: Path, cache: Path) -> None:
    local = ShardSet.open([write(tmp_path, 30)])
    log = tmp_path / "log"
    pattern = f"pipe:echo fetch >> {log}; cat {tmp_path}/toy-train-{{000000..000002}}.tar"
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(ShardSet.open, [[pattern]] * 4))
    for found in sets:
        assert found.refs == local.refs and found.fingerprint == local.fingerprint
        assert found.read(found.refs[7]) == local.read(local.refs[7])
    assert log.read_text().count("fetch") == 3
    assert fetched(cache) == [f"toy-train-{i:06d}.tar" for i in range(3)]


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[Callable[[str], str]]:
    """A web server; yields what names a file of it as a shard.

    webdataset fetches http by curl. On a machine without curl a pipe does that, so that all else is tested.
    """
    read = "web.urlopen(sys.argv[1])"
    program = f"import shutil, sys, urllib.request as web; shutil.copyfileobj({read}, sys.stdout.buffer)"
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def shard(name: str) -> str:
            address = f"http://127.0.0.1:{server.server_port}/{name}"
            return address if shutil.which("curl") else f"pipe:{sys.executable} -c '{program}' {address}"

        try:
            yield shard
        finally:
            server.shutdown()


def test_shards_come_from_a_web_server(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, 3)
    with serving(partial(QuietHandler, directory=str(tmp_path))) as shard:
        assert len(check_shards([shard("toy-train-000000.tar")])) == 3
        with pytest.raises(DataError, match=r"absent\.tar: cannot be fetched.*Check the address"):
            check_shards([shard("absent.tar")])
    assert fetched(cache) == ["toy-train-000000.tar"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("head -c 3000 {path}", "not a whole tar .cut off"),
        ("cat {path}; exit 3", "cannot be fetched"),
        ("echo hello", "not a whole tar"),
        ("no-such-program", "not a whole tar|cannot be fetched"),
    ],
)
def test_a_shard_that_does_not_arrive_whole_is_refused(
    tmp_path: Path, cache: Path, command: str, message: str
) -> None:
    write(tmp_path, 10)
    pattern = "pipe:" + command.format(path=tmp_path / "toy-train-000000.tar")
    with pytest.raises(DataError, match=message):
        ShardSet.open([pattern])
    assert fetched(cache) == []


class Endless(QuietHandler):
    """Sends the beginning of a tar, and zeros until nobody listens."""

    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
                Endless.sent += 1 << 16
        except OSError:
            return


def test_a_server_that_never_ends_is_left(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPD_MAX_SHARD_GIB", str(8 / 1024))
    said = r"endless\.tar: .*more than 0\.0078125 GiB.*COPD_MAX_SHARD_GIB"
    with serving(Endless) as shard, pytest.raises(DataError, match=said):
        ShardSet.open([shard("endless.tar")])
    assert 8 << 20 < Endless.sent < 64 << 20, "what lies in sockets and pipes, and no more"
    assert fetched(cache) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("yes; sleep 1000", "more than .* GiB, the limit"),
        ("head -c 3000000 /dev/zero; exec sleep 1000", "nothing has arrived|only .* arrived for"),
        ("while echo; do sleep 0.01; done", "only .* bytes have arrived for"),
        ("cat {path}; exec sleep 1000 >&-", "has sent all, and runs on"),
    ],
)
def test_a_program_that_never_ends_is_ended(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.setenv("COPD_MAX_SHARD_GIB", str(8 / 1024))
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(remote, "_END_SECONDS", 0.5)
    write(tmp_path, 10)
    begin = time.monotonic()
    with pytest.raises(DataError, match=message):
        ShardSet.open(["pipe:" + command.format(path=tmp_path / "toy-train-000000.tar")])
    assert time.monotonic() - begin < 60 and fetched(cache) == []


def test_a_disk_keeps_room_for_others(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    usage = shutil.disk_usage(tmp_path)
    for room, fits in ((1 << 20, True), (100, False), (-5, False)):
        little = usage._replace(free=(1 << 30) + room)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, little=little: little)
        pattern = f"pipe:cat {tmp_path}/toy-train-000000.tar # {room}"
        if fits:
            assert len(ShardSet.open([pattern])) > 0
            continue
        with pytest.raises(DataError, match=f"more than {max(room, 0)} bytes, which the disk of .* has room"):
            ShardSet.open([pattern])


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf", "1e999"])
def test_limits_that_are_none(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("COPD_MAX_SHARD_GIB", text)
    with pytest.raises(DataError, match=r"COPD_MAX_SHARD_GIB=.* is no number of GiB above 0"):
        ShardSet.open([f"pipe:cat {write(tmp_path, 3)}"])
