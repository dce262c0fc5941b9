"""Samples: which responses are kept, what is kept of them, how they are written, read and shown."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copd_megatron.cli.main import main
from copd_megatron.config.schema import SamplesConfig
from copd_megatron.errors import DataError
from copd_megatron.records import MediaRef, Prompt, Rollout
from copd_megatron.samples.files import Selection, read_samples, write_samples
from copd_megatron.samples.log import SampleLog
from copd_megatron.samples.record import Kind, Sample, Verdict, from_line, to_line
from copd_megatron.samples.show import shown, token_style
from copd_megatron.samples.text import prompt_text, token_texts
from copd_megatron.untrusted.visible import visible
from tests.support.byte_tokenizer import byte_tokenizer

IMAGE_PAD, END = "<|image_pad|>", "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, then the placeholder of images (256) and the end of a turn (257)."""
    return byte_tokenizer((IMAGE_PAD, END), eos_token=END, additional_special_tokens=[IMAGE_PAD])


def ids(text: str) -> list[int]:
    alphabet = byte_tokenizer().backend_tokenizer.get_vocab()
    return [alphabet[character] for character in byte_tokenizer().backend_tokenizer.encode(text).tokens]


def rollout(
    number: int, text: str = "4", *, reward: float | None = 1.0, group: str = "t-000000/1", **prompt: Any
) -> Rollout:
    tokens = [*ids(text), 257]
    asked = Prompt(
        prompt_id=group,
        domain="text",
        token_ids=np.asarray(ids("2 + 2?"), np.int32),
        answer="4",
        verifier="math",
        **prompt,
    )
    return Rollout(
        prompt=asked,
        sample_index=number,
        token_ids=np.concatenate([asked.token_ids, np.asarray(tokens, np.int32)]),
        rollout_logprobs=-np.arange(1, len(tokens) + 1, dtype=np.float32) / 8,
        text=text,
        truncated=False,
        weight_version=7,
        seed=number,
        reward=reward,
    )


def log_in(folder: Path, tokenizer: Any, *, writes: bool = True, **options: Any) -> SampleLog:
    return SampleLog(folder, "text", SamplesConfig(**options), tokenizer, run_seed=3, writes=writes)


def one_step(log: SampleLog, step: int, rollouts: Sequence[Rollout]) -> None:
    log.step = step
    log.note("native", rollouts)
    log.write_step()


def test_what_is_kept_of_a_response(tmp_path: Path, tokenizer: Any) -> None:
    log = log_in(tmp_path, tokenizer)
    native, crossed = rollout(0, "é no", reward=0.0, metadata={"level": 3}), rollout(1)
    log.step = 5
    log.note("native", [native])
    teacher = [np.asarray([-2.0, -np.inf], np.float32)]
    student = [np.asarray([-0.5, -0.25], np.float32)]
    log.note("cross:image", [crossed], edge="text<-image", student=student, teacher=teacher)
    log.write_step()
    own, taught = read_samples(tmp_path)
    assert (own.step, own.kind, own.edge, own.verdict) == (5, Kind.native, None, Verdict.wrong)
    assert (own.prompt, own.gold, own.verifier, own.metadata) == ("2 + 2?", "4", "math", {"level": 3})
    assert own.response == "é no<|im_end|>" and own.weight_version == 7 and own.num_response_tokens == 6
    assert own.pieces() == ["", "é", " ", "n", "o", END]  # é has two bytes, and a byte is a token here
    assert own.student == [-0.125, -0.25, -0.375, -0.5, -0.625, -0.75] and own.teacher is None
    assert (taught.kind, taught.edge, taught.verdict) == (Kind.cross, "text<-image", Verdict.right)
    assert taught.log_ratios() == [-1.5, None] and taught.student == [-0.5, -0.25]
    assert from_line(to_line(own), "here") == own


def test_the_choice_is_seeded_bounded_and_shared_by_components(tmp_path: Path, tokenizer: Any) -> None:
    many = [rollout(i % 8, group=f"t-000000/{i // 8}") for i in range(64)]

    def chosen(folder: str, rollouts: Sequence[Rollout]) -> list[tuple[Kind, str, int]]:
        log = log_in(tmp_path / folder, tokenizer, per_step=5)
        log.step = 2
        log.note("native", rollouts)
        log.note("cross:image", rollouts, edge="text<-image")
        log.write_step()
        return [(s.kind, s.prompt_id, s.sample_index) for s in read_samples(tmp_path / folder)]

    first = chosen("a", many)
    assert [kind for kind, *_ in first] == [Kind.native] * 3 + [Kind.cross] * 2
    assert chosen("b", many) == first
    assert sorted(chosen("c", many[::-1]), key=str) == sorted(first, key=str), "whatever the order"
    everything = {(s.prompt_id, s.sample_index) for s in read_samples(tmp_path / "a")}
    assert len(everything) >= 4, "not the same ones for both components"


def test_only_one_rank_of_a_branch_writes(tmp_path: Path, tokenizer: Any) -> None:
    log = log_in(tmp_path, tokenizer, writes=False)
    one_step(log, 1, [rollout(0)])
    log.write_evaluation("base", {"text": [rollout(0)]})
    log.resume_after(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "steps"), [({"per_step": 0}, []), ({"every_steps": 2}, [1, 3]), ({}, [1, 2, 3])]
)
def test_which_steps_are_kept(
    tmp_path: Path, tokenizer: Any, options: dict[str, int], steps: list[int]
) -> None:
    log = log_in(tmp_path, tokenizer, **options)
    for step in (1, 2, 3):
        one_step(log, step, [rollout(0)])
    found = sorted(path.name for path in tmp_path.rglob("*.gz"))
    assert found == [f"train-{step:06d}.jsonl.gz" for step in steps]


def test_a_step_run_again_replaces_its_own_and_nothing_is_doubled(tmp_path: Path, tokenizer: Any) -> None:
    log = log_in(tmp_path, tokenizer)
    for step in (1, 2, 3):
        one_step(log, step, [rollout(i) for i in range(3)])
    log.write_evaluation("text", {"text": [rollout(0)]})
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.gz")}
    again = log_in(tmp_path, tokenizer)
    again.resume_after(1)
    assert [s.step for s in read_samples(tmp_path)] == [1, 1, 1]
    one_step(again, 2, [rollout(i) for i in range(3)])
    one_step(again, 2, [rollout(i) for i in range(3)])
    assert [s.step for s in read_samples(tmp_path)] == [1, 1, 1, 2, 2, 2]
    one_step(again, 3, [rollout(i) for i in range(3)])
    again.write_evaluation("text", {"text": [rollout(0)]})
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.gz")} == before


def test_a_long_response_keeps_both_ends(tmp_path: Path, tokenizer: Any) -> None:
    log = log_in(tmp_path, tokenizer, max_tokens=5)
    one_step(log, 1, [rollout(0, "abcdefgh", metadata={"long": "x" * 10_000})])
    (sample,) = read_samples(tmp_path)
    assert sample.pieces() == ["a", "b", "c", "h", END]
    assert (sample.cut_at, sample.num_left_out, sample.num_response_tokens) == (3, 4, 9)
    assert sample.student == [-0.125, -0.25, -0.375, -1.0, -1.125]
    assert sample.metadata == {"left_out": "10012 characters"}
    assert "c […4 tokens…] h" in "".join(text.plain for text in shown(sample))


def test_a_step_of_long_responses_stays_bounded_in_bytes_and_time(tmp_path: Path, tokenizer: Any) -> None:
    """2,048 rows of 16,000 tokens: what is written depends on the settings alone."""
    rng = np.random.default_rng(0)
    base = rollout(0)
    response = rng.integers(32, 120, 16_000, dtype=np.int32)
    long = dataclasses.replace(
        base,
        token_ids=np.concatenate([base.prompt.token_ids, response]),
        rollout_logprobs=rng.normal(-1, 1, 16_000).astype(np.float32),
    )
    rows = [dataclasses.replace(long, sample_index=i) for i in range(2048)]
    log = log_in(tmp_path, tokenizer)
    begin = time.perf_counter()
    one_step(log, 1, rows)
    seconds = time.perf_counter() - begin
    assert len(list(read_samples(tmp_path))) == 8
    assert log.num_bytes < 8 * 10_000, "as the setting's text says"
    assert seconds < 2


def test_evaluations_show_the_same_prompts_every_time(tmp_path: Path, tokenizer: Any) -> None:
    log = log_in(tmp_path, tokenizer, per_evaluation=4)
    answers = {d: [rollout(0, group=f"{d}/{i}") for i in range(30)] for d in ("text", "image")}
    log.write_evaluation("base", answers)
    log.step = 9
    log.write_evaluation("text", answers)
    before, after = [list(read_samples(tmp_path, Selection(steps=(s, s)))) for s in (0, 9)]
    assert [s.prompt_id for s in before] == [s.prompt_id for s in after] and len(before) == 8
    assert {s.model for s in before} == {"base"} and {s.kind for s in after} == {Kind.validation}


def test_a_run_goes_on_where_samples_cannot_be_written(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples").write_text("a file is in the way")
    log = log_in(tmp_path, tokenizer)
    one_step(log, 1, [rollout(0)])
    one_step(log, 2, [rollout(0)])
    assert caplog.text.count("no further samples") == 1


def test_placeholders_of_media_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    tokens = [*ids("see "), *[256] * 300, *ids("?"), 257]
    assert prompt_text(tokenizer, tokens, 100) == f"see {IMAGE_PAD}*300?{END}"
    assert prompt_text(tokenizer, tokens, 4) == f"se […3 tokens…] ?{END}"
    assert token_texts(tokenizer, [*ids("aé"), 0xC3, *ids("b")][:3]) == ["a", "", "é"]
    media = (
        MediaRef(source="i/train", shard="s", key="k", extension="0.png", kind="image", content_hash="h"),
    )
    one_step(log_in(tmp_path, tokenizer), 1, [rollout(0, media=media)])
    (sample,) = read_samples(tmp_path)
    assert sample.media == [dataclasses.asdict(media[0])]


def make(**fields: Any) -> Sample:
    common: dict[str, Any] = {
        **{"step": 1, "kind": Kind.cross, "model": "text", "edge": "text<-image", "domain": "image"},
        **{"prompt_id": "i/1", "occurrence": 0, "sample_index": 0, "prompt": "How many?", "gold": "3"},
        **{"verifier": "exact", "metadata": {}, "media": [], "response": "4", "reward": 0.0, "seed": 1},
        **{"truncated": True, "num_prompt_tokens": 2, "num_response_tokens": 1, "weight_version": 1},
        **{"lengths": [1], "student": [-0.5], "teacher": [-4.0]},
    }
    return Sample(**{**common, **fields})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path / "samples/text", "train", 1, [make(), make(reward=1.0, prompt="What?")])
    write_samples(tmp_path / "samples/text", "train", 2, [make(step=2, edge=None, kind=Kind.native)])
    write_samples(tmp_path / "samples/image", "train", 1, [make(model="image")])

    def said(*options: str) -> str:
        assert main(["samples", str(tmp_path), *options]) == 0
        return capsys.readouterr().out

    assert said().count("response 0") == 4
    assert said("--limit", "1").count("step 2") == 1
    assert said("--step", "1", "--branch", "text", "--wrong").count("response 0") == 1
    assert said("--edge", "text<-image", "--prompt", "WHAT").count("right 1") == 1
    assert "teacher gap -3.500" in said("--branch", "image") and "truncated" in said("--branch", "image")
    records = [json.loads(line) for line in said("--kind", "native", "--json").splitlines()]
    assert [(r["step"], r["verdict"]) for r in records] == [(2, "wrong")]
    assert main(["samples", str(tmp_path), "--branch", "nobody"]) == 2
    assert "It has image, text" in capsys.readouterr().err
    assert main(["samples", str(tmp_path), "--prompt", "absent"]) == 2
    assert main(["samples", str(tmp_path / "nowhere")]) == 2
    assert "logging.samples.per_step" in capsys.readouterr().err


def test_a_response_cannot_move_the_cursor() -> None:
    assert visible("a\x1b[2J\r\u202eb\n\tc") == "a\\x1b[2J\\r\\u202eb\n\tc"
    lines = list(shown(make(response="\x1b[31m[bold]", lengths=[11], prompt="[red]x", gold="\x07")))
    text = "\n".join(line.plain for line in lines)
    assert "\x1b" not in text and "[bold]" in text and "[red]x" in text and "\\x07" in text
    assert [token_style(ratio) for ratio in (None, 0.1, 1.0, -3.0)] == ["", "", "green", "bold red"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples/text", "train", 1, [make()])
    path = tmp_path / "samples/text/train-000001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train-000001\.jsonl\.gz: cannot be read"):
        list(read_samples(tmp_path))
    with pytest.raises(DataError, match="here: not a sample"):
        from_line('{"kind": "native"}', "here")
    newer = json.loads(to_line(make())) | {"mood": "good"}
    assert from_line(json.dumps(newer), "here").extra == {"mood": "good"}
