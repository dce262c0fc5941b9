"""Prompts from shards: encoded, ordered, split over ranks, resumed, held out."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.data import (
    DataError,
    PromptReader,
    PromptStream,
    ShardSet,
    encode_prompt,
    load_validation,
    split_evenly,
)
from copd_megatron.data.convert.write import write_shards
from copd_megatron.data.order import epoch_order
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.shards import new_sample, record, with_other_questions, write, write_raw
from tests.support.text_streams import chat_tokenizer, plain_tokenizer, reader_of, stream_of

if TYPE_CHECKING:
    pass


def ids(prompts: Sequence[Any]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


# ---- tokenising --------------------------------------------------------------------------------------------


def test_chat_template_system_prompt_and_generation_prompt() -> None:
    def text(prompt: Any, system: str | None = None) -> str:
        return chat_tokenizer().decode(encode_prompt(chat_tokenizer(), prompt, system))

    user = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text("hi") == user
    assert text([{"role": "user", "content": "hi"}]) == user
    assert text("hi", "be kind") == "<|im_start|>system\nbe kind<|im_end|>\n" + user
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert text(own, "be kind") == "<|im_start|>system\nmine<|im_end|>\n" + user
    assert encode_prompt(chat_tokenizer(), "hi").dtype == np.int32


def test_without_a_chat_template() -> None:
    assert plain_tokenizer().decode(encode_prompt(plain_tokenizer(), "hi")) == "hi"
    assert plain_tokenizer().decode(encode_prompt(plain_tokenizer(), "hi", "be kind")) == "be kind\n\nhi"
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(plain_tokenizer(), [{"role": "user", "content": "hi"}])


# ---- the stream --------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_sample_once_and_epochs_differ(tmp_path: Path) -> None:
    stream = stream_of(write(tmp_path, 37))
    epochs = [ids(stream.next(37)) for _ in range(3)]
    assert stream.epoch == 2
    assert len(set(epochs[0])) == 37
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert {i // 10 for i in (int(name.rsplit("/")[-1]) for name in epochs[0][:10])} != {
        0
    }  # shuffled over shards


def test_order_depends_on_seed_alone_and_never_changes(tmp_path: Path) -> None:
    pattern = write(tmp_path, 37)
    assert ids(stream_of(pattern, seed=5).next(50)) == ids(stream_of(pattern, seed=5).next(50))
    assert ids(stream_of(pattern, seed=5).next(50)) != ids(stream_of(pattern, seed=6).next(50))
    # Pinned: a change here would silently give resumed runs other data.
    assert epoch_order(10, seed=1, epoch=0).tolist() == PINNED[0]
    assert epoch_order(10, seed=1, epoch=1).tolist() == PINNED[1]


def test_unshuffled_order_is_file_order(tmp_path: Path) -> None:
    prompts = stream_of(write(tmp_path, 12), shuffle=False).next(24)
    assert [prompt.answer for prompt in prompts] == [str(i) for i in range(12)] * 2


def test_prompts_carry_everything(tmp_path: Path) -> None:
    (prompt,) = stream_of(write(tmp_path, 1), chat_tokenizer()).next(1)
    assert (prompt.prompt_id, prompt.domain) == ("toy-train-000000/000000000", "text")
    assert (prompt.answer, prompt.verifier, prompt.metadata) == ("0", "exact", {"number": 0})
    assert "What is 0?" in chat_tokenizer().decode(prompt.token_ids)


@pytest.fixture(scope="module")
def mixed_pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 samples of which five cannot be used."""
    folder = tmp_path_factory.mktemp("mixed")
    members = []
    for i in range(23):
        bad = {5: b"{", 9: record(prompt="x" * 200), 14: record(answer=...), 20: record(verifier="absent")}
        members.append((f"{i:04d}.json", bad.get(i, record(prompt=f"Say {i}", answer=str(i)))))
    members[2] = ("0002.txt", b"no json here")
    return write_raw(folder / "mixed.tar", members)


def mixed_stream(pattern: str, seed: int = 3) -> PromptStream:
    shards = ShardSet.open([pattern])
    reader = PromptReader(shards, plain_tokenizer(), domain="text", max_prompt_tokens=50, verifiers={"exact"})
    return PromptStream(reader, seed=seed)


def test_bad_samples_are_skipped_counted_and_logged(
    mixed_pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream = mixed_stream(mixed_pattern)
    with caplog.at_level(logging.WARNING):
        prompts = stream.next(18)
    assert {prompt.answer for prompt in prompts} == {str(i) for i in range(23) if i not in (2, 5, 9, 14, 20)}
    assert stream.epoch == 0
    stream.next(18 * 9)
    reasons = ("not_json", "too_long", "missing_field", "unknown_verifier", "no_json")
    assert set(stream.skipped) == set(reasons) and all(9 <= n <= 10 for n in stream.skipped.values())
    for key in ("0002", "0005", "0009", "0014", "0020"):
        assert f"mixed.tar, sample '{key}'" in caplog.text
    assert len(caplog.records) == 5  # each once, though met in every epoch


def test_log_stops_after_a_few_of_a_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [(f"{i}.json", record() if i == 7 else b"{") for i in range(30)]
    reader = PromptReader(
        ShardSet.open([write_raw(tmp_path / "s.tar", members)]),
        plain_tokenizer(),
        domain="text",
        max_prompt_tokens=50,
    )
    with caplog.at_level(logging.WARNING):
        PromptStream(reader, seed=1).next(3)
    assert reader.skipped["not_json"] > 29
    assert len(caplog.records) == 3
    assert [("only counted" in record.message) for record in caplog.records] == [False, False, True]


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=12), save_at=st.integers(0, 12), seed=st.integers(0, 2**40))
def test_sequence_does_not_depend_on_cuts_or_restarts(
    mixed_pattern: str, cuts: list[int], save_at: int, seed: int
) -> None:
    whole = mixed_stream(mixed_pattern, seed)
    expected = ids(whole.next(sum(cuts)))
    stream = mixed_stream(mixed_pattern, seed)
    got: list[str] = []
    for position, cut in enumerate(cuts):
        if position == save_at:
            state = json.loads(json.dumps(stream.state_dict()))
            stream = mixed_stream(mixed_pattern, seed)
            stream.load_state_dict(state)
        got += ids(stream.next(cut))
    assert got == expected
    assert stream.skipped == whole.skipped
    assert ids(stream.next(25)) == ids(whole.next(25))


def test_restoring_onto_other_data_or_settings_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pattern = write(tmp_path / "a", 20)
    state = stream_of(pattern).state_dict()
    with pytest.raises(DataError, match=r"shards changed \(fingerprint.*Put back the shards"):
        stream_of(write(tmp_path / "b", 21)).load_state_dict(state)
    others = stream_of(with_other_questions(pattern, tmp_path / "c"))
    with pytest.raises(DataError, match=r"shards changed \(fingerprint.*Put back the shards"):
        others.load_state_dict(state)
    assert not caplog.records
    others.load_state_dict({**state, "fingerprint": others.reader.shards.outline})
    assert "of an earlier version, which knew names and sizes" in caplog.text
    with pytest.raises(DataError, match=r"seed was 1, is 2.*Restore run\.seed"):
        stream_of(pattern, seed=2).load_state_dict(state)
    with pytest.raises(DataError, match=r"shuffle.*Restore data\.shuffle"):
        stream_of(pattern, shuffle=False).load_state_dict(state)


def test_a_stream_without_usable_samples_is_an_error(tmp_path: Path) -> None:
    stream = stream_of(write(tmp_path, 5), max_prompt_tokens=3)
    with pytest.raises(DataError, match=r"none of the 5 samples can be used.*too_long"):
        stream.next(1)


def test_a_message_order_that_the_template_refuses_is_a_bad_sample(tmp_path: Path) -> None:
    strict = byte_tokenizer(
        chat_template="{{ raise_exception('roles must alternate') if messages[0].role != 'user' }}ok"
    )
    pattern = write_raw(
        tmp_path / "s.tar",
        [
            ("a.json", record(prompt=[{"role": "assistant", "content": "no"}])),
            ("b.json", record(prompt=[{"role": "user", "content": "yes"}])),
        ],
    )
    stream = stream_of(pattern, strict)
    assert ids(stream.next(4)) == ["s/b"] * 4
    assert stream.skipped["chat_template"] >= 3


def test_media_are_not_silently_dropped_on_a_text_branch(tmp_path: Path) -> None:
    write_shards([new_sample(0), new_sample(1, media={"0.png": b"x"})], tmp_path, "toy")
    stream = stream_of(str(tmp_path / "*.tar"))
    assert [prompt.answer for prompt in stream.next(3)] == ["0"] * 3
    assert stream.skipped["media_unsupported"] >= 2


@given(st.lists(st.integers(), max_size=200), st.integers(1, 17))
def test_split_loses_and_duplicates_nothing(items: list[int], world: int) -> None:
    parts = [split_evenly(items, rank, world) for rank in range(world)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_split_refuses_ranks_outside_the_world(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="is not in"):
        split_evenly([1], rank, world)


# ---- validation --------------------------------------------------------------------------------------------


def test_validation_is_complete_and_in_file_order(tmp_path: Path) -> None:
    reader = reader_of(write(tmp_path, 25, prefix="val"))
    assert [prompt.answer for prompt in load_validation(reader)] == [str(i) for i in range(25)]
    some = load_validation(reader, max_prompts=5)
    assert [prompt.answer for prompt in some] == ["0", "5", "10", "15", "20"]
    assert len(load_validation(reader, max_prompts=99)) == 25


def test_validation_skips_and_says_so(mixed_pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = load_validation(reader_of(mixed_pattern, max_prompt_tokens=50, verifiers=["exact"]))
    assert len(prompts) == 18
    assert "of 23 validation samples" in caplog.text
    with pytest.raises(DataError, match="no validation sample can be used"):
        load_validation(reader_of(mixed_pattern, max_prompt_tokens=1))


def test_every_process_computes_the_same_order(tmp_path: Path) -> None:
    pattern = write(tmp_path, 50)
    code = (
        "import sys; from copd_megatron.data import ShardSet\n"
        "from copd_megatron.data.order import epoch_order;"
        "s = ShardSet.open([sys.argv[1]]);"
        "print(s.fingerprint, *(s.refs[i].id for i in epoch_order(len(s), 7, 2)))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code, pattern], env=environment, check=True, capture_output=True, text=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    with tempfile.TemporaryDirectory() as elsewhere:
        moved = Path(elsewhere) / "data"
        Path(tmp_path).rename(moved)
        assert outputs.pop().split()[0] == ShardSet.open([str(moved / "*.tar")]).fingerprint


PINNED = [[9, 2, 4, 7, 5, 0, 8, 6, 3, 1], [5, 6, 3, 0, 7, 2, 1, 4, 9, 8]]


@pytest.mark.parametrize("filler", ["7", "a ", "<|im_start|>", "é", "\n."], ids=repr)
def test_a_prompt_without_end_is_too_long_before_it_is_tokenised(filler: str, tmp_path: Path) -> None:
    """Five million characters, which a tokenizer would take half a minute and a gigabyte for."""
    samples = [record(prompt=filler * (5_000_000 // len(filler))), record(prompt="short")]
    write_raw(tmp_path / "a.tar", [(f"{number:03d}.json", sample) for number, sample in enumerate(samples)])
    begun = time.process_time()
    reader = reader_of(f"{tmp_path}/*.tar", chat_tokenizer(), max_prompt_tokens=64)
    found = [reader.read(index) for index in range(2)]
    assert [prompt is None for prompt in found] == [True, False]
    assert reader.skipped == {"too_long": 1}
    assert time.process_time() - begun < 2
