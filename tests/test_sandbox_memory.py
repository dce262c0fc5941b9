"""All processes of a sandbox together take no more memory than they may."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from copd_megatron.launch import doctor
from copd_megatron.rewards import sandbox
from copd_megatron.rewards.sandbox import Ended, Limits, memory
from copd_megatron.rewards.sandbox.limits import MIB

works = pytest.mark.skipif(sandbox.check() is not None, reason=f"no sandbox here: {sandbox.check()}")
needs_group = pytest.mark.skipif(memory.delegated() is None, reason="needs a writable cgroup v2 with memory")
LIMITS = Limits(total_memory_bytes=400 * MIB, wall_seconds=20.0, cpu_seconds=20.0)
CHILDREN = """
import os, time
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        {child}
        os._exit(0)
    children.append(child)
print(all(os.waitpid(child, 0)[1] == 0 for child in children))
"""
EACH_ITS_OWN = CHILDREN.format(child="data = b'x' * (200 << 20); time.sleep(15)")
SHARED = "data = b'x' * (200 << 20)\n" + CHILDREN.format(child="time.sleep(0.3)")
MAPPED = "import mmap\n" + CHILDREN.format(
    child="data = mmap.mmap(-1, 200 << 20); data.write(b'x' * (200 << 20)); time.sleep(15)"
)
THREADS = "import threading\ndata = []\n" + "\n".join(
    [
        "for _ in range(4): threading.Thread(target=lambda: data.append(b'x' * (50 << 20))).start()",
        "print(True)",
    ]
)


@pytest.fixture(params=[pytest.param("group", marks=needs_group), "watch"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "watch":
        monkeypatch.setattr(memory, "delegated", lambda: None)
    return str(request.param)


@works
@pytest.mark.parametrize("program", [EACH_ITS_OWN, MAPPED], ids=["own", "mapped"])
def test_the_sum_is_bounded(program: str, means: str) -> None:
    begin = time.monotonic()
    assert sandbox.run(program.encode(), limits=LIMITS).ended is Ended.memory
    assert time.monotonic() - begin < 10.0, "ended at the bound, not by the time limit"


@works
@pytest.mark.parametrize("program", [SHARED, THREADS], ids=["shared", "threads"])
def test_what_fits_is_left_alone(program: str, means: str) -> None:
    """Pages that five processes share count once."""
    result = sandbox.run(program.encode(), limits=LIMITS)
    assert (result.ended, result.output) == (Ended.ok, b"True\n")


@works
def test_a_run_of_a_batch_that_takes_too_much_ends_it(means: str) -> None:
    program = f"if input() == 'much':\n    exec({EACH_ITS_OWN!r})\nelse:\n    print(len(input()))"
    given = ["few\n" + "x" * 100, "much\n", "few\nx"]
    results = sandbox.run_batch(program.encode(), given, mode="program", limits=LIMITS)
    assert [result.ended for result in results] == [Ended.ok, Ended.memory]
    assert results[0].output == b"100\n"


@works
def test_an_input_larger_than_the_scratch_folder_arrives() -> None:
    limits = Limits(scratch_bytes=MIB)
    given = ["x" * (3 * MIB), "y"]
    results = sandbox.run_batch(b"print(len(input()))", given, mode="program", limits=limits)
    assert [result.output for result in results] == [b"3145728\n", b"1\n"]


@works
@needs_group
def test_nothing_is_left_of_a_group() -> None:
    parent = memory.delegated()
    assert parent is not None
    sandbox.run(EACH_ITS_OWN.encode(), limits=LIMITS)
    assert not list(parent.glob(f"{memory._own_prefix()}*"))


@needs_group
def test_a_group_ends_what_is_in_it() -> None:
    reading, writing = os.pipe()
    with memory.bounded(100 * MIB) as bound:
        child = os.fork()
        if child == 0:
            bound.join()  # type: ignore[misc]
            os.write(writing, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 1)
    assert os.waitpid(child, 0)[1] == 9


def test_groups_of_killed_graders_are_removed(tmp_path: Path) -> None:
    prefix = memory._own_prefix()
    names = [
        f"{prefix}{os.getpid()}-0",
        f"{prefix}999999999-3",
        "somebody-else",
        "copd-sandbox-1-999999999-0",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    memory._sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {names[1]}


def test_processes_below_a_process() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            time.sleep(60)
        os.write(writing, str(grandchild).encode())
        time.sleep(60)
    grandchild = int(os.read(reading, 20))
    try:
        assert set(memory.descendants(child)) == {child, grandchild}
        assert memory.Watch(1).is_exceeded(child) and not memory.Watch(2**40).is_exceeded(child)
    finally:
        for pid in (grandchild, child):
            os.kill(pid, 9)
        os.waitpid(child, 0)
    assert not memory.Watch(1).is_exceeded(child), "a process that is gone takes nothing"


@works
def test_the_doctor_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "delegated", lambda: None)
    assert "checked every 0.05 s" in doctor._sandbox().found and "systemd-run" in doctor._sandbox().means
    monkeypatch.setattr(memory, "delegated", lambda: Path("/sys/fs/cgroup/x"))
    assert "bounded by the kernel in /sys/fs/cgroup/x" in doctor._sandbox().found
