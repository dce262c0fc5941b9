"""``tools/gpu_check.py`` as a process of its own: what it wrote and what it printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.commands import ROOT


def run_gpu_check(work: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Results and output of a call; models are kept in ``work`` from call to call."""
    out = work / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "tools/gpu_check.py", "--work", str(work / "work"), "--out", str(out)),
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stderr
    return json.loads(out.read_text()), done.stdout
