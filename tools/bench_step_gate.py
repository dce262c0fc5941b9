"""How the processes of ``bench_step.py`` take turns: a line on standard input starts one, a line answers.

Standard library only, because TRL's environment runs it as well.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

MARK = "@bench "
"""Begins the lines that are answers; everything else that a process prints is for its log."""

Answer = dict[str, float]
"""Seconds by phase; those of the CPU under ``cpu`` and the phase."""


class Gate:
    """Waits for its turn before each step, and answers with the step's seconds."""

    def __init__(self) -> None:
        # whatever a library prints belongs to the log, not between the answers
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def ready(self, **facts: Any) -> None:
        """The process has loaded everything."""
        self._say(facts)

    def wait(self) -> bool:
        """Blocks until it is this process's turn; False: there are no more turns."""
        return sys.stdin.readline().strip() == "step"

    def answer(self, seconds: Mapping[str, float]) -> None:
        """Ends a turn."""
        self._say(seconds)

    def serve(self, step: Callable[[], Mapping[str, float]]) -> None:
        """One call of ``step`` a turn."""
        self.ready()
        while self.wait():
            self.answer(step())

    def _say(self, values: Mapping[str, Any]) -> None:
        self._answers.write(MARK + json.dumps(values) + "\n")
        self._answers.flush()
