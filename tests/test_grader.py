"""A grader that survives whatever a verifier does, and grades every response by itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from copd_megatron.config.schema import RewardConfig
from copd_megatron.records import Rollout
from copd_megatron.rewards import Grader, registry
from tests.support.processes import is_gone
from tests.support.rollouts import COMMAND, rollout


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    config = RewardConfig(verifiers=["exact", COMMAND], timeout_seconds=1.0, num_workers=2)
    with Grader(config, also=["tests.support.misbehaving_verifiers:inline_raiser"]) as made:
        yield made


def failures_of(grader: Grader, rollouts: list[Rollout]) -> tuple[list[float | None], dict[str, int]]:
    before = grader.counters()
    graded = grader.grade(rollouts)
    after = grader.counters()
    return [g.reward for g in graded], {
        k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)
    }


def test_grades_in_order_over_both_kinds() -> None:
    rollouts = [
        rollout(f"Answer: {i}", str(i if i % 3 else i + 1), ("math", "exact")[i % 2]) for i in range(60)
    ]
    with Grader(RewardConfig(verifiers=["math", "exact"], timeout_seconds=60.0, num_workers=2)) as grader:
        graded = grader.grade(rollouts)
    assert [g.reward for g in graded] == [float(i % 3 != 0) for i in range(60)]
    assert all(g.prompt is r.prompt and g.text == r.text for g, r in zip(graded, rollouts, strict=True))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("raise", "error"),
        ("exit", "error"),
        ("eat_memory", "error"),
        ("text", "error"),
        ("die", "crash"),
        ("hang", "timeout"),
        ("hang_in_c", "timeout"),
        ("nan", "bad_value"),
        ("huge", "bad_value"),
    ],
)
def test_misbehaviour_scores_zero_and_leaves_the_others_alone(
    grader: Grader, caplog: pytest.LogCaptureFixture, command: str, reason: str
) -> None:
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        rewards, failed = failures_of(
            grader, [rollout("fine 1"), rollout(command, key="bad"), rollout("fine 2"), rollout("fine 3")]
        )
    assert rewards == [1.0, 0.0, 1.0, 1.0]
    assert failed == {"graded": 4, "failed": 1, f"failed_{COMMAND}_{reason}": 1}
    if failed and grader.counters()[f"failed_{COMMAND}_{reason}"] <= 3:
        assert "shard-000000/bad" in caplog.text and reason in caplog.text
    assert time.monotonic() - started < 60.0


def test_inline_failure_scores_zero(grader: Grader) -> None:
    rewards, failed = failures_of(
        grader, [rollout("x", verifier="inline_raiser"), rollout("1", "1", "exact")]
    )
    assert rewards == [0.0, 1.0]
    assert failed["failed_inline_raiser_error"] == 1


def test_prints_do_not_disturb_the_protocol(grader: Grader) -> None:
    rewards, failed = failures_of(grader, [rollout("print"), rollout("fine")])
    assert rewards == [1.0, 1.0] and "failed" not in failed


def test_large_and_odd_texts_pass(grader: Grader) -> None:
    texts = ["x" * 2_000_000, "\ud800 lone surrogate", "line\nbreak\r\u2028", "\0"]
    rewards, _ = failures_of(grader, [rollout(text) for text in texts])
    assert rewards == [1.0] * 4


def test_every_response_has_a_process_of_its_own(grader: Grader) -> None:
    first = [g.reward for g in grader.grade([rollout("pid", key=str(i)) for i in range(8)])]
    assert len(set(first)) == 8 and os.getpid() not in first


def test_hashing_and_chance_are_the_same_everywhere(grader: Grader) -> None:
    for command in ("hash", "random"):
        assert len({g.reward for g in grader.grade([rollout(command, key=str(i)) for i in range(8)])}) == 1


def test_a_hanging_verifier_is_killed_with_its_children(grader: Grader, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    rewards, _ = failures_of(grader, [rollout(f"spawn_and_hang {pid_file}")])
    assert rewards == [0.0]
    pid = pid_file.read_text()
    assert is_gone(pid)


def test_metadata_that_is_not_json_is_counted(grader: Grader) -> None:
    rewards, failed = failures_of(grader, [rollout("fine", metadata={"x": object()}), rollout("fine")])
    assert rewards == [0.0, 1.0] and failed[f"failed_{COMMAND}_bad_request"] == 1


def test_a_verifier_that_cannot_load_is_no_samples_fault() -> None:
    registry.get(COMMAND)  # imports the module, which registers "unpreparable"
    with (
        Grader(RewardConfig(verifiers=["tests.support.misbehaving_verifiers:needs_what_is_missing"])) as bad,
        pytest.raises(RuntimeError, match=r"cannot be loaded.*no such library here"),
    ):
        bad.grade([rollout("x", verifier="unpreparable")])


def test_a_verifier_beyond_the_graders_is_refused(grader: Grader) -> None:
    with pytest.raises(ValueError, match=r"'shard-000000/k'.*'choice'.*reward\.verifiers"):
        grader.grade([rollout("A", "A", "choice")])


def test_equal_responses_to_one_prompt_are_graded_once(grader: Grader) -> None:
    one = rollout("raise")
    rewards, failed = failures_of(grader, [one, one, one])
    assert rewards == [0.0] * 3 and failed["graded"] == 3 and failed["failed"] == 3
    pids = [rollout("pid"), rollout("pid")]
    assert all(g.reward is not None for g in grader.grade(pids))


def test_logging_is_limited(grader: Grader, caplog: pytest.LogCaptureFixture) -> None:
    with Grader(RewardConfig(verifiers=["inline_raiser"])) as fresh, caplog.at_level(logging.WARNING):
        fresh.grade([rollout(str(i), verifier="inline_raiser", key=str(i)) for i in range(50)])
        assert len(caplog.records) == 3 and "only counted" in caplog.records[-1].message
        assert fresh.counters() == {"graded": 50, "failed": 50, "failed_inline_raiser_error": 50}


def test_close_ends_the_workers_and_the_grader_can_go_on() -> None:
    with Grader(RewardConfig(verifiers=[COMMAND])) as mine:
        (graded,) = mine.grade([rollout("pid")])
        assert graded.reward is not None
        mine.close()
        assert is_gone(str(int(graded.reward)))
        assert mine.grade([rollout("fine")])[0].reward == 1.0


def test_grader_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Grader(RewardConfig(timeout_seconds=0.0))


def test_responses_that_were_cut_off_need_a_marked_answer() -> None:
    def grade(text: str, verifier: str, answer: str, **how: bool) -> float | None:
        return grader.grade([rollout(text, answer, verifier, **how)])[0].reward  # type: ignore[arg-type]

    with Grader(RewardConfig(verifiers=["numeric", "exact", "math", COMMAND])) as grader:
        cut, whole = "The value is 6 * 7 = 42", "6 * 7 = 42.\nAnswer: 42."
        for verifier in ("numeric", "math"):
            assert grade(cut, verifier, "42") == 1.0
            assert grade(cut, verifier, "42", truncated=True) == 0.0
            assert grade(whole, verifier, "42", truncated=True) == 1.0
            assert grade("so \\boxed{42}, or", verifier, "42", truncated=True) == 1.0
        assert grade("1. First we note\n2. Then we", "math", "2", truncated=True) == 0.0
        assert grade("fine", COMMAND, "", truncated=True) == 1.0, "what your own verifier reads is its own"


def test_thinking_that_the_prompt_has_opened() -> None:
    with Grader(RewardConfig(verifiers=["numeric"])) as grader:
        thinking = "I try \\boxed{42}, but"
        texts = [thinking, f"{thinking} no.</think>\nAnswer: 42", thinking]
        rollouts = [rollout(text, "42", "numeric", opens_thinking=True) for text in texts[:2]]
        graded = grader.grade([*rollouts, rollout(thinking, "42", "numeric")])
        assert [g.reward for g in graded] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Answer: 12", 0.0),
        ("The answer is 12", 0.0),
        ("Answer: 12.", 1.0),
        ("**Answer: 12**", 1.0),
        ("Answer: 12\nI add", 1.0),
        ("Answer: 12\n", 1.0),
        ("\\boxed{12}", 1.0),
        ("<answer>12</answer>", 1.0),
        ("so 12", 0.0),
    ],
)
def test_an_answer_in_which_a_response_breaks_off_is_none(text: str, reward: float) -> None:
    """At its token limit "Answer: 12" may have been on its way to 123."""
    with Grader(RewardConfig(verifiers=["numeric"])) as grader:
        cut = rollout(text, "12", "numeric", truncated=True, key="cut")
        whole = rollout(text, "12", "numeric", key="whole")
        assert [graded.reward for graded in grader.grade([cut, whole])] == [reward, 1.0]
