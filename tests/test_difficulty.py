"""Pass rates: the index, what training does with it, and the command that makes it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.cli.main import main
from copd_megatron.config import ConfigError, load_config, validate
from copd_megatron.config.domains import Domain
from copd_megatron.config.schema import DifficultyBalance, DifficultyConfig
from copd_megatron.data import DataError, PromptStream, ShardSet
from copd_megatron.data.difficulty import UNUSABLE, Difficulty, load_difficulty, repetitions
from copd_megatron.data.order import epoch_order
from copd_megatron.data.pass_rates import PassRateWriter, read_pass_rates
from copd_megatron.hf.digest import model_digest
from copd_megatron.launch.preflight import check_inputs
from tests.support.commands import copd
from tests.support.domains import make_domains
from tests.support.models import make_model
from tests.support.shards import with_other_questions, write
from tests.support.text_streams import reader_of

N = 8
LAST = {DifficultyBalance.none: 0, DifficultyBalance.u_shape: N - 1, DifficultyBalance.mirrored_j: N}

# ---- how often a prompt is drawn ---------------------------------------------------------------------------


def reference(counts: list[int], options: DifficultyConfig, order: list[int]) -> list[int]:
    """The same, one prompt after another: whoever of its bin was drawn least, and comes first in the order,
    is drawn again."""
    times = [int(c != UNUSABLE and options.min_pass_rate <= c / N <= options.max_pass_rate) for c in counts]
    bins = {c: [i for i in order if counts[i] == c and times[i]] for c in range(1, LAST[options.balance] + 1)}
    largest = max(map(len, bins.values()), default=0)
    for members in bins.values():
        while members and sum(times[i] for i in members) < largest:
            least = min(members, key=lambda i: times[i])
            if times[least] == options.max_repeat:
                break
            times[least] += 1
    return times


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(UNUSABLE, N), min_size=1, max_size=60),
    balance=st.sampled_from(DifficultyBalance),
    max_repeat=st.integers(1, 6),
    rates=st.tuples(st.integers(0, N), st.integers(0, N)),
    seed=st.integers(0, 1000),
)
def test_repetitions_equal_a_plain_loop(
    counts: list[int], balance: DifficultyBalance, max_repeat: int, rates: tuple[int, int], seed: int
) -> None:
    low, high = sorted(rates)
    options = DifficultyConfig(
        balance=balance, max_repeat=max_repeat, min_pass_rate=low / N, max_pass_rate=high / N
    )
    order = epoch_order(len(counts), seed, 0)
    found = repetitions(np.asarray(counts), N, options, order)
    assert found.tolist() == reference(counts, options, order.tolist())


COUNTS = [0] * 20 + [1] * 12 + [2] * 5 + [4] * 2 + [7] * 12 + [8] * 30


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (DifficultyBalance.none, {0: 20, 1: 12, 2: 5, 4: 2, 7: 12, 8: 30}),
        (DifficultyBalance.u_shape, {0: 20, 1: 12, 2: 12, 4: 8, 7: 12, 8: 30}),
        (DifficultyBalance.mirrored_j, {0: 20, 1: 30, 2: 20, 4: 8, 7: 30, 8: 30}),
    ],
)
def test_bins_are_drawn_equally_often_up_to_the_cap(
    balance: DifficultyBalance, expected: dict[int, int]
) -> None:
    num_correct = np.asarray(COUNTS)
    difficulty = Difficulty(num_correct=num_correct, num_samples=N, options=DifficultyConfig(balance=balance))
    for epoch in range(3):
        drawn = difficulty.order(5, epoch)
        assert Counter(num_correct[drawn].tolist()) == expected
        assert set(drawn.tolist()) == set(range(len(COUNTS))), "0 of N and N of N are never dropped"
        spread = Counter(drawn.tolist())
        assert all(max(spread.values()) <= 4 for _ in spread)
    assert difficulty.order(5, 0).tolist() != difficulty.order(5, 1).tolist()
    assert difficulty.order(5, 1).tolist() == difficulty.order(5, 1).tolist()


def test_who_is_repeated_once_more_changes_with_the_epoch() -> None:
    num_correct = np.asarray([1] * 5 + [2] * 7)
    difficulty = Difficulty(
        num_correct=num_correct,
        num_samples=N,
        options=DifficultyConfig(balance=DifficultyBalance.u_shape),
    )
    twice = {
        epoch: frozenset(i for i, n in Counter(difficulty.order(1, epoch).tolist()).items() if n == 2)
        for epoch in range(6)
    }
    assert all(len(found) == 2 for found in twice.values()) and len(set(twice.values())) > 1


def test_without_shuffling_the_files_are_read_again_and_again() -> None:
    options = DifficultyConfig(balance=DifficultyBalance.u_shape, min_pass_rate=0.1)
    difficulty = Difficulty(num_correct=np.asarray([1, 0, 2, 1, 1]), num_samples=N, options=options)
    assert difficulty.order(1, 0, shuffle=False).tolist() == [0, 2, 3, 4, 2, 2]


# ---- the index ---------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"model": "base", "model_digest": "abc", "num_samples": N, "temperature": 1.0}


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, ShardSet]:
    """An index over 12 samples, sample i solved i % 9 times; the last could not be used."""
    shards = ShardSet.open([write(tmp_path, 12, shard_size=6)])
    path = tmp_path / "rates" / "toy.jsonl"
    with PassRateWriter(path, SETTINGS, shards, "text") as writer:
        writer.append(
            {"prompt": ref.id, "num_correct": i % (N + 1), "num_samples": N}
            for i, ref in enumerate(shards.refs[:-1])
        )
        writer.append([{"prompt": shards.refs[-1].id, "skipped": "too_long"}])
    return path, shards


def domain_of(pass_rates: Path | None) -> Domain:
    return Domain(
        name="text",
        branch="text",
        is_pool=False,
        key="branches.text.data",
        train=[],
        validation=[],
        pass_rates=None if pass_rates is None else str(pass_rates),
    )


def test_a_torn_line_is_dropped_and_scoring_goes_on(scored: tuple[Path, ShardSet]) -> None:
    path, shards = scored
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 10, 30, 0):
        path.write_bytes(whole[:cut])
        with PassRateWriter(path, SETTINGS, shards, "text") as writer:
            missing = [i for i, ref in enumerate(shards.refs) if ref.id not in writer.done]
            writer.append(
                {"prompt": shards.refs[i].id, "skipped": "too_long"}
                if i == 11
                else {"prompt": shards.refs[i].id, "num_correct": i % (N + 1), "num_samples": N}
                for i in missing
            )
        assert path.read_bytes() == whole, f"cut after {cut} bytes"


def test_indexes_of_others_are_refused(scored: tuple[Path, ShardSet], tmp_path: Path) -> None:
    path, shards = scored
    before = path.read_bytes()
    for changed, message in (
        ({"temperature": 0.7}, r"made with other settings \(temperature was 1\.0, is 0\.7\), of model base"),
        ({"model_digest": "def"}, r"model_digest was 'abc', is 'def'.*give another --out"),
    ):
        with pytest.raises(DataError, match=message):
            PassRateWriter(path, SETTINGS | changed, shards, "text")
    with PassRateWriter(path, SETTINGS | {"model": "a/copy/of/base"}, shards, "text") as writer:
        assert len(writer.done) == 12
        with pytest.raises(DataError, match="another process writes them"):
            PassRateWriter(path, SETTINGS, shards, "text")
    assert path.read_bytes() == before
    for other in (b'{"answer": 42}', b"\x7fELF" * 40, b"[1, 2]"):  # nothing of these is a whole line
        path.write_bytes(other)
        with pytest.raises(DataError, match="is there already and is no index of pass rates"):
            PassRateWriter(path, SETTINGS, shards, "text")
        assert path.read_bytes() == other
    path.write_text('{"answer": 42}\n')
    with pytest.raises(DataError, match="line 1: not a line of an index"):
        PassRateWriter(path, SETTINGS, shards, "text")
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read .* Make the index with copd data"):
        read_pass_rates(tmp_path / "nowhere.jsonl")


def test_training_reads_what_scoring_wrote(
    scored: tuple[Path, ShardSet], caplog: pytest.LogCaptureFixture
) -> None:
    path, shards = scored
    difficulty = load_difficulty(domain_of(path), DifficultyConfig(), shards)
    assert difficulty is not None
    assert difficulty.num_correct.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, UNUSABLE]
    assert "1 samples are left out" in caplog.text
    assert load_difficulty(domain_of(None), DifficultyConfig(), shards) is None
    with pytest.raises(DataError, match=r"no prompt has a pass rate between 0\.3 and 0\.35: \[2, 2, 1,"):
        load_difficulty(domain_of(path), DifficultyConfig(min_pass_rate=0.3, max_pass_rate=0.35), shards)


def test_a_prompt_without_a_pass_rate_is_named(scored: tuple[Path, ShardSet], tmp_path: Path) -> None:
    path, shards = scored
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    name = r"toy-train-000001/000000009, toy-train-000001/000000010"
    with pytest.raises(DataError, match=rf"{name}.*\(3 of 12 .*copd data difficulty --domain text --out"):
        load_difficulty(domain_of(path), DifficultyConfig(), shards)
    shutil.rmtree(tmp_path / "rates")
    with PassRateWriter(path, SETTINGS, shards, "text"):
        pass
    other = ShardSet.open([write(tmp_path / "other", 13, shard_size=7)])
    with pytest.raises(DataError, match=r"toy-train-000000\.tar has changed since it was scored"):
        load_difficulty(domain_of(path), DifficultyConfig(), other)
    pattern = str(shards.indexes[0].path.parent / "toy-train-*.tar")
    other = ShardSet.open([with_other_questions(pattern, tmp_path / "questions")])
    with pytest.raises(DataError, match=r"toy-train-000000\.tar has changed since it was scored"):
        read_pass_rates(path).check_shards(other, "text")


def test_rates_of_an_earlier_version_are_taken_with_a_word(
    scored: tuple[Path, ShardSet], caplog: pytest.LogCaptureFixture
) -> None:
    path, shards = scored
    text = path.read_text()
    for index in shards.indexes:
        text = text.replace(index.fingerprint, index.outline)
    read_pass_rates(path).check_shards(shards, "text")
    assert not caplog.records
    path.write_text(text)
    read_pass_rates(path).check_shards(shards, "text")
    assert "knew names and sizes of the samples of shard" in caplog.text


def test_a_digest_tells_models_apart_but_not_copies(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    contents = {
        "a": (weights, "{}"),
        "copy": (weights, "{}"),
        "trained": (weights * np.float32(1.001), "{}"),
        "tokenizer": (weights, '{"model": {}}'),
    }
    digests = {}
    for name, (values, tokenizer) in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(values.tobytes())
        (tmp_path / name / "tokenizer.json").write_text(tokenizer)
        (tmp_path / name / "README.md").write_text(name)
        digests[name] = model_digest(tmp_path / name)
    assert digests["a"] == digests["copy"] and len(set(digests.values())) == 3


# ---- the stream --------------------------------------------------------------------------------------------


def difficult_stream(scored: tuple[Path, ShardSet], **options: Any) -> PromptStream:
    path, shards = scored
    reader = reader_of(str(path.parent.parent / "*.tar"))
    return PromptStream(
        reader, seed=3, difficulty=load_difficulty(domain_of(path), DifficultyConfig(**options), shards)
    )


@pytest.mark.parametrize("cut", [1, 7, 16, 25])
def test_a_balanced_stream_resumes_exactly(scored: tuple[Path, ShardSet], cut: int) -> None:
    def names(stream: PromptStream, count: int) -> list[str]:
        return [prompt.prompt_id for prompt in stream.next(count)]

    options: dict[str, Any] = {"balance": DifficultyBalance.u_shape}
    expected = names(difficult_stream(scored, **options), 40)
    counts = Counter(expected[:17])
    assert sorted(counts.values()) == [1] * 5 + [2] * 6, "c = 1 twice, 2 to 7 once, repeated to two each"
    stream = difficult_stream(scored, **options)
    assert names(stream, cut) == expected[:cut]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = difficult_stream(scored, **options)
    resumed.load_state_dict(state)
    assert names(resumed, 40 - cut) == expected[cut:]
    for other in (difficult_stream(scored), difficult_stream(scored, max_repeat=1, **options)):
        with pytest.raises(DataError, match=r"difficulty changed.*Restore data\.pass_rates and data\.diff"):
            other.load_state_dict(state)


def test_repetitions_in_one_step_are_numbered(scored: tuple[Path, ShardSet]) -> None:
    prompts = difficult_stream(scored, balance=DifficultyBalance.u_shape).next(17)
    assert len({p.group_id for p in prompts}) == 17 > len({p.prompt_id for p in prompts})


# ---- settings and the command ------------------------------------------------------------------------------


def write_run(root: Path) -> Path:
    config = {
        "model": {"path": str(root / "base"), "max_sequence_tokens": 192},
        "branch_defaults": {
            "rollout": {"max_new_tokens": 4, "cpu_kv_cache_gib": 0.05},
            "data": {"max_prompt_tokens": 160},
            "reward": {"verifiers": ["numeric", "reasoning_gym"]},
        },
        "branches": {
            name: {"data": {"train": [str(root / "data" / f"{name}-train-*.tar")]}}
            for name in ("alpha", "beta")
        },
        "run": {"device": "cpu"},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "branches.alpha.data.difficulty.balance=u_shape",
            r"branches\.alpha\.data\.pass_rates is not set; make an index with copd data difficulty --domain",
        ),
        ("branches.alpha.data.difficulty.max_pass_rate=0.5", r"alpha\.data\.pass_rates is not set"),
        ("branches.alpha.data.difficulty.max_pass_rate=1.5", r"max_pass_rate: 1\.5 must be between 0 and 1"),
        ("branches.alpha.data.difficulty={min_pass_rate: 0.9, max_pass_rate: 0.1}", r"0\.9 is above .* 0\.1"),
        (
            "branches.alpha.data={train: [], pools: {a: {train: [x]}}, pass_rates: x}",
            r"data\.pass_rates: given beside data\.pools",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load_config(write_run(tmp_path), [override]), None, None)


def score(root: Path, out: Path, *words: str) -> str:
    """Runs the command over ``alpha``; what it prints."""
    words = ("--domain", "alpha", "--out", str(out), "--num-samples", "3", "--at-once", "2", *words)
    done = copd("data", "difficulty", str(write_run(root)), *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def material(root: Path) -> None:
    make_domains(root / "data", num_train=6, num_validation=1)
    make_model(root / "base", seed=4, num_hidden_layers=2)


@pytest.mark.timeout(600)
def test_the_command_scores_a_domain_and_training_reads_it(tmp_path: Path) -> None:
    material(tmp_path)
    rates = tmp_path / "rates.jsonl"
    assert "4 prompts by correct responses" in score(tmp_path, rates, "--limit", "4")
    index = read_pass_rates(rates)
    assert index.settings["top_k"] == 50 and index.settings["temperature"] == 1.0
    assert len(index.num_correct) == 4 and all(0 <= c <= 3 for c in index.num_correct.values() if c)
    settings = load_config(write_run(tmp_path), [f"branches.alpha.data.pass_rates={rates}"])
    with pytest.raises(DataError, match=r"has no pass rate of alpha-train-.*\(2 of 6 prompts are missing\)"):
        check_inputs(settings)
    with rates.open("a") as file:
        for key in ("000000004", "000000005"):
            name = f"alpha-train-000000/{key}"
            print(json.dumps({"prompt": name, "num_correct": 1, "num_samples": 3}), file=file)
    check_inputs(settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scoring_that_was_killed_goes_on_to_the_same_index(tmp_path: Path) -> None:
    material(tmp_path)
    whole, pieces = tmp_path / "whole.jsonl", tmp_path / "pieces.jsonl"
    score(tmp_path, whole)
    pieces.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:5]) + b'{"prompt": "alp')
    score(tmp_path, pieces)
    assert pieces.read_bytes() == whole.read_bytes()
    assert len(read_pass_rates(whole).num_correct) == 6


def test_an_unknown_domain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "difficulty", str(write_run(tmp_path)), "--out", str(tmp_path / "rates.jsonl")]
    for more, message in ((["--domain", "gamma"], "'gamma' has no training shards"), ([], "is missing")):
        assert main([*words, *more]) == 2
        assert f"{message}; domains with training shards: alpha, beta" in capsys.readouterr().err
