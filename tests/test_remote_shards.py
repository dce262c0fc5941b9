"""Shards that are not files of this machine: fetched once, whole or not at all."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.data import (
    DataError,
    ShardSet,
    check_shards,
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
    for remote in sets:
        assert remote.refs == local.refs and remote.fingerprint == local.fingerprint
        assert remote.read(remote.refs[7]) == local.read(local.refs[7])
    assert log.read_text().count("fetch") == 3
    assert fetched(cache) == [f"toy-train-{i:06d}.tar" for i in range(3)]


def test_shards_come_from_a_web_server(tmp_path: Path, cache: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("webdataset fetches by curl, which this machine does not have")
    write(tmp_path, 3)
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert len(check_shards([f"{address}/toy-train-000000.tar"])) == 3
        with pytest.raises(DataError, match=r"absent\.tar: cannot be fetched.*Check the address"):
            check_shards([f"{address}/absent.tar"])
        server.shutdown()
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
