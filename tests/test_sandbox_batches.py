"""Many test cases of one program: several share a sandbox, and each is judged as if it were alone."""

from __future__ import annotations

import json

import pytest

from copd_megatron.rewards import sandbox
from copd_megatron.rewards.sandbox import Ended, Limits, Result, bubblewrap
from copd_megatron.rewards.sandbox.batch import _results
from copd_megatron.rewards.verifiers.code import code

works = pytest.mark.skipif(sandbox.check() is not None, reason=f"no sandbox here: {sandbox.check()}")
LIMITS = Limits(cpu_seconds=1, wall_seconds=1.0, output_bytes=100_000)


def runs(program: str, count: int = 3, mode: str = "program") -> list[Result]:
    inputs = [f"{number}\n" for number in range(count)]
    return sandbox.run_batch(program.encode(), inputs, mode=mode, limits=LIMITS)


def grade(program: str, tests: object, **metadata: object) -> float:
    return code(f"```python\n{program}\n```", json.dumps(tests), {"time_limit": 1, **metadata})


@works
def test_every_input_has_its_output() -> None:
    found = runs("print(2 * int(input()))", 60)
    assert [(one.ended, one.output) for one in found] == [
        (Ended.ok, b"%d\n" % (2 * number)) for number in range(60)
    ]


@works
def test_many_cases_start_few_sandboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sandbox for each, 300 cases would take the whole time limit of a sample, 10 s."""
    started = []
    command = bubblewrap.command
    monkeypatch.setattr(bubblewrap, "command", lambda *a, **k: started.append(a) or command(*a, **k))
    numbers = range(126)
    tests = {"inputs": [f"{n}\n" for n in numbers], "outputs": [f"{2 * n}\n" for n in numbers]}
    assert grade("print(2 * int(input()))", tests) == 1.0
    assert 1 + 125 // 25 <= len(started) <= 7, "one more where nobody knew yet that the sandbox works"
    tests["outputs"][-1] = "0"
    assert grade("print(2 * int(input()))", tests) == 0.0
    assert grade("print(2 * int(input()))", tests, partial=True) == 125 / 126
    starts = len(started)
    assert grade("print(1)", tests) == 0.0
    assert len(started) - starts < 6, "a wrong program costs one start"


SHARED = {
    "files": "import os\nprint(len(os.listdir('/tmp')))\nos.makedirs('/tmp/a/b')\nopen('/tmp/a/b/c', 'w')\n"
    "os.chmod('/tmp/a/b', 0)\nos.chmod('/tmp/a', 0)\nos.symlink('/', '/tmp/root')",
    "a child that goes on": "import os, signal, time\nalive = []\nfor pid in range(3, 300):\n    try:\n"
    "        os.kill(pid, 0)\n        alive.append(pid)\n    except OSError: pass\nprint(len(alive) - 1)\n"
    "if os.fork() == 0:\n    os.setsid()\n    signal.signal(15, signal.SIG_IGN)\n    os.close(1)\n"
    "    time.sleep(60)",
    "modules": "import json\nprint(len(getattr(json, 'seen', '')))\njson.seen = 'x'",
    "its place": "import os\nprint(0 if os.getcwd() == '/tmp' else 1)\nos.mkdir('x')\nos.chdir('x')",
    "the end of its input": "import sys\nsys.stdin.readline()\nprint(len(sys.stdin.read()))",
    "open files": "import os\ndef is_open(n):\n    try: return bool(os.fstat(n))\n"
    "    except OSError: return False\n"
    "print(sum(map(is_open, range(3, 64))))",
    "its arguments": "import sys\nprint(len(sys.argv) - 1)",
}


@works
@pytest.mark.parametrize("what", SHARED)
def test_runs_share_nothing(what: str) -> None:
    assert [one.output for one in runs(SHARED[what])] == [b"0\n"] * 3


@works
@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("raise SystemExit(int(input()))", [Ended.ok, Ended.error, Ended.error]),
        ("import os\nos._exit(0)", [Ended.ok] * 3),
        ("import os\nos.kill(os.getpid(), 11)", [Ended.error] * 3),
        ("n = int(input())\nwhile n == 1: pass", [Ended.ok, Ended.time]),
        ("import time\ntime.sleep(60 * int(input()))", [Ended.ok, Ended.time]),
        ("n = int(input())\nprint('x' * (200_000 if n == 1 else 1))", [Ended.ok, Ended.output, Ended.ok]),
        ("import os, time\nos.close(1)\ntime.sleep(60)", [Ended.time]),
        ("x = bytearray(2**30)", [Ended.error] * 3),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", [Ended.time]),
    ],
)
def test_how_runs_end(program: str, ended: list[Ended]) -> None:
    assert [one.ended for one in runs(program)] == ended


ATTACKS = {
    "kill the first process": "import os\nos.kill(2, 9)",
    "kill everything": "import os\nos.kill(-1, 9)",
    "write as the first process": "import os\nfor n in range(2, 64):\n    try: os.write(n, b'0 2\\n42')\n"
    "    except OSError: pass",
    "print a head": "print('0 3\\n42\\n0 3\\n42\\n0 3\\n42', end='')",
    "trace the first process": "import ctypes\nprint(0 if ctypes.CDLL(None).ptrace(16, 2, 0, 0) else 42)",
}


@works
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_cannot_speak_for_its_next_run(attack: str) -> None:
    assert b"42\n" not in [one.output for one in runs(ATTACKS[attack])]
    tests = {"inputs": ["", "", ""], "outputs": ["42", "42", "42"]}
    assert grade(ATTACKS[attack], tests, partial=True) == 0.0


@works
def test_functions_in_a_batch() -> None:
    numbers = list(range(40))
    tests = {"fn_name": "double", "inputs": [[n] for n in numbers], "outputs": [2 * n for n in numbers]}
    assert grade("def double(x):\n    print('noise')\n    return 2 * x", tests) == 1.0
    assert grade("def double(x): return 2 * x if x != 39 else 0", tests) == 0.0


def test_what_the_first_process_says_is_taken_apart() -> None:
    def ended(output: bytes, how: Ended = Ended.ok) -> list[Ended]:
        return [one.ended for one in _results(Result(how, output), 10, 3)]

    assert ended(b"0 1\na0 1\nb0 1\nc") == [Ended.ok] * 3
    assert ended(b"0 1\na1 0\n152 0\n") == [Ended.ok, Ended.error, Ended.time]
    assert ended(b"152 0\n0 1\na") == [Ended.time]
    assert ended(b"0 11\n" + b"a" * 11 + b"0 0\n0 0\n") == [Ended.output, Ended.ok, Ended.ok]
    assert ended(b"0 1\na") == [Ended.ok, Ended.error]
    assert ended(b"", Ended.time) == [Ended.time]
    assert ended(b"x") == [Ended.error]


def test_without_a_sandbox_every_run_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bubblewrap.SWITCH, "1")
    found = runs("n = int(input())\nwhile n == 1: pass\nprint(n)")
    assert [one.ended for one in found] == [Ended.ok, Ended.time]
