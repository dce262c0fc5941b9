"""Prompts that a step draws twice: seeds and groups of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.data.occurrences import number_occurrences
from copd_megatron.data.seeds import sample_seed
from copd_megatron.records import Prompt
from tests.support.shards import write
from tests.support.text_streams import stream_of


def bare_prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, domain="d", token_ids=np.zeros(1, np.int32), answer="", verifier="exact")


def test_a_prompt_drawn_twice_for_a_step_has_seeds_and_a_group_of_its_own(tmp_path: Path) -> None:
    stream = stream_of(write(tmp_path, 3))
    first = stream.next(2)
    assert [prompt.occurrence for prompt in first] == [0, 0]
    step = stream.next(8)
    groups = [prompt.group_id for prompt in step]
    assert len(set(groups)) == 8 and len({prompt.prompt_id for prompt in step}) == 3
    seeds = {sample_seed(1, "text", 4, group, sample) for group in groups for sample in range(4)}
    assert len(seeds) == 32
    # the first occurrence is what a step without repetitions has; a step's second draw goes on counting
    assert sorted(prompt.occurrence for prompt in step) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert groups[:3] == [prompt.prompt_id for prompt in step[:3]]
    more = stream.next(3, drawn=step)
    assert not {prompt.group_id for prompt in more} & set(groups)


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_numbered_prompts_are_distinct_and_lose_nothing(drawn: list[str], more: list[str]) -> None:
    before = number_occurrences([bare_prompt(name) for name in drawn])
    after = number_occurrences([bare_prompt(name) for name in more], before)
    assert [prompt.prompt_id for prompt in after] == more
    groups = [prompt.group_id for prompt in [*before, *after]]
    assert len(set(groups)) == len(groups)
    assert all(groups.count(name) == (name in drawn + more) for name in "abc")
