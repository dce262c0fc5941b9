"""Lines that say how far a command has come."""

from __future__ import annotations

import time

import pytest

from copd_megatron.cli.progress import StepLines


def test_imports_before_the_first_task_are_no_measure_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines = StepLines()
    now += 12  # of imports
    lines.prepared(1, 401)
    now += 10
    lines.prepared(101, 401)
    told = capsys.readouterr().out.splitlines()
    assert told == ["  task 1 of 401 drawn; 12 s", "  task 101 of 401 drawn; 22 s, 30 s to go"]
