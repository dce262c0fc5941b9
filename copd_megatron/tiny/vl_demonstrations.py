"""What the warm-up of the vision-language base imitates: correct responses, some of them with their steps.

The steps come from the task's scene, that is, from what was drawn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from copd_megatron.tiny.demonstrations import WORKINGS, running_total, text_tasks
from copd_megatron.tiny.tasks.families import VisualTask, family
from copd_megatron.tiny.tasks.text import divide_by_weight
from copd_megatron.tiny.vl_recipe import VisualBase, VisualDomain

if TYPE_CHECKING:
    from copd_megatron.data.processing import ItemFeatures, MultimodalProcessor

Shown = tuple[str, frozenset[tuple[str, bytes]]]
"""A prompt and its media members: what a sample shows."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a warm-up batch."""

    prompt_ids: tuple[int, ...]
    """With expanded placeholders."""
    response_ids: tuple[int, ...]
    """Including the end of turn."""
    item: ItemFeatures | None = None
    """The image or video."""


def written_digits(task: VisualTask) -> str:
    """The digits written in an image of ``read_digits``, added one by one: "4+1=5 5+7=12"."""
    digits: str = task.scene[2]
    return running_total(" ".join(digits))


def shown_digits(task: VisualTask) -> str:
    """The digits shown in a video of ``digit_sequence``, added one by one."""
    return running_total(" ".join(digit for digit, *_ in task.scene[3]))


VISUAL_WORKINGS: dict[str, Callable[[VisualTask], str]] = {
    "written_digits": written_digits,
    "shown_digits": shown_digits,
}
"""A function from a task to its steps, by name."""


def shown(task_prompt: str, media: dict[str, bytes]) -> Shown:
    """What is compared to keep validation tasks out of the warm-up."""
    return task_prompt, frozenset(media.items())


def visual_tasks(
    domain: VisualDomain, count: int, *, seed: int, held_out: Collection[Shown] = ()
) -> Iterator[tuple[VisualTask, dict[str, bytes]]]:
    """``count`` distinct tasks with their media, without those of ``held_out``.

    Raises DataError as the family does, ValueError if the family has fewer distinct tasks.
    """
    kind = family(domain.family)
    settings = kind.configure(domain.settings)
    rng = random.Random(f"{seed}/{domain.name}")
    known: set[str] = set()
    for _ in range(50 * count):
        if len(known) == count:
            return
        task = kind.make(settings, rng)
        if task.identity in known:
            continue
        media = dict(task.draw())
        if shown(task.question, media) not in held_out:
            known.add(task.identity)
            yield task, media
    raise ValueError(
        f"family {domain.family!r} with settings {dict(domain.settings)} gave {len(known)} distinct tasks, "
        f"but the warm-up shows {count}. Lower pool_size or widen the settings."
    )


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A visual task as the model reads it, and what its demonstrations say."""

    prompt_ids: tuple[int, ...]
    item: ItemFeatures
    worked: str
    answer: str


def encoded_pools(
    recipe: VisualBase,
    processor: MultimodalProcessor,
    *,
    seed: int,
    held_out: Collection[Shown] = (),
    prepared: Callable[[int, int], None] | None = None,
) -> dict[str, list[Encoded]]:
    """The visual domains' ``pool_size`` tasks each, drawn and encoded.

    Args:
        prepared: called with the number of tasks that are ready, and of all.
    """
    pools: dict[str, list[Encoded]] = {domain.name: [] for domain in recipe.visual}
    for number, domain in enumerate(recipe.visual):
        kind, work = family(domain.family).kind, VISUAL_WORKINGS[domain.working]
        for task, media in visual_tasks(domain, recipe.pool_size, seed=seed, held_out=held_out):
            (data,) = media.values()
            item = processor.decode_and_process(kind, data, task.question)
            prompt_ids = _prompt_ids(processor, task.question, [item])
            pool = pools[domain.name]
            pool.append(Encoded(prompt_ids=prompt_ids, item=item, worked=work(task), answer=task.answer))
            if prepared is not None:
                prepared(number * recipe.pool_size + len(pool), len(recipe.visual) * recipe.pool_size)
    return pools


def _prompt_ids(processor: MultimodalProcessor, text: str, items: list[ItemFeatures]) -> tuple[int, ...]:
    kinds = [item.kind for item in items]
    return tuple(processor.encode(processor.parts(text, kinds, text), items, text).tolist())


def batches_of_examples(
    recipe: VisualBase,
    processor: MultimodalProcessor,
    *,
    seed: int,
    held_out_prompts: Collection[str] = (),
    pools: Mapping[str, Sequence[Encoded]],
) -> Iterator[dict[str, list[Example]]]:
    """The warm-up's batches by domain: domain name to examples, ``batch_size`` examples in total.

    Args:
        pools: those of the visual domains, from ``encoded_pools``.
    """
    warm_up = recipe.warm_up
    end = processor.tokenizer.eos_token_id
    step = 0

    def response(worked: str, answer: str, rng: random.Random) -> tuple[int, ...]:
        works = rng.random() < warm_up.worked_share_at(step / warm_up.num_steps)
        text = f"<think>{worked}</think>{answer}" if works else answer
        return (*processor.tokenizer(text)["input_ids"], end)

    def text_examples() -> Iterator[Example]:
        rng = random.Random(f"{seed}/{recipe.text.name}/order")
        work = WORKINGS[recipe.text.working]
        for question, answer in text_tasks(recipe.text, rng.getrandbits(31), held_out_prompts):
            prompt_ids = _prompt_ids(processor, question, [])
            yield Example(prompt_ids=prompt_ids, response_ids=response(work(question), answer, rng))

    def visual_examples(domain: VisualDomain) -> Iterator[Example]:
        rng = random.Random(f"{seed}/{domain.name}/order")
        pool = list(pools[domain.name])
        while True:
            rng.shuffle(pool)
            for task in pool:
                response_ids = response(task.worked, task.answer, rng)
                yield Example(prompt_ids=task.prompt_ids, response_ids=response_ids, item=task.item)

    sources = {recipe.text.name: text_examples()} | {
        domain.name: visual_examples(domain) for domain in recipe.visual
    }
    weights = [recipe.text.weight, *(domain.weight for domain in recipe.visual)]
    sizes = divide_by_weight(warm_up.batch_size, weights)
    while True:
        yield {
            name: list(itertools.islice(source, size))
            for (name, source), size in zip(sources.items(), sizes, strict=True)
        }
        step += 1
