"""A run on one machine can be reached from that machine only."""

from __future__ import annotations

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
from copd_megatron.topology.store import serve_store

ROOT = Path(__file__).resolve().parents[1]


def _local_job(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, str]]:
    """The command that ``copd train`` becomes, and its environment."""
    started: list[list[str]] = []

    def note(_: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execv", note)
    environment = dict(os.environ)
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
    store = serve_store("127.0.0.1", 0, timedelta(seconds=10))
    client = dist.TCPStore(
        "127.0.0.1", store.port, None, False, timedelta(seconds=10), wait_for_workers=False
    )
    client.set("a", "b")
    assert store.get("a") == b"b"
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", store.port))


def test_a_taken_port_and_a_foreign_address_are_errors() -> None:
    store = serve_store("127.0.0.1", 0, timedelta(seconds=10))
    with pytest.raises(OSError, match="in use"):
        serve_store("127.0.0.1", store.port, timedelta(seconds=1))
    with pytest.raises(OSError, match="assign"):
        serve_store("192.0.2.1", 0, timedelta(seconds=1))
