"""The tools that measure scale, small: their figures are those of the formulas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, environment


def run_tool(name: str, out: Path, *words: str) -> Any:
    command = [sys.executable, str(ROOT / "tools" / name), *words, "--json", str(out)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text()), result.stdout


def test_keys_and_sockets_grow_with_the_ranks(tmp_path: Path) -> None:
    words = ("--ranks", "8", "24", "--processes", "4")
    found, shown = run_tool("simulate_width.py", tmp_path / "width.json", *words)
    for job in found:
        assert job["keys"] == 5 * job["ranks"] + 1
        assert job["store_sockets"] == 3 * job["ranks"] + 3
        assert all(seconds > 0 for seconds in job["phases"].values())
    assert "store keys" in shown


@pytest.mark.slow
def test_bytes_between_branches_follow_the_formula(tmp_path: Path) -> None:
    words = ("--branches", "2", "3", "--rows", "8", "--tokens", "256", "--repeats", "1")
    found, shown = run_tool("bench_branches.py", tmp_path / "branches.json", *words)
    sent = {(one["topology"], one["branches"]): one["sent"] for one in found}
    per_edge = 8 * (4 * 256 + 4 * 128)
    for (topology, branches), num_bytes in sent.items():
        edges = 2 * (branches - 1) if topology == "hub_and_spoke" else branches * (branches - 1)
        tables = 2 * (8 * 150 + 200)
        assert edges * per_edge < num_bytes < edges * (per_edge + tables), (topology, branches)
    assert "teaching share" in shown
