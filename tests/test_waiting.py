"""What tells the person who watches a run that something which takes long still goes on."""

from __future__ import annotations

import logging
import time

import pytest

from copd_megatron.launch.waiting import Countdown, waiting


def test_a_long_wait_is_told_now_and_then_and_a_short_one_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with waiting("a short thing"):
        pass
    with waiting("a long thing", every=0.05):
        time.sleep(0.4)
    assert {m.partition(":")[0] for m in caplog.messages} == {"a long thing"}
    assert caplog.messages[0] == "a long thing: 0 s so far"


def test_a_count_comes_with_an_estimate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    countdown = Countdown("base on image", 10, clock=lambda: now[0])
    for _ in range(10):
        now[0] += 4.0
        countdown.add()
    assert caplog.messages == [
        "base on image: 3 of 10 responses, 28 s to go",
        "base on image: 6 of 10 responses, 16 s to go",
        "base on image: 9 of 10 responses, 4 s to go",
    ]
