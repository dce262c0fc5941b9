#!/usr/bin/env python3
"""The verifier ``math`` beside plain math-verify and reasoning-gym's scorers: errors and time, in one run.

    python tools/bench_math_verifier.py --pairs tests/data/independent_math_pairs.txt

Every pair is graded by both, one after the other, on one core. A verdict of 1 for a wrong answer is a false
positive. Of reasoning-gym, the scorer that its families of plain answers share is asked, on the text of the
final answer. The last lines read ``NAME false_positives=... false_negatives=... p50_ms=... p99_ms=...``, in
milliseconds of CPU time.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _tree  # noqa: F401  (puts this tree on the path)

from copd_megatron.rewards import registry
from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.rewards.verifiers.reasoning_gym import library
from tests.support.math_pairs import FILES, FOLDER, Pair, math_pairs

Grade = Callable[[Pair], bool]
WARM_UP = [
    Pair(gold, rf"\boxed{{{gold}}}", True, "") for gold in (r"\frac{1}{2}", r"\{1,2\}", "x^2+1", "(0,1)")
]


def ours() -> Grade:
    """The verifier, as a warm grading process runs it."""
    verifier = registry.get("math")
    if verifier.prepare is not None:
        verifier.prepare()
    return lambda pair: verifier.verify(pair.response, pair.gold, {}) == 1.0


def plain() -> Grade:
    """math-verify as its documentation uses it, with its own time limits; the gold answer stands in a box."""
    import math_verify

    def grade(pair: Pair) -> bool:
        gold = math_verify.parse(rf"\boxed{{{pair.gold}}}")
        found = math_verify.parse(pair.response)
        return bool(math_verify.verify(gold, found))

    return grade


def gym() -> Grade:
    """The scorer that a family without one of its own inherits: equal text, or a share for a text within."""
    score: Any = library().get_score_answer_fn("gcd")

    def grade(pair: Pair) -> bool:
        return bool(score(final_answer(pair.response).text, {"answer": pair.gold, "metadata": {}}) >= 0.999)

    return grade


def measure(grade: Grade, pairs: Sequence[Pair]) -> tuple[int, int, list[float]]:
    """False positives, false negatives, and the milliseconds of CPU time of every verdict, which say the same
    on a busy machine.

    Each pair is graded once: a second time, what was parsed would be at hand."""
    false_positives = false_negatives = 0
    times = []
    for pair in WARM_UP:
        _verdict(grade, pair)
    for pair in pairs:
        begin = time.process_time()
        verdict = _verdict(grade, pair)
        times.append(1000 * (time.process_time() - begin))
        false_positives += verdict and not pair.is_right
        false_negatives += pair.is_right and not verdict
    return false_positives, false_negatives, times


def _verdict(grade: Grade, pair: Pair) -> bool:
    try:
        return grade(pair)
    except Exception as error:  # a library that fails on an answer has not taken it for right
        logging.debug("%s: %s", pair, error)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--pairs", type=Path, action="append", help="files of pairs; default: those in tests/data"
    )
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    graders = {"ours": ours(), "math-verify": plain(), "reasoning-gym": gym()}
    for file in arguments.pairs or [FOLDER / name for name in FILES]:
        pairs = math_pairs(str(file.resolve()))
        print(f"{file.name}: {len(pairs)} pairs, {sum(pair.is_right for pair in pairs)} right")
        for name, grade in graders.items():
            positives, negatives, times = measure(grade, pairs)
            cuts = statistics.quantiles(times, n=100, method="inclusive")
            print(
                f"{name} false_positives={positives} false_negatives={negatives} "
                f"p50_ms={cuts[49]:.2f} p99_ms={cuts[98]:.2f} max_ms={max(times):.1f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
