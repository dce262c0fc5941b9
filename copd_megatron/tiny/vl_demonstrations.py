"""What the warm-up of the vision-language base imitates: correct responses, some of them worked out.

A working reads the task's scene, which is what was drawn, and writes down what is seen part by part: the
squares of each row of an image, each frame of a video.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from copd_megatron.data.make import divide_by_weight
from copd_megatron.data.visual_tasks.tasks import VisualTask, family
from copd_megatron.tiny.demonstrations import demonstrations, running_total
from copd_megatron.tiny.recipe import Recipe
from copd_megatron.tiny.vl_recipe import VisualDomain, VisualRecipe

if TYPE_CHECKING:
    from copd_megatron.data.processing import ItemFeatures, MultimodalProcessor

Shown = tuple[str, frozenset[tuple[str, bytes]]]
"""A prompt and its media members: what a sample shows."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a warm-up batch."""

    prompt_ids: tuple[int, ...]
    """Placeholders expanded."""
    response_ids: tuple[int, ...]
    """With the end of turn."""
    item: ItemFeatures | None = None
    """The image or video."""


def rows(task: VisualTask) -> str:
    """Squares of the asked colour row by row, added up, then the given number: "2+1=3 3+0=3 3+2=5 5+7=12"."""
    match = re.fullmatch(r"<image>Number of (\w+) (\w+)s plus (\d+)\?", task.question)
    if match is None:
        raise ValueError(f"{task.question!r} is no sum of a count and a number; rows works these out.")
    color, shape, operand = match.groups()
    grid, cells = task.scene[1], task.scene[2]
    counts = [sum(1 for cell in cells if cell == (row, cell[1], color, shape)) for row in range(grid)]
    return running_total(" ".join([*map(str, counts), operand]))


def frames(task: VisualTask) -> str:
    """For each frame the number of the current appearance, "-" where nothing is seen: "--1-22-3----"."""
    seen = 0
    marks = []
    before = False
    for sprites in task.scene[4]:
        seen += bool(sprites) and not before
        before = bool(sprites)
        marks.append(str(seen) if sprites else "-")
    return "".join(marks)


VISUAL_WORKINGS: dict[str, Callable[[VisualTask], str]] = {"rows": rows, "frames": frames}
"""A task to its worked steps."""


def shown(task_prompt: str, media: dict[str, bytes]) -> Shown:
    """What is compared to keep validation tasks out of the warm-up."""
    return task_prompt, frozenset(media.items())


def visual_tasks(
    domain: VisualDomain, count: int, *, seed: int, held_out: Collection[Shown] = ()
) -> Iterator[tuple[VisualTask, dict[str, bytes]]]:
    """``count`` distinct tasks with their media, none of them in ``held_out``.

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
        f"the warm-up shows {count}. Lower pool_size or widen the settings."
    )


def batches_of_examples(
    recipe: VisualRecipe,
    processor: MultimodalProcessor,
    *,
    seed: int,
    held_out_prompts: Collection[str] = (),
    held_out: Collection[Shown] = (),
) -> Iterator[dict[str, list[Example]]]:
    """The warm-up's batches, each divided by domain: domain name to examples, ``batch_size`` in all."""
    end = processor.tokenizer.eos_token_id

    def response(worked: str, answer: str, rng: random.Random) -> tuple[int, ...]:
        text = f"<think>{worked}</think>{answer}" if rng.random() < recipe.warm_up.worked_share else answer
        return (*processor.tokenizer(text)["input_ids"], end)

    def prompt(text: str, items: list[ItemFeatures]) -> tuple[int, ...]:
        kinds = [item.kind for item in items]
        return tuple(processor.encode(processor.parts(text, kinds, text), items, text).tolist())

    def text_examples() -> Iterator[Example]:
        settings = Recipe(domains=(recipe.text,), warm_up=recipe.warm_up)
        for block in itertools.count():
            for item in demonstrations(settings, 1000, seed=1000 * seed + block, held_out=held_out_prompts):
                yield Example(
                    prompt_ids=prompt(item.prompt, []),
                    response_ids=(*processor.tokenizer(item.response)["input_ids"], end),
                )

    def visual_examples(domain: VisualDomain) -> Iterator[Example]:
        rng = random.Random(f"{seed}/{domain.name}/order")
        kind = family(domain.family).kind
        work = VISUAL_WORKINGS[domain.working]
        pool = []
        for task, media in visual_tasks(domain, recipe.pool_size, seed=seed, held_out=held_out):
            (data,) = media.values()
            item = processor.decode_and_process(kind, data, task.question)
            pool.append((prompt(task.question, [item]), item, work(task), task.answer))
        while True:
            rng.shuffle(pool)
            for prompt_ids, item, worked, answer in pool:
                yield Example(prompt_ids=prompt_ids, response_ids=response(worked, answer, rng), item=item)

    sources = {recipe.text.name: text_examples()} | {
        domain.name: visual_examples(domain) for domain in recipe.visual
    }
    weights = [recipe.text.weight, *(domain.weight for domain in recipe.visual)]
    sizes = divide_by_weight(recipe.warm_up.batch_size, weights)
    while True:
        yield {
            name: list(itertools.islice(source, size))
            for (name, source), size in zip(sources.items(), sizes, strict=True)
        }
