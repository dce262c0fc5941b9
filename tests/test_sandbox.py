"""Programs that a model wrote: graded by what they give, and unable to do anything else."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.config.schema import RewardConfig
from copd_megatron.errors import ConfigError
from copd_megatron.launch import doctor
from copd_megatron.rewards import Grader, registry, sandbox
from copd_megatron.rewards.code_cases import read_cases, same_output
from copd_megatron.rewards.sandbox import Ended, Limits, bubblewrap
from copd_megatron.rewards.verifiers.code import code, last_program
from tests.support.commands import ROOT
from tests.support.rollouts import rollout

works = pytest.mark.skipif(sandbox.check() is not None, reason=f"no sandbox here: {sandbox.check()}")
DOUBLE = json.dumps({"inputs": ["21\n"], "outputs": ["42\n"]})
FUNCTION = json.dumps({"fn_name": "double", "inputs": [[21]], "outputs": [42]})
ASSERT = json.dumps(["assert double(21) == 42"])
SECRET = "a-token-of-the-host"


def block(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def grade(program: str, tests: str = DOUBLE, **metadata: Any) -> float:
    return code(block(program), tests, {"time_limit": 1, **metadata})


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file and a variable that no program may see, and a check that the host is as it was."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("COPD_TEST_SECRET", SECRET)
    before = set(os.listdir("/tmp"))
    yield secret
    assert secret.read_text() == SECRET
    assert sorted(tmp_path.iterdir()) == [secret]
    new = set(os.listdir("/tmp")) - before
    assert not {name for name in new if name in ("escaped", "f", "link", "seen", "0")}
    assert os.environ["COPD_TEST_SECRET"] == SECRET
    deadline = time.monotonic() + 2  # a killed process takes a moment to leave the table
    while sandboxed_processes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not sandboxed_processes()


def sandboxed_processes() -> list[str]:
    """Command lines of processes that a sandbox of this test process has left behind."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if "/inside.py" in line and parent in (1, os.getpid()):
                found.append(line)
    return found


# ---- attempts ---------------------------------------------------------------------------------------------
# Each writes 42 where it succeeds, and so gets 1; DOUBLE's own answer is what the program could compute.

SEES = """
import os
def attempt():
{body}
try:
    print(42 if attempt() else "held")
except BaseException as error:
    print("held", type(error).__name__)
"""

SEEING = {
    "read a host file": "return open({secret!r}).read()",
    "list the host's folder": "return os.listdir({folder!r})",
    "read the repository": "return os.listdir({root!r})",
    "read /etc/passwd": "return open('/etc/passwd').read()",
    "read home folders": "return os.listdir('/root') or os.listdir('/home')",
    "read the environment": "return {token!r} in str(dict(os.environ)) or 'PATH' in os.environ",
    "read another process's environment": "return open('/proc/1/environ').read()",
    "leave through /proc/1/root": "return os.listdir('/proc/1/root')",
    "use /proc/self/fd": "return os.listdir('/proc/self/fd')",
    "read kernel memory": "return open('/proc/kcore', 'rb').read(1) or open('/dev/mem', 'rb').read(1)",
    "read a disk": "return [open('/dev/' + name) for name in os.listdir('/dev') if name not in "
    "('null', 'zero', 'urandom')]",
    "inherit open files": "return [number for number in range(3, 64) if is_open(number)]",
    "follow a symlink out": "os.symlink({secret!r}, 'link'); return open('link').read()",
    "hard-link a file of the host": "os.link({secret!r}, 'link'); return True",
    "climb with ..": "return open('../../../../../..' + {secret!r}).read()",
    "chroot out": "os.mkdir('d'); os.chroot('d'); os.chdir('../../../../..'); os.chroot('.'); return True",
    "overwrite the system": "return open('/usr/lib/escaped', 'w').write('x')",
    "overwrite its Python": "import json; return open(json.__file__, 'a').write('x')",
    "overwrite the driver": "return open('/inside.py', 'w').write('x')",
    "remove the driver": "os.chmod('/inside.py', 0o777); os.unlink('/inside.py'); return True",
    "write at the root": "return open('/escaped', 'w').write('x')",
    "connect to the host": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); return True",
    "connect to the internet": "import socket; socket.create_connection(('1.1.1.1', 53), 1); return True",
    "resolve a name": "import socket; return socket.getaddrinfo('example.com', 80)",
    "use an abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); "
    "s.connect('\\0' + {abstract!r}); return True",
    "trace a process": "import ctypes; return ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "signal the judge": "os.kill({pid}, 9); return True",
    "see other processes": "return any(alive(pid) for pid in range(3, 3000))",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (999, 999)); return True",
    "become root": "os.setuid(0); return os.getuid() == 0 and open('/escaped', 'w')",
    "make a user namespace": "import ctypes; return ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount something": "import ctypes; return ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "keep memory without a process": "import ctypes; return ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "keep messages without a process": "import ctypes; return ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
    "keep a file in memory": "os.memfd_create('x'); return True",
    "start a shell": "import subprocess; return subprocess.run(['sh', '-c', 'true']).returncode == 0",
    "find the expected output": "import gc; return any(isinstance(o, str) and '42\\\\n' == o "
    "for o in gc.get_objects())",
    "read on after the input": "import sys; sys.stdin.read(); return sys.stdin.read() or os.read(0, 9)",
    "write to its input": "return os.write(0, b'x')",
}
HELPERS = """
def is_open(number):
    try:
        return os.fstat(number)
    except OSError:
        return None
def alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except OSError:
        return False
"""


@works
@pytest.mark.parametrize("attempt", SEEING)
def test_what_a_program_cannot_reach(attempt: str, host: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listener:
        name = f"copd-sandbox-{os.getpid()}"
        listener.bind("\0" + name)
        listener.listen()
        body = SEEING[attempt].format(
            secret=str(host),
            folder=str(host.parent),
            root=str(ROOT),
            token=SECRET,
            port=server.getsockname()[1],
            abstract=name,
            pid=os.getpid(),
        )
        result = sandbox.run((HELPERS + SEES.format(body="    " + body)).encode(), stdin=b"21\n")
    assert result.ended is Ended.ok
    assert result.output.startswith(b"held"), result.output


@works
def test_the_attempts_succeed_where_nothing_holds_them() -> None:
    """The pattern of the attempts: what works prints 42 and is graded right."""
    assert grade(SEES.format(body="    return open('/program.py').read()")) == 1.0


BOMBS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "sleep in a child": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nos.wait()",
    "ignored signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except OSError: pass\nwhile True: pass",
    "threads left behind": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    "print(42)",
    "closed output": "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(60)",
    "huge power": "print(len(str(9 ** 9 ** 9)))",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
}


@works
@pytest.mark.parametrize("bomb", BOMBS)
def test_time_ends(bomb: str, host: Path) -> None:
    started = time.monotonic()
    result = sandbox.run(BOMBS[bomb].encode(), limits=Limits(cpu_seconds=1, wall_seconds=0.7))
    assert result.ended is Ended.time
    assert time.monotonic() - started < 5


GREEDY = {
    "memory bomb": "x = bytearray(2**30)",
    "memory in small pieces": "x = []\nwhile True: x.append(bytes(2**20))",
    "disk fill": "for i in range(100):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(2**22))",
    "one big file": "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(2**20))",
    "sparse file": "open('/tmp/f', 'wb').truncate(2**40)",
    "open files": "x = [open('/dev/null') for _ in range(1000)]",
    "thread bomb": "import threading, time\nfor _ in range(100):\n"
    "    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()",
    "recursion": "def f(n): return f(n + 1) + 1\nf(0)",
    "deep nesting": "eval('(' * 100000 + ')' * 100000)",
    "crash in C": "import ctypes\nctypes.string_at(0)",
    "kill itself": "import os\nos.kill(os.getpid(), 9)\nos.abort()",
    "kill everything": "import os\nos.kill(-1, 9)\nos.kill(1, 9)\nraise SystemExit(1)",
}


@works
@pytest.mark.parametrize("attempt", GREEDY)
def test_greed_ends_in_failure(attempt: str, host: Path) -> None:
    result = sandbox.run(GREEDY[attempt].encode(), limits=Limits(cpu_seconds=2, wall_seconds=3))
    assert result.ended in (Ended.error, Ended.time)


@works
@pytest.mark.parametrize("write", ["os.write(1, bytes(65536))", "print('x' * 10**6)", "print(end=chr(0))"])
def test_an_output_flood_is_cut_off(write: str) -> None:
    result = sandbox.run(
        f"import os\nwhile True: {write}".encode(), limits=Limits(output_bytes=50_000, wall_seconds=5)
    )
    assert result.ended is Ended.output
    assert len(result.output) <= 50_000


# ---- games with the grade ---------------------------------------------------------------------------------

GAMES = {
    "nothing": "",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "right, but a failure": "print(42)\nraise SystemExit(1)",
    "right, then killed": "import os\nprint(42, flush=True)\nos.kill(os.getpid(), 9)",
    "claims": "print('passed', True, 1.0, 'OK')",
    "forged status": "import os\nfor n in range(2, 64):\n    try: os.write(n, b'{\"exit-code\": 0}')\n"
    "    except OSError: pass",
    "wrong, then more": "print(41)\nprint(42)",
    "right, then more": "print(42)\nprint(42)",
    "every number": "for n in range(100): print(n)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\nprint(41)",
    "__del__": "class A:\n    def __del__(self): print('42')\na = A()\nprint(41)",
    "patched print": "import builtins\nbuiltins.print = lambda *a: None\nprint(42)",
    "patched stdout": "import io, sys\nsys.stdout = io.StringIO()\nprint(42)",
    "binary output": "import sys\nsys.stdout.buffer.write(bytes(range(256)))",
    "no number": "print('nan')",
    "other digits": "print('\\u0664\\u0662')",
    "syntax error": "print(42",
    "null byte": "print(42)\0",
    "escape sequences": "print('41\\x1b[2D42')",
    "backspace": "print('41\\b\\b42')",
}


@works
@pytest.mark.parametrize("game", GAMES)
def test_games_score_nothing(game: str, host: Path) -> None:
    assert grade(GAMES[game]) == 0.0


EQUAL = "class Equal(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
FORGED = {
    "equal to everything": EQUAL + "def double(x): return Equal(1)",
    "equal inside a list": EQUAL + "def double(x): return [Equal(42)]",
    "a repr that lies": "class A:\n    def __repr__(self): return '41'\ndef double(x): return A()",
    "patched compare": "import builtins, operator\noperator.eq = lambda a, b: True\ndef double(x): return 1",
    "sys.exit in the function": "import sys\ndef double(x): sys.exit(0)",
    "os._exit in the function": "import os\ndef double(x): os._exit(0)",
    "raises AssertionError": "def double(x): raise AssertionError",
    "printed instead of returned": "def double(x): print(42)",
    "forged result line": "import os\ndef double(x):\n    os.write(1, b'42')\n    return 1",
    "a patched repr": "import builtins\nbuiltins.repr = lambda x: '42 or True'\ndef double(x): return 1",
    "junk beside the result": "import os\ndef double(x):\n    for n in range(3, 9):\n"
    "        try: os.write(n, b'42,')\n        except OSError: pass\n    return 42",
    "a replaced driver": "import sys\nsys.modules['__main__'].is_plain = lambda *a: True\n"
    "def double(x): return object()",
    "a huge integer": "def double(x): return 10 ** 5000",
    "a cycle": "def double(x):\n    a = []\n    a.append(a)\n    return a",
    "a deep list": "def double(x):\n    a = []\n    for _ in range(10000): a = [a]\n    return a",
    "a coroutine": "async def double(x): return 42",
    "the frames of the judge": """
import sys
def double(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            held = list(value.values()) if type(value) is dict else [value]
            if any(type(item) is int and item == 42 for item in held):
                return 42
        frame = frame.f_back
    return 0
""",
    "no such function": "def triple(x): return 42",
}


@works
@pytest.mark.parametrize("tests", [FUNCTION, ASSERT], ids=["function", "assert"])
@pytest.mark.parametrize("game", FORGED)
def test_values_are_compared_outside(game: str, tests: str) -> None:
    assert grade(FORGED[game], tests) == 0.0


@works
@pytest.mark.parametrize("tests", [FUNCTION, ASSERT], ids=["function", "assert"])
@pytest.mark.parametrize(
    "program",
    [
        "def double(x): return 2 * x",
        "class Solution:\n    def double(self, x): return 2 * x\ndouble = Solution().double",
        "print('noise')\ndef double(x):\n    print('more')\n    return x + x",
        "def find(x): return x\ndef is_plain(x): return x\ndef double(x): return find(x) * 2",
        "if __name__ == '__main__':\n    raise SystemExit(1)\ndef double(x): return 2 * x",
    ],
)
def test_right_functions_pass(program: str, tests: str) -> None:
    assert grade(program, tests) == 1.0


# ---- grading ----------------------------------------------------------------------------------------------


@works
@pytest.mark.parametrize(
    "program",
    [
        "print(int(input()) * 2)",
        "import sys\nn = int(sys.stdin.readline())\nsys.stdout.write(f'  {n * 2}  \\n\\n')",
        "n = int(open(0).read())\nwith open('x', 'w') as f: f.write(str(2 * n))\nprint(open('x').read())",
        "import os\ndef main():\n    print(int(input()) * 2)\nif __name__ == '__main__':\n    main()",
        "import sys\nsys.setrecursionlimit(9999)\ndef f(n): return n and 2 + f(n - 1)\n"
        "print(f(int(input())))",
        "print(42, flush=True)\nimport os\nos._exit(0)",
    ],
)
def test_right_scripts_pass(program: str) -> None:
    assert grade(program) == 1.0


@works
def test_cases_share_nothing() -> None:
    program = "import os\nprint(len(os.listdir('/tmp')))\nopen('/tmp/seen', 'w').close()"
    assert grade(program, json.dumps({"inputs": ["", ""], "outputs": ["0", "0"]})) == 1.0


@works
def test_partial_credit_is_the_share_of_cases_passed() -> None:
    tests = json.dumps({"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "0", "4"]})
    assert grade("print(input())", tests, partial=True) == 0.75
    assert grade("print(input())", tests) == 0.0


@works
def test_a_case_that_runs_out_of_time_ends_the_grading() -> None:
    tests = json.dumps({"inputs": ["1", "2", "1"], "outputs": ["1", "1", "1"]})
    program = "n = int(input())\nwhile n == 2: pass\nprint(1)"
    assert grade(program, tests, partial=True) == pytest.approx(1 / 3)


@works
def test_same_response_same_grade() -> None:
    program = "print(list({str(n) for n in range(9)}))"
    outputs = {sandbox.run(program.encode()).output for _ in range(3)}
    assert len(outputs) == 1


@works
def test_the_grader_runs_it_in_its_workers() -> None:
    config = RewardConfig(verifiers=["code"], timeout_seconds=20.0)
    with Grader(config) as grader:
        graded = grader.grade(
            [
                rollout(block("print(int(input()) * 2)"), DOUBLE, "code", key="right"),
                rollout(block("print(1)"), DOUBLE, "code", key="wrong"),
                rollout("I would print it.", DOUBLE, "code", key="none"),
            ]
        )
        assert [item.reward for item in graded] == [1.0, 0.0, 0.0]
        assert grader.counters()["failed"] == 0


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```py\na\n```\n```bash\nls\n```", "a"),
        ("```\na\n```", "a"),
        ("```python\na\n```\n```python\ncut", "a"),
        ("```python\ncut", None),
        ("no block", None),
        ("<think>\n```python\na\n```", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b"),
    ],
)
def test_the_last_closed_block_of_python_counts(response: str, program: str | None) -> None:
    assert last_program(response) == program


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1  2 \n3", True),
        ("1\n2", "1 2", False),
        ("0.3333333333", "0.33333333", True),
        ("0.3334", "0.3333", False),
        ("1000000000000000001", "1000000000000000000", False),
        ("1.0", "1", False),
        ("1", "1.0", True),
        ("nan", "1.0", False),
        ("1_0.0", "10.0", False),
        ("YES", "Yes", False),
        ("", "", True),
        ("1\n\n2", "1\n2", False),
    ],
)
def test_how_outputs_are_compared(output: str, expected: str, same: bool) -> None:
    assert same_output(output, expected, 1e-6) is same


@pytest.mark.parametrize(
    "tests",
    [
        "no json",
        "{}",
        "[]",
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": [1], "outputs": ["1"]}',
        '["assert f(1) == f(2)"]',
        '["assert 1 == 1"]',
        '["import os"]',
        '["assert f(1) == 1; import os"]',
        '["assert abs(f(1) - 1) < 0.1"]',
        '{"fn_name": "f", "inputs": [3], "outputs": [3]}',
    ],
)
def test_bad_tests_are_an_error_of_the_sample(tests: str) -> None:
    with pytest.raises(ValueError):
        read_cases(tests, {})


def test_the_expected_value_is_no_part_of_what_the_sandbox_gets() -> None:
    for tests in (FUNCTION, ASSERT, '["assert 42 == double(21)"]'):
        (case,) = read_cases(tests, {})
        assert "42" not in json.dumps(case.request)  # type: ignore[union-attr]


# ---- where there is no sandbox ----------------------------------------------------------------------------


@pytest.fixture
def without_bwrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    bubblewrap.check.cache_clear()
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    yield
    bubblewrap.check.cache_clear()


@pytest.mark.usefixtures("without_bwrap")
def test_without_bubblewrap_nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"bubblewrap .* is not installed.*apt-get install bubblewrap"):
        registry.check_requirements(["math", "code"])
    with pytest.raises(ConfigError):
        grade("print(42)")
    assert doctor._sandbox().status is doctor.Status.missing
    registry.check_requirements(["math"])


@pytest.mark.usefixtures("without_bwrap")
def test_the_switch_runs_programs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bubblewrap.SWITCH, "1")
    registry.check_requirements(["code"])
    assert grade("print(int(input()) * 2)") == 1.0
    assert grade("def double(x): return 2 * x", FUNCTION) == 1.0
    assert grade("while True: pass") == 0.0


def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bwrap that cannot start is an error of the machine, which is counted, and not a grade."""
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(sandbox.SandboxError, match="bwrap failed"):
        sandbox.run(b"print(42)")
