"""``copd`` in a fresh interpreter, which says what it had imported when it ended."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from tests.support.commands import ROOT, environment


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command came back with."""

    status: int
    stderr: str
    modules: set[str]
    """Heavy packages that it had imported when it gave up."""

    @property
    def message(self) -> str:
        """The single message; fails where there is more, a traceback say."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = self.stderr.strip().splitlines()
        assert sum(line.startswith("copd: ") for line in lines) == 1, self.stderr
        return self.stderr.strip().removeprefix("copd: ")


_WATCHED = """
import sys
sys.argv = ["copd", *sys.argv[1:]]
import runpy
try:
    runpy.run_module("copd_megatron.cli", run_name="__main__", alter_sys=True)
finally:
    loaded = {"torch", "megatron", "vllm", "transformers"} & set(sys.modules)
    print("LOADED", *sorted(loaded))
"""


def watched_copd(*arguments: str, **variables: str) -> Answer:
    """Runs the command as ``python -m copd_megatron.cli`` does; ``variables`` go into its environment."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**variables),
        cwd=ROOT,
        check=False,
    )
    *_, last = [line for line in done.stdout.splitlines() if line.startswith("LOADED")] or ["LOADED"]
    return Answer(status=done.returncode, stderr=done.stderr, modules=set(last.split()[1:]))
