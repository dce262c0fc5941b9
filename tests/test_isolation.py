"""What a response does in its grading process stays there, and grading ends whatever it does."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from copd_megatron.config.schema import RewardConfig
from copd_megatron.rewards import Grader, isolation
from copd_megatron.rewards.isolation import Call, Outcome, WorkerPool
from tests.support.commands import ROOT
from tests.support.processes import is_alive, is_gone
from tests.support.rollouts import COMMAND, rollout

REUSABLE = "tests.support.misbehaving_verifiers:obedient_and_reusable"
EVALUATES = "tests.support.misbehaving_verifiers:evaluates"


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, 1.0)
    yield pool
    pool.close()


def call(response: str, target: str = COMMAND, *, reusable: bool = False) -> Call:
    return Call(target=target, response=response, answer="", metadata={}, reusable=reusable)


def reused(response: str) -> Call:
    return call(response, REUSABLE, reusable=True)


def values(outcomes: list[Outcome]) -> list[float | str | None]:
    return [outcome.reason if outcome.value is None else outcome.value for outcome in outcomes]


# ---------------------------------------------------------------- no response changes another's grade


def test_replacing_functions_in_the_process_changes_no_other_grade(pool: WorkerPool) -> None:
    outcomes = pool.run([call("replace"), *[call("wrong")] * 4, call("replace"), call("fine")])
    assert values(outcomes) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("command", ["forge", "babble"])
def test_what_is_not_the_answer_counts_as_a_crash(pool: WorkerPool, command: str) -> None:
    outcomes = pool.run([call("wrong"), call(command), call("wrong"), call("wrong"), call("fine")])
    assert values(outcomes) == [0.0, "crash", 0.0, 0.0, 1.0]
    assert "not an answer" in outcomes[1].message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"null",
        b"[1.0]",
        b'{"value": 1.0}',
        b'{"id": "other", "value": 1.0}',
        b'{"id": "mine", "value": 1}',
        b'{"id": "mine", "value": true}',
        b'{"id": "mine", "value": "1.0"}',
        b'{"id": "mine", "value": 1.0, "more": 1}',
        b'{"id": "mine", "value": 1.0}\n{"id": "mine", "value": 1.0}',
        b'{"id": ["mine"], "error": "x"}',
        b"\xff\xfe",
        b"[" * 50_000,
    ],
)
def test_answers_are_read_strictly(line: bytes) -> None:
    task = isolation._Task(index=0, call=call("x"), id="mine", line=b"")
    assert isolation._read(line + b"\n", task) is None
    assert isolation._read(b'{"id": "mine", "value": 0.5}\n', task) == Outcome(value=0.5)


def test_killing_the_server_costs_only_the_one_that_does(
    pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        outcomes = pool.run(
            [call("fine"), call("wait 0.5"), call("kill_the_server"), call("wrong"), call("fine")]
        )
    assert values(outcomes) == [1.0, 1.0, "crash", 0.0, 1.0]
    assert "started again" in caplog.text


def test_killing_the_processes_of_others_changes_no_grade(pool: WorkerPool) -> None:
    outcomes = pool.run([call("wait 0.6"), call("kill_the_others"), call("wrong")])
    assert values(outcomes) == [1.0, 1.0, 0.0]


def test_an_idle_worker_that_died_costs_no_grade(pool: WorkerPool) -> None:
    (pid,) = pool.run([reused("pid")])
    assert pid.value is not None
    assert values(pool.run([reused("pid")])) == [pid.value], "it is used again"
    os.kill(int(pid.value), signal.SIGKILL)
    assert is_gone(str(int(pid.value)))
    assert values(pool.run([reused("fine")])) == [1.0]


def test_the_guard_ends_a_process_before_code_of_a_response_runs(pool: WorkerPool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    codes = [
        f"open({str(mark)!r}, 'w')",
        f"__import__('os').system('touch {mark}')",
        f"shell touch {mark}",
        f"(lambda: open({str(mark)!r}, 'w'))()",
        f"[open(name, 'w') for name in [{str(mark)!r}]]",
    ]
    calls = [call(response, EVALUATES, reusable=True) for response in [*codes, "right", "0"]]
    outcomes = pool.run(calls)
    assert values(outcomes) == ["crash"] * len(codes) + [1.0, 0.0], "arithmetic may be evaluated"
    assert all("about to run code" in outcome.message for outcome in outcomes[: len(codes)])
    assert not mark.exists()


# ---------------------------------------------------------------- a process of a response's own


def test_the_environment_is_empty(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPD_TEST_SECRET", "x")
    pool.close()
    (secret, number, descriptors) = pool.run([call("secret"), call("variables"), call("descriptors")])
    assert secret.value == 0.0 and number.value is not None and number.value <= 13
    assert descriptors.value == 4.0, "standard input, output and error, and the socket"


def test_the_scratch_folder_is_removed(pool: WorkerPool, tmp_path: Path) -> None:
    outcomes = pool.run([call(f"scratch {tmp_path / name}") for name in ("a", "b")])
    assert values(outcomes) == [1.0, 1.0]
    folders = [Path((tmp_path / name).read_text()) for name in ("a", "b")]
    assert folders[0] != folders[1] and not any(folder.exists() for folder in folders)
    root = folders[0].parent
    assert root.exists()
    pool.close()
    assert not root.exists()


def test_daemons_are_killed(pool: WorkerPool, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    assert values(pool.run([call(f"leave_a_daemon {pid_file}")])) == [1.0]
    assert is_gone(pid_file.read_text())


# ---------------------------------------------------------------- grading ends


def test_hangs_overlap() -> None:
    pool = WorkerPool(1, 1.0)
    try:
        pool.run([call("fine")])
        begin = time.monotonic()
        outcomes = pool.run([call("hang" if i % 2 else "fine") for i in range(24)])
        assert values(outcomes) == ["timeout" if i % 2 else 1.0 for i in range(24)]
        assert time.monotonic() - begin < 9.0, "12 hangs of 1 s one after the other, and 12 new processes"
    finally:
        pool.close()


def test_a_stopped_process_blocks_nobody(pool: WorkerPool) -> None:
    (pid,) = pool.run([reused("pid")])
    assert pid.value is not None
    os.kill(int(pid.value), signal.SIGSTOP)
    begin = time.monotonic()
    outcomes = pool.run([reused("x" * 2_000_000), call("stop"), call("fine")])
    assert values(outcomes) == ["timeout", "timeout", 1.0]
    assert time.monotonic() - begin < 10.0
    assert not is_alive(str(int(pid.value)))


def test_a_stopped_server_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copd_megatron.rewards.processes._CALL_SECONDS", 1.0)
    monkeypatch.setattr("copd_megatron.rewards.processes._CLOSE_SECONDS", 0.5)
    pool = WorkerPool(1, 1.0)
    try:
        pool.run([call("fine")])
        assert pool._server._process is not None
        os.kill(pool._server._process.pid, signal.SIGSTOP)
        assert values(pool.run([call("fine"), call("wrong")])) == [1.0, 0.0]
    finally:
        pool.close()


def test_waiting_for_a_processor_does_not_count() -> None:
    limit = 1.0
    pool = WorkerPool(1, limit)
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)
    ]
    try:
        pool.run([call("fine")])
        begin = time.monotonic()
        assert values(pool.run([call("spin")])) == ["timeout"]
        seconds = time.monotonic() - begin
        assert limit <= seconds < isolation._PATIENCE * limit + 3.0
    finally:
        for process in spinning:
            process.kill()
            process.wait()
        pool.close()


def test_what_there_is_no_time_for_stays_ungraded(caplog: pytest.LogCaptureFixture) -> None:
    config = RewardConfig(verifiers=["exact", COMMAND], timeout_seconds=60.0)
    rollouts = [rollout("hang", key=str(i)) for i in range(30)]
    texts = [rollout("fine", key="first"), *rollouts, rollout("blue", "blue", "exact", key="exact")]
    with Grader(config, max_seconds=3.0) as grader, caplog.at_level(logging.WARNING):
        grader.grade([rollout("fine")])
        begin = time.monotonic()
        graded = grader.grade(texts)
        assert time.monotonic() - begin < 8.0
        assert [g.reward for g in graded] == [1.0, *[None] * 30, 1.0]
        assert grader.counters() == {"graded": 3, "failed": 0, "ungraded": 30}
        assert "30 of 32" in caplog.text and "reward.timeout_seconds" in caplog.text
        assert grader.grade([rollout("fine")])[0].reward == 1.0


def test_metadata_that_cannot_be_sent(pool: WorkerPool) -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    bad = Call(target=COMMAND, response="fine", answer="", metadata={"deep": nested})
    assert values(pool.run([bad, call("fine")])) == ["bad_request", 1.0]


# ---------------------------------------------------------------- beside the sampling


def test_responses_are_graded_while_others_are_still_sampled() -> None:
    config = RewardConfig(verifiers=["exact", COMMAND], num_workers=2)
    early = [rollout("wait 0.4", key=str(i)) for i in range(2)]
    late = [rollout("blue", "blue", "exact", key="late"), rollout("wrong", key="w"), early[0]]
    with Grader(config) as grader:
        grader.grade([rollout("fine")])  # the verifier is loaded
        with grader.begin() as grading:
            for response in early:
                grading.add(response)
            end = time.monotonic() + 1.5
            while time.monotonic() < end:  # the engine makes its steps
                grading.poll()
                time.sleep(0.02)
            assert None not in grading._run.done, "both have been graded meanwhile"
            graded = grading.finish([*early, *late])
        assert graded == grader.grade([*early, *late])
        assert [g.reward for g in graded] == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_a_verifier_that_is_met_later_reaches_every_worker() -> None:
    config = RewardConfig(verifiers=[REUSABLE, COMMAND], num_workers=1)
    with Grader(config) as grader, grader.begin() as grading:
        grading.add(rollout("fine", verifier=REUSABLE, key="a"))
        grading.poll()
        last = [rollout("fine", verifier=COMMAND, key="b"), rollout("fine", verifier=REUSABLE, key="c")]
        assert [g.reward for g in grading.finish(last)] == [1.0, 1.0]


def test_an_error_of_grading_is_raised_at_its_end_and_leaves_no_process() -> None:
    with Grader(RewardConfig(verifiers=["exact", COMMAND])) as grader:
        with pytest.raises(ValueError, match="names verifier 'math'"), grader.begin() as grading:
            grading.add(rollout("hang"))
            grading.poll()
            (worker,) = grading._run.in_flight
            grading.add(rollout("1", verifier="math"))
            grading.poll()
            grading.finish([])
        assert is_gone(worker.pid)
        assert grader.grade([rollout("fine")])[0].reward == 1.0


# ---------------------------------------------------------------- with the trainer

TRAINER = """
import sys
from copd_megatron.config.schema import RewardConfig
from copd_megatron.rewards import Grader
from tests.support.rollouts import COMMAND, rollout

grader = Grader(RewardConfig(verifiers=[COMMAND], timeout_seconds=600.0, num_workers=3))
grader.grade([rollout("spawn_and_hang " + sys.argv[1]), rollout("leave_a_daemon " + sys.argv[2]),
              rollout("hang_in_c")])
"""


def test_everything_dies_with_the_trainer(tmp_path: Path) -> None:
    files = [tmp_path / "child", tmp_path / "daemon"]
    command = [sys.executable, "-c", TRAINER, *map(str, files)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 60.0
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
        assert len(children) == 1
        workers = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
        assert len(workers) >= 2
    finally:
        trainer.kill()
        trainer.wait()
    for pid in [*children, *workers, *(file.read_text() for file in files)]:
        assert is_gone(pid, within_seconds=5.0), pid
    assert not list(tmp_path.glob("copd-grading-*"))


def test_the_pool_ends_with_its_owner() -> None:
    pool = WorkerPool(1, 1.0)
    pool.run([call("fine"), reused("fine")])
    assert pool._server._process is not None
    pid = str(pool._server._process.pid)
    assert is_alive(pid)
    del pool
    assert is_gone(pid)
