"""The command line and the tools as a user calls them. pytest has ``tools`` on its path, as Python has for a
script there."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without those of a launcher: one thread a process, no GPU."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    ours = {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return inherited | ours | changes


def python(*arguments: object, timeout: float = 550, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python arguments...`` in a process of its own, at the repository's root: its status and output.

    Args:
        timeout: seconds after which it is killed.
        variables: added to its environment.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**variables),
        cwd=ROOT,
        check=False,
    )


def copd(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``copd arguments...``, as ``python`` runs it."""
    return python("-m", "copd_megatron.cli", *arguments)


def run_script(name: str, *arguments: object, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    """``python tools/<name> arguments...``, as ``python`` runs it.

    Args:
        hash_seed: of Python's string hashes, which no output may depend on.
    """
    return python(f"tools/{name}", *arguments, timeout=300, PYTHONHASHSEED=hash_seed)


def run_script_without(
    packages: Sequence[str], name: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """As ``run_script``, where importing any of some packages fails."""
    script = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({list(packages)}))\n"
        f"sys.path.insert(0, 'tools')\nsys.argv = {[f'tools/{name}', *map(str, arguments)]}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return python("-c", script, timeout=300)


def load_tool(name: str) -> dict[str, Any]:
    """What ``tools/<name>.py`` defines."""
    return runpy.run_path(str(ROOT / f"tools/{name}.py"))


def run_tool(name: str, *arguments: object) -> int:
    """``python tools/<name>.py arguments...`` within this process; its exit status."""
    path, before = str(ROOT / f"tools/{name}.py"), sys.argv
    sys.argv = [path, *map(str, arguments)]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    finally:
        sys.argv = before
    raise AssertionError(f"{path} ended without a status")
