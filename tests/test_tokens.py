"""Branches exchange token ids, which have to mean the same to all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.config import BranchConfig, Config, ConfigError, ModelConfig
from copd_megatron.config.models import check_tokenizers
from copd_megatron.hf.tokens import merge_rules, token_ids

VOCABULARY = {"a": 0, "b": 1, "ab": 2}


def _folder(path: Path, vocabulary: Any, added: Any = (), merges: Any = ("a b",)) -> str:
    path.mkdir()
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    return str(path)


def _config(base: str, **own: str) -> Config:
    branches = {"first": BranchConfig()} | {name: BranchConfig(model_path=path) for name, path in own.items()}
    return Config(model=ModelConfig(path=base), branches=branches)


def test_a_teacher_of_equal_size_with_other_tokens_is_refused(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", VOCABULARY)
    other = _folder(tmp_path / "other", {"a": 0, "b": 2, "ab": 1})
    with pytest.raises(ConfigError) as refused:
        check_tokenizers(_config(base, teacher=other))
    assert str(refused.value).startswith(
        "branches.teacher.model_path: 2 token ids mean something else than in branch first's model, 1 for "
        "one: 'ab' and 'b';"
    )


def test_the_same_tokens_and_some_more_are_taken(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", VOCABULARY)
    more = _folder(tmp_path / "more", VOCABULARY, [{"content": "<tool>", "id": 3}])
    check_tokenizers(_config(base, second=more))
    conflict = _folder(tmp_path / "conflict", VOCABULARY, [{"content": "<think>", "id": 3}])
    with pytest.raises(ConfigError, match=r"branches\.third\.model_path: 1 token ids"):
        check_tokenizers(_config(more, third=conflict))


def test_a_folder_without_tokenizer_and_a_lone_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab/vocab.json").write_text(json.dumps(VOCABULARY))
    assert token_ids(tmp_path / "none") is None and merge_rules(tmp_path / "none") == {}
    assert token_ids(tmp_path / "vocab") == VOCABULARY
    check_tokenizers(_config(str(tmp_path / "none"), second=str(tmp_path / "vocab")))


def test_a_unigram_model_lists_its_tokens(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "unigram", [["a", -1.0], ["b", -2.0]], merges=None)
    assert token_ids(Path(folder)) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"model": null}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"vocab": [[]]}}',
        '{"added_tokens": [{"content": "a"}]}',
        '{"added_tokens": [7]}',
        '{"model": {"vocab": {"a": Infinity}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    base = _folder(tmp_path / "base", VOCABULARY)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad/tokenizer\.json.*copy it again"):
        check_tokenizers(_config(base, second=str(tmp_path / "bad")))
