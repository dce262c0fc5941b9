#!/usr/bin/env python3
"""Verdicts a second of the verifier ``code``, on one core.

    python tools/bench_code_verifier.py --verdicts 200 --cases 1

Grades a right program against test cases, one verdict after the other, with this process and the sandboxes
pinned to one core, in turns with the same program in a plain process, which shows how busy the machine is.
The last lines read ``verdicts_per_second=... p50_ms=... p99_ms=...`` and ``plain_p50_ms=...``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from _numbers import count

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.rewards import sandbox
from copd_megatron.rewards.verifiers.code import code, last_program

RESPONSE = """```python
def solve(numbers):
    return sorted(numbers)[len(numbers) // 2]

print(solve([int(word) for word in input().split()]))
```"""


def measure(verdicts: int, cases: int) -> tuple[list[float], list[float]]:
    """Seconds of every verdict, and of every run in a plain process.

    Raises RuntimeError where a right program is graded wrong.
    """
    tests = json.dumps({"inputs": ["5 1 4 2 3\n"] * cases, "outputs": ["3\n"] * cases})
    seconds, plain = [], []
    for _ in range(verdicts):
        started = time.perf_counter()
        if code(RESPONSE, tests, {}) != 1.0:
            raise RuntimeError("a right program was graded wrong: the sandbox is too slow, or does not work")
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        command = [sys.executable, "-s", "-S", "-c", last_program(RESPONSE) or ""]
        subprocess.run(command, input=b"5 1 4 2 3\n", capture_output=True, check=True)
        plain.append(time.perf_counter() - started)
    return seconds, plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--verdicts", type=count, default=200)
    parser.add_argument("--cases", type=count, default=1, help="test cases per verdict")
    arguments = parser.parse_args()
    sandbox.require()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds, plain = map(sorted, measure(arguments.verdicts, arguments.cases))
    rate = len(seconds) / sum(seconds)
    p99 = seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    print(
        f"verdicts_per_second={rate:.1f} p50_ms={1000 * statistics.median(seconds):.1f} "
        f"p99_ms={1000 * p99:.1f}"
    )
    print(f"plain_p50_ms={1000 * statistics.median(plain):.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
