"""A branch that draws its prompts from several pools: shares, order, resuming, settings, real ranks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.checkpoint.compare import metric_differences
from copd_megatron.checkpoint.compatible import check_compatible, differences
from copd_megatron.checkpoint.manifest import step_folder
from copd_megatron.config import Config, ConfigError, load_config, to_yaml, validate
from copd_megatron.config.domains import describe_pools, domains_by_name
from copd_megatron.data import DataError, PromptMix, ShardSet
from copd_megatron.data.mix import deal
from copd_megatron.data.pass_rates import PassRateWriter
from tests.support.checkpoint_runs import log_of, prepare, train, write_config
from tests.support.domains import make_domains
from tests.support.models import make_model
from tests.support.shards import write
from tests.support.text_streams import stream_of

WEIGHTS = {"a": 2.0, "b": 0.5, "c": 1.0}

# ---- dealing ----------------------------------------------------------------------------------------------

weights_of_pools = st.lists(
    st.fractions(min_value=Fraction(1, 50), max_value=20, max_denominator=50), min_size=1, max_size=7
)


@settings(deadline=None)
@given(weights_of_pools, st.integers(1, 300))
def test_every_pool_has_given_its_share_at_every_moment(weights: list[Fraction], num: int) -> None:
    given_so_far: Counter[int] = Counter()
    for position, pool in enumerate(deal(weights, [0] * len(weights), num), start=1):
        given_so_far[pool] += 1
        for i, weight in enumerate(weights):
            share = position * weight / sum(weights)
            assert share - 1 < given_so_far[i] < share + 1, "rounded down or up"


@settings(deadline=None)
@given(weights_of_pools, st.lists(st.integers(0, 20), max_size=8))
def test_dealing_does_not_depend_on_the_batches(weights: list[Fraction], batches: list[int]) -> None:
    whole = deal(weights, [0] * len(weights), sum(batches))
    counts, parts = [0] * len(weights), list[int]()
    for size in batches:
        part = deal(weights, counts, size)
        counts = [count + part.count(i) for i, count in enumerate(counts)]
        parts += part
    assert parts == whole


def test_pools_take_turns() -> None:
    assert deal([Fraction(2), Fraction(1)], [0, 0], 6) == [0, 0, 1, 0, 0, 1]
    assert deal([Fraction(1)], [5], 3) == [0, 0, 0]


# ---- the mix ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pools of 5, 7 and 11 samples, in shards of one name."""
    root = tmp_path_factory.mktemp("pools")
    return {name: write(root / name, count) for name, count in (("a", 5), ("b", 7), ("c", 11))}


def mix_of(patterns: dict[str, str], weights: dict[str, float] = WEIGHTS) -> PromptMix:
    return PromptMix(
        {name: stream_of(patterns[name], domain=name, prefix=f"{name}/") for name in weights}, weights
    )


def test_each_pool_keeps_its_own_order_and_epochs(patterns: dict[str, str]) -> None:
    mix = mix_of(patterns)
    prompts = mix.next(35)
    assert Counter(p.domain for p in prompts) == {"a": 20, "b": 5, "c": 10}
    for name, count in (("a", 20), ("b", 5), ("c", 10)):
        alone = stream_of(patterns[name], domain=name, prefix=f"{name}/").next(count)
        assert [p.prompt_id for p in prompts if p.domain == name] == [p.prompt_id for p in alone]
    assert (mix.epochs, mix.epoch) == ({"a": 3, "b": 0, "c": 0}, 0)
    assert len({p.group_id for p in prompts}) == 35, "repeated prompts are numbered, pools do not collide"


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), max_size=8), save_at=st.integers(0, 8))
def test_a_resumed_mix_goes_on_as_if_nothing_had_been(
    patterns: dict[str, str], cuts: list[int], save_at: int
) -> None:
    expected = [p.prompt_id for p in mix_of(patterns).next(sum(cuts) + 6)]
    mix, got = mix_of(patterns), list[str]()
    for position, cut in enumerate([*cuts, 6]):
        if position == save_at:
            state = json.loads(json.dumps(mix.state_dict()))
            mix = mix_of(patterns)
            mix.load_state_dict(state)
        got += [p.prompt_id for p in mix.next(cut)]
    assert got == expected


def test_changed_weights_hold_from_the_resume_on(patterns: dict[str, str]) -> None:
    mix = mix_of(patterns)
    mix.next(14)
    changed = mix_of(patterns, {"a": 1.0, "b": 1.0, "c": 1.0})
    changed.load_state_dict(mix.state_dict())
    assert Counter(p.domain for p in changed.next(9)) == {"a": 3, "b": 3, "c": 3}


def test_positions_of_other_pools_are_refused(patterns: dict[str, str]) -> None:
    state = mix_of(patterns).state_dict()
    with pytest.raises(DataError, match=r"the pools are a, b, the checkpoint has a, b, c\. Restore data\."):
        mix_of(patterns, {"a": 1.0, "b": 1.0}).load_state_dict(state)
    with pytest.raises(DataError, match=r"the pools are a, b, c, the checkpoint has none"):
        mix_of(patterns).load_state_dict(stream_of(patterns["a"]).state_dict())
    with pytest.raises(DataError, match=r"the checkpoint has the pools a, b, c\. Restore data\.pools"):
        stream_of(patterns["a"]).load_state_dict(state)


# ---- settings ---------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, data: dict[str, Any], **more: Any) -> Config:
    path = tmp_path / "run.yaml"
    branches = {"mixed": {"data": data}, **more}
    path.write_text(yaml.safe_dump({"model": {"path": "base"}, "branches": branches}, sort_keys=False))
    return load_config(path, ["schedule.opd_steps=0", "opd.topology=none"])


POOLS: dict[str, Any] = {
    "text": {"train": ["t.tar"], "validation": ["tv.tar"], "weight": 3},
    "image": {"train": ["i.tar"]},
}


def test_pools_are_domains(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"pools": POOLS}, other={"data": {"train": ["o.tar"]}})
    validate(config, None, None)
    domains = domains_by_name(config)
    assert [(d.name, d.branch, d.is_pool, d.weight) for d in domains.values()] == [
        ("text", "mixed", True, 3.0),
        ("image", "mixed", True, 1.0),
        ("other", "other", False, 1.0),
    ]
    assert describe_pools(config).splitlines() == [
        "mixed: 256 prompts per step from 2 pools",
        "  text   weight 3, 75.0%, 192 prompts per step on average",
        "  image  weight 1, 25.0%, 64 prompts per step on average",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"pools": POOLS, "train": ["x.tar"]},
            r"branches\.mixed\.data\.train: given beside data\.pools \(text, image\).* into a pool",
        ),
        ({"pools": POOLS, "validation": ["x.tar"]}, r"branches\.mixed\.data\.validation: given beside"),
        ({"pools": {"text": {}}}, r"branches\.mixed\.data\.pools\.text\.train: empty; give webdataset"),
        (
            {"pools": {"text": {"train": ["t.tar"], "weight": 0}}},
            r"pools\.text\.weight: 0\.0 must be above 0",
        ),
        ({"pools": {"a/b": {"train": ["t.tar"]}}}, r"'a/b' cannot name a pool"),
        ({"pools": {"mean": {"train": ["t"], "validation": ["v"]}}}, r"is named 'mean'; rename the pool"),
        (
            {"pools": {"other": {"train": ["t.tar"]}}},
            r"branches\.other\.data: 'other' is also the name of branches\.mixed\.data\.pools\.other",
        ),
    ],
)
def test_pools_that_make_no_sense_are_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    config = config_of(tmp_path, data, other={"data": {"train": ["o.tar"]}})
    with pytest.raises(ConfigError, match=message):
        validate(config, None, None)


def test_a_checkpoint_from_before_pools_is_compatible(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"train": ["t.tar"]})
    saved = yaml.safe_load(to_yaml(config))
    del saved["branches"]["mixed"]["data"]["pools"], saved["native"]
    assert differences(yaml.safe_dump(saved), config) == {}
    config.native.weight = 0.5
    assert check_compatible(yaml.safe_dump(saved), config, where="step") == ["native.weight: 1.0 -> 0.5"]


# ---- a run on real ranks ----------------------------------------------------------------------------------


def mixed_run(root: Path, *, num_ranks: int = 1, **sections: Any) -> Path:
    """A configuration whose only branch draws from both domains of ``root / "data"``, 2 : 1."""
    both = yaml.safe_load(write_config(root, {"alpha": {}, "beta": {}}, **sections).read_text())
    data = {name: branch["data"] for name, branch in both["branches"].items()}
    pools = {"alpha": {**data["alpha"], "weight": 2}, "beta": data["beta"]}
    both["branches"] = {"mixed": {"data": {"pools": pools}, "parallel": {"data_parallel_size": num_ranks}}}
    both["opd"] = {"topology": "none"}
    path = root / "mixed.yaml"
    path.write_text(yaml.safe_dump(both))
    return path


def check_steps(run_dir: Path, counts: list[tuple[int, int]]) -> list[dict[str, float]]:
    """Each step's metrics are those of so many prompts of the two pools."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    for step, (alpha, beta) in zip(steps, counts, strict=True):
        for metric in ("reward", "response_length", "truncated_fraction"):
            one, other = (step[f"mixed/train/{metric}/{pool}"] for pool in ("alpha", "beta"))
            mean = (alpha * one + beta * other) / (alpha + beta)
            assert step[f"mixed/train/{metric}"] == pytest.approx(mean), metric
        assert step["mixed/data/epoch/alpha"] == 0
    return steps


@pytest.mark.timeout(600)
def test_a_run_draws_from_all_pools(tmp_path: Path) -> None:
    make_domains(tmp_path / "data", num_train=24, num_validation=4)
    make_model(tmp_path / "base", seed=4, num_hidden_layers=2)
    schedule = {"cycles": 1, "rlvr_steps": 2, "opd_steps": 0}
    config, run = mixed_run(tmp_path, schedule=schedule, loss={"kl_coefficient": 0.0}), tmp_path / "run"
    assert train(config, run) == 0, log_of(run).read_text()[-4000:]
    (_, last) = check_steps(run, [(4, 1), (3, 2)])
    assert {"mixed/validation/accuracy/alpha", "mixed/validation/accuracy/beta"} <= last.keys()
    table = json.loads((run / "evaluation.json").read_text())
    assert table["domains"] == ["alpha", "beta"] and table["num_prompts"] == {"alpha": 4, "beta": 4}
    state = json.loads((step_folder(run, 2) / "mixed/loop.json").read_text())
    assert state["streams"]["native"]["counts"] == {"alpha": 7, "beta": 3}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_run_gives_the_same_numbers_bit_for_bit(tmp_path: Path) -> None:
    """On two ranks, with prompts repeated by their pass rates; the second run starts from the first one's
    checkpoint after two of four steps."""
    prepare(tmp_path, num_train=12)
    config = mixed_run(tmp_path, num_ranks=2, schedule={"cycles": 1, "rlvr_steps": 4, "opd_steps": 0})
    balance = ["branches.mixed.data.difficulty.balance=u_shape"]
    for pool in ("alpha", "beta"):
        shards, rates = (
            ShardSet.open([str(tmp_path / f"data/{pool}-train-*.tar")]),
            tmp_path / f"{pool}.jsonl",
        )
        with PassRateWriter(rates, {"num_samples": 3}, shards, pool) as writer:
            writer.append(
                {"prompt": ref.id, "num_correct": 2 if i else 1, "num_samples": 3}
                for i, ref in enumerate(shards.refs)
            )
        balance.append(f"branches.mixed.data.pools.{pool}.pass_rates={rates}")
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(config, first, balance) == 0, log_of(first).read_text()[-4000:]
    (second / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(first, 2), step_folder(second, 2))
    shutil.copyfile(first / "metrics.jsonl", second / "metrics.jsonl")
    assert train(config, second, balance) == 0, log_of(second).read_text()[-4000:]
    assert metric_differences(first, second, relative=0) == []
    check_steps(second, [(4, 1), (3, 2), (3, 2), (4, 1)])
    state = json.loads((step_folder(second, 4) / "mixed/loop.json").read_text())
    alpha = state["streams"]["native"]["pools"]["alpha"]
    assert (alpha["epoch"], alpha["position"]) == (0, 14), "an epoch has 11 + 4 prompts, not 12"
