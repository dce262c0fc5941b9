"""A run on one machine can be reached from that machine only."""

from __future__ import annotations

import ast
import ipaddress
import json
import os
import socket
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from copd_megatron.config import load_config
from copd_megatron.launch import torchrun
from copd_megatron.topology import store
from copd_megatron.topology.store import serve_store

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
    """The agent, its store, Gloo's pairs and the router, in a real job of three ranks."""
    command, environment = _local_job(monkeypatch)
    place = command.index("copd_megatron.cli") - 1
    command = [*command[:place], "-m", "tests.support.loopback_ranks", str(tmp_path / "listening.json")]
    command = ["--nproc-per-node=3" if word.startswith("--nproc") else word for word in command]
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    done = subprocess.run(
        command,
        env={name: value for name, value in environment.items() if name not in launcher},
        cwd=ROOT,
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
