"""Telling apart the prompts of a step that come from the same sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from copd_megatron.records import Prompt


def number_occurrences(prompts: Sequence[Prompt], drawn: Iterable[Prompt] = ()) -> list[Prompt]:
    """The prompts in their order, each with the lowest occurrence number that is still free.

    ``drawn``: prompts that the step already holds; they keep their numbers.

    >>> [p.group_id for p in number_occurrences([a, b, a], drawn=[b])]      # doctest: +SKIP
    ['a', 'b.1', 'a.1']
    """
    taken = {(prompt.prompt_id, prompt.occurrence) for prompt in drawn}
    lowest: dict[str, int] = {}
    numbered = []
    for prompt in prompts:
        occurrence = lowest.get(prompt.prompt_id, 0)
        while (prompt.prompt_id, occurrence) in taken:
            occurrence += 1
        lowest[prompt.prompt_id] = occurrence + 1
        numbered.append(prompt if prompt.occurrence == occurrence else replace(prompt, occurrence=occurrence))
    return numbered
