"""A run on one machine can be reached from that machine only."""

from __future__ import annotations

import ast
import contextlib
import ipaddress
import json
import os
import pickle
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import torch.distributed as dist

from copd_megatron.config import load_config
from copd_megatron.launch import torchrun
from copd_megatron.topology import store
from copd_megatron.topology.job_end import Verdict
from copd_megatron.topology.rank_table import read_table
from copd_megatron.topology.store import serve_store
from copd_megatron.topology.who_waits import UNKNOWN, RankState
from tests.support.hostile_peers import Strangers, forge_store, pickled_program
from tests.support.shadows import shadowing_folder

PACKAGE = Path(torchrun.__file__).parents[1]

ROOT = Path(__file__).resolve().parents[1]


def _local_job(monkeypatch: pytest.MonkeyPatch, **given: str) -> tuple[list[str], dict[str, str]]:
    """The command that ``copd train`` becomes, and its environment."""
    started: list[list[str]] = []

    def note(_: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execv", note)
    environment = dict(os.environ)
    os.environ.update(given)
    with pytest.raises(SystemExit):
        torchrun.become_torchrun(load_config(ROOT / "configs/two_branch_tiny.yaml"), ["train", "x.yaml"])
    changed = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    return started[0], changed


def test_nothing_of_a_local_run_listens_beyond_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent, its store, Gloo's pairs and the router, in a real job of three ranks. It is started in a
    folder whose files have the names of what it imports: they are left alone."""
    command, environment = _local_job(monkeypatch)
    place = command.index("copd_megatron.cli") - 1
    command = [*command[:place], "-m", "tests.support.loopback_ranks", str(tmp_path / "listening.json")]
    command = ["--nproc-per-node=3" if word.startswith("--nproc") else word for word in command]
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    done = subprocess.run(
        command,
        env={
            **{name: value for name, value in environment.items() if name not in launcher},
            "PYTHONPATH": str(ROOT),
        },
        cwd=shadowing_folder(tmp_path / "received"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "listening.json").read_text())
    assert len(said) == 3 and said[0]["agent"], "the agent serves the store"
    assert any(rank["rank"] for rank in said), "Gloo's ranks listen for each other"
    for rank in said:
        for address in (*rank["rank"], *rank["agent"]):
            ip = ipaddress.ip_address(address)
            mapped = getattr(ip, "ipv4_mapped", None)
            assert (mapped or ip).is_loopback, f"{address} is reachable from elsewhere"


def test_a_store_listens_on_the_address_it_is_given_and_no_other() -> None:
    served = serve_store("127.0.0.1", 0, timedelta(seconds=10))
    client = dist.TCPStore(
        "127.0.0.1", served.port, None, False, timedelta(seconds=10), wait_for_workers=False
    )
    client.set("a", "b")
    assert served.get("a") == b"b"
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", served.port))


def test_stores_are_served_in_one_place() -> None:
    """torch's own serves on all interfaces, whatever host it is given."""
    served = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("TCPStore"):
                is_master = [*node.args[3:4], *(k.value for k in node.keywords if k.arg == "is_master")]
                if not is_master or ast.unparse(is_master[0]) != "False":
                    served.append(str(path.relative_to(PACKAGE)))
    assert served == ["topology/store.py"]


def test_a_taken_port_and_a_foreign_address_are_errors() -> None:
    served = serve_store("127.0.0.1", 0, timedelta(seconds=10))
    with pytest.raises(OSError, match="in use"):
        serve_store("127.0.0.1", served.port, timedelta(seconds=1))
    with pytest.raises(OSError, match="assign"):
        serve_store("192.0.2.1", 0, timedelta(seconds=1))


def _resolves_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_a_name_that_means_loopback_to_its_machine_alone_is_not_bound_to_loopback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Debian's 127.0.1.1: the other machines know the node by another address, and must reach it."""
    _resolves_to("127.0.1.1", monkeypatch)
    assert store._listen_on("node1", 7) == (socket.AF_INET, ("", 7))
    assert "set MASTER_ADDR" in caplog.text and "node1" in caplog.text
    assert store.interface_to("node1") is None
    _resolves_to("192.0.2.7", monkeypatch)
    assert store._listen_on("node1", 7) == (socket.AF_INET, ("192.0.2.7", 7))


def test_loopback_is_the_interface_of_a_job_on_one_machine() -> None:
    for host in ("127.0.0.1", "localhost"):
        assert store.interface_to(host) == "lo"
    assert store.interface_to("no-such-host.invalid") is None


def test_the_clusters_network_does_not_expose_a_run_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login shell that names the interface for jobs of several nodes."""
    _, environment = _local_job(monkeypatch, GLOO_SOCKET_IFNAME="eth0", NCCL_SOCKET_IFNAME="ib0")
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


# --- other users of the machine ---------------------------------------------------------------------------


@contextlib.contextmanager
def _talking(out: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A real job of three ranks that talk for a while."""
    command, environment = _local_job(monkeypatch)
    place = command.index("copd_megatron.cli") - 1
    command = [*command[:place], "-m", "tests.support.attacked_ranks", str(out), str(seconds)]
    command = ["--nproc-per-node=3" if word.startswith("--nproc") else word for word in command]
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    with (out.parent / "said").open("w") as said:
        job = subprocess.Popen(
            command,
            env={
                **{name: value for name, value in environment.items() if name not in launcher},
                "PYTHONPATH": str(ROOT),
            },
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield job
        finally:
            job.terminate()
            job.wait(timeout=60)


@pytest.mark.timeout(300)
def test_peers_that_make_no_sense_disturb_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage, silence, resets, endless lengths, and requests whose answers nobody reads, from before the
    ranks have met until they part: they hear each other as if nobody else were there."""
    strangers = Strangers()
    with _talking(tmp_path / "rounds", 5.0, monkeypatch) as job:
        while job.poll() is None:
            strangers.attack(job.pid)
            time.sleep(0.02)
        strangers.leave()
        assert job.returncode == 0, (tmp_path / "said").read_text()[-3000:]
    assert int((tmp_path / "rounds").read_text()) > 20
    assert len(strangers.reached) == 12 and min(strangers.reached.values()) >= 8, strangers.reached


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["watch/", "arrived/", "agreed", "notes/", ""])
def test_a_forged_store_runs_nothing_and_hangs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who writes to the store may end the run, since it has no password: by a sentence, and soon. What it
    writes is no code."""
    evil = pickled_program(tmp_path / "ran")
    pickle.loads(evil)
    (tmp_path / "ran").unlink()  # else the test would prove nothing
    with _talking(tmp_path / "rounds", 5.0, monkeypatch) as job:
        written = forge_store(job.pid, evil, lambda key: what in key, seconds=60.0)
        job.wait(timeout=150)
        said = (tmp_path / "said").read_text()
    assert written and not (tmp_path / "ran").exists()
    if job.returncode == 0:
        assert int((tmp_path / "rounds").read_text()) > 0, "what was heard was right"
    else:
        assert "UnicodeDecodeError" not in said and "copd: the run ended: " in said, said[-3000:]


def test_a_forged_verdict_is_read_and_shown_harmlessly() -> None:
    for value in (b"\x80\x04\x95", b"stuck\t\xff\x1b[31m" + b"x" * 10**6, b"", b"\t\t\t"):
        verdict = Verdict.parse(value)
        assert not verdict.hopeless and len(verdict.reason) < 20_000 and "\x1b" not in verdict.reason
    verdict = Verdict(hopeless=True, reason="no step can help: caf\u00e9\tand more")
    assert Verdict.parse(str(verdict).encode()) == verdict


@pytest.mark.parametrize("value", [b"\x80\x04", b"", b"x", b"1\t2", b"1\ta\tb\tc", b"\t" * 9, b"9" * 5000])
def test_forged_states_of_ranks_are_unknown(value: bytes) -> None:
    served = serve_store("127.0.0.1", 0, timedelta(seconds=10))
    mine = RankState(rank=0, branch="a", branch_rank=0, status="running", path="p", count=1, seconds=0.0)
    for kind in ("state", "beat"):
        for rank in (0, 1):
            served.set(f"watch/{kind}/{rank}", cast(str, value))
    table = read_table(served, {0: ("a", 0), 1: ("b", 0)}, 0.01, mine)
    assert table[0] == mine and table[1].status == UNKNOWN
