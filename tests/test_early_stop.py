"""Over-sampling, early stop and carried responses: the bookkeeping, and with the real engine."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copd_megatron.config.schema import RolloutConfig
from copd_megatron.data.occurrences import number_occurrences
from copd_megatron.records import MediaRef, Prompt, Rollout
from copd_megatron.rollout.early_stop import (
    carried,
    continued,
    from_state,
    num_asked,
    split_groups,
    to_state,
)
from copd_megatron.rollout.engine import _enough
from tests.support.actors import make_engine
from tests.support.distributed import run_distributed
from tests.support.models import make_model
from tests.support.texts import random_texts


def _prompt(name: str, *, media: bool = False) -> Prompt:
    ref = MediaRef(source="s", shard="a", key="k", extension="png", kind="image", content_hash="0")
    return Prompt(
        prompt_id=name,
        domain="d",
        token_ids=np.array([1, 2], np.int32),
        answer="",
        verifier="exact",
        media=(ref,) if media else (),
    )


def _rollout(prompt: Prompt, sample: int, length: int, *, unfinished: bool, version: int = 0) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample_index=sample,
        token_ids=np.concatenate([prompt.token_ids, np.full(length, 7, np.int32)]),
        rollout_logprobs=np.zeros(length, np.float32),
        text="",
        truncated=False,
        weight_version=version,
        seed=0,
        unfinished=unfinished,
    )


def test_the_first_complete_groups_are_taken_and_begun_ones_left() -> None:
    prompts = [_prompt(name) for name in "abcde"]
    ends = [(False, False), (False, True), (False, False), (True, True), (False, False)]
    lengths = [(3, 4), (2, 5), (1, 1), (0, 0), (6, 6)]
    rollouts = [
        _rollout(prompt, sample, size[sample], unfinished=end[sample])
        for prompt, end, size in zip(prompts, ends, lengths, strict=True)
        for sample in range(2)
    ]
    taken, left = split_groups(rollouts, 2, 2)
    assert [r.prompt.prompt_id for r in taken] == ["a", "a", "c", "c"]
    # d was never begun: there is nothing to carry
    assert [group[0].prompt.prompt_id for group in left] == ["b", "e"]


def test_what_is_too_old_or_has_media_is_not_carried() -> None:
    groups = [
        (_rollout(_prompt("a"), 0, 3, unfinished=True, version=4),),
        (_rollout(_prompt("b"), 0, 3, unfinished=True, version=2),),
        (_rollout(_prompt("c", media=True), 0, 3, unfinished=True, version=4),),
    ]
    assert carried(groups, version=5, max_lag=1) == groups[:1]
    assert carried(groups, version=5, max_lag=3) == groups[:2]
    assert carried(groups, version=5, max_lag=0) == []


def test_carried_prompts_come_first_and_none_is_lost() -> None:
    group = (_rollout(_prompt("b"), 0, 3, unfinished=True),)
    prompts = continued([_prompt("a"), _prompt("b"), _prompt("c"), _prompt("b")], [group])
    assert [prompt.group_id for prompt in prompts] == ["b", "a", "b.1", "c", "b.2"]


def test_a_prompt_that_a_batch_holds_twice_makes_two_groups() -> None:
    # a small data set at an epoch's end: the batch is a, b, a; the second a ends first
    prompts = number_occurrences([_prompt("a"), _prompt("b"), _prompt("a")])
    rollouts = [
        _rollout(prompt, sample, 3, unfinished=prompt.group_id == "a" and sample == 1)
        for prompt in prompts
        for sample in range(2)
    ]
    taken, left = split_groups(rollouts, 2, 1)
    assert [(r.prompt.group_id, r.sample_index) for r in taken] == [("b", 0), ("b", 1)]
    assert [group[0].prompt.group_id for group in left] == ["a", "a.1"]
    again = continued(number_occurrences([_prompt("a")]), left)
    assert [prompt.group_id for prompt in again] == ["a", "a.1", "a.2"]
    restored = from_state(json.loads(json.dumps(to_state(left))))
    assert [group[0].prompt.group_id for group in restored] == ["a", "a.1"]
    # checkpoints of before have no occurrence number
    old = to_state(left[:1])
    del old[0]["prompt"]["occurrence"]
    assert from_state(old)[0][0].prompt.occurrence == 0


def test_sampling_ends_when_enough_groups_of_repeated_prompts_are_done() -> None:
    prompts = number_occurrences([_prompt("a"), _prompt("a")])
    mine = [(prompt, sample) for prompt in prompts for sample in range(2)]
    ended = _enough([prompt.group_id for prompt, _ in mine], 1, mine)
    # one response of each: neither group is complete
    assert [ended(number) for number in (0, 2, 3)] == [False, False, True]


def test_number_of_prompts_asked() -> None:
    assert [num_asked(10, share) for share in (0.0, 0.25, 0.31)] == [10, 13, 14]


# ---- with vLLM -------------------------------------------------------------------------------------------


class _Ear:
    """What the engine tells while it samples; None for every step that it makes."""

    def __init__(self) -> None:
        self.heard: list[Rollout | None] = []

    def add(self, rollout: Rollout) -> None:
        self.heard.append(rollout)

    def poll(self) -> None:
        self.heard.append(None)


def _two_steps(folder: Path) -> dict[str, Any]:
    """Six prompts, of which two are wanted; the rest is continued under other weights."""
    from copd_megatron.hf.folder import HFFolder
    from copd_megatron.rollout.early_stop import EarlyStop
    from copd_megatron.rollout.engine import SamplingSettings
    from copd_megatron.topology.single import single_process

    with single_process():
        # random bytes that end at these letters, at random times
        config = RolloutConfig(max_new_tokens=20, max_num_seqs=12, stop=list(string.printable))
        engine = make_engine(folder, config)
        engine.load_weights(HFFolder(folder).iterate(), version=3)
        prompts = [
            dataclasses.replace(_prompt(str(i)), token_ids=t.token_ids[:6])
            for i, t in enumerate(random_texts(12, 256, seed=4, longest=40)[1::2])
        ]
        settings = SamplingSettings(num_generations=2, temperature=1.0)
        ear = _Ear()
        whole = engine.sample_share(prompts, settings, step=0, listener=ear)
        first = engine.sample_share(prompts, settings, step=0, stop=EarlyStop(num_prompts=2))
        taken, left = split_groups(first, 2, 2)
        engine.load_weights(((n, t * 0.5) for n, t in HFFolder(folder).iterate()), version=4)
        begun = {(r.prompt.group_id, r.sample_index): r for group in left for r in group}
        again = continued(prompts[4:], left)
        second = engine.sample_share(
            again, settings, step=1, stop=EarlyStop(num_prompts=len(again), begun=begun)
        )
        fresh = engine.sample(prompts[:1], settings, step=2)
    return {
        "ear": ear,
        "whole": whole,
        "first": first,
        "taken": taken,
        "begun": begun,
        "second": second,
        "fresh": fresh,
    }


@pytest.mark.slow
def test_responses_are_stopped_and_continued(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    (seen,) = run_distributed(_two_steps, 1, args=(folder,), timeout=400)
    whole = {(r.prompt.prompt_id, r.sample_index): r for r in seen["whole"]}
    assert len({r.prompt.prompt_id for r in seen["taken"]}) == 2
    assert not any(r.unfinished for r in seen["taken"])
    heard = [r for r in seen["ear"].heard if r is not None]
    assert sorted(map(repr, heard)) == sorted(map(repr, seen["whole"])), "each as it is returned"
    assert seen["ear"].heard.index(None) < len(heard), "some are told of before the last has ended"
    lengths = [(r.response_length, r.unfinished) for r in seen["first"]]
    assert any(unfinished and 0 < length < 20 for length, unfinished in lengths), lengths
    for rollout in seen["first"]:  # the stop changes no token, it only comes between
        same = whole[rollout.prompt.prompt_id, rollout.sample_index]
        assert rollout.token_ids.tolist() == same.token_ids[: len(rollout.token_ids)].tolist()
        np.testing.assert_allclose(
            rollout.rollout_logprobs, same.rollout_logprobs[: rollout.response_length], atol=1e-5
        )
        assert rollout.unfinished or rollout.text == same.text
    for rollout in seen["second"]:
        earlier = seen["begun"].get((rollout.prompt.group_id, rollout.sample_index))
        assert not rollout.unfinished
        assert len(rollout.rollout_logprobs) == rollout.response_length <= 20
        assert rollout.weight_version == (4 if earlier is None else 3)
        if earlier is not None:
            size = len(earlier.token_ids)
            assert rollout.token_ids[:size].tolist() == earlier.token_ids.tolist()
            kept = rollout.rollout_logprobs[: earlier.response_length]
            np.testing.assert_array_equal(kept, earlier.rollout_logprobs)
    assert all(r.weight_version == 4 for r in seen["fresh"]), "the engine is in order after an abort"


def test_carried_groups_survive_a_checkpoint_bit_for_bit() -> None:
    noise = np.random.default_rng(3).standard_normal(9).astype(np.float32)
    prompt = dataclasses.replace(_prompt("a"), metadata={"digits": [1, 2], "unit": "m"})
    groups = [
        tuple(
            dataclasses.replace(
                _rollout(prompt, sample, 9, unfinished=bool(sample), version=4),
                rollout_logprobs=noise * (sample + 1),
                reward=None if sample else 1.0,
            )
            for sample in range(2)
        ),
        (_rollout(_prompt("with an image", media=True), 0, 2, unfinished=True),),
    ]
    (restored,) = from_state(json.loads(json.dumps(to_state(groups))))
    for before, after in zip(groups[0], restored, strict=True):
        for item in dataclasses.fields(Rollout):
            one, other = getattr(before, item.name), getattr(after, item.name)
            if isinstance(one, np.ndarray):
                assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), item.name
            elif item.name != "prompt":
                assert one == other, item.name
        assert after.prompt.metadata == prompt.metadata and after.prompt.prompt_id == "a"
        assert after.prompt.token_ids.tobytes() == prompt.token_ids.tobytes()
    assert from_state(to_state([])) == []
