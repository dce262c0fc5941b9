"""What the warm-up imitates: correct responses to tasks, some of them with their steps."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from copd_megatron.tiny.recipe import Domain, TextBase
from copd_megatron.tiny.tasks.code import expressions, steps_of


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    prompt: str
    """The user's message."""
    response: str
    """The assistant's message, without the end of turn."""


def columns(question: str) -> str:
    """Adds two numbers from the last digit on: "Calculate 86 + 369." gives "6+9=15 8+6+1=15 3+1=4"."""
    numbers = re.findall(r"\d+", question)
    if len(numbers) != 2:
        raise ValueError(f"{question!r} has {len(numbers)} numbers; columns adds two.")
    steps = []
    carry = 0
    for place in range(1, max(map(len, numbers)) + 1):
        digits = [int(number[-place]) for number in numbers if len(number) >= place] + [carry] * (carry > 0)
        steps.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    return " ".join(steps)


def running_total(question: str) -> str:
    """Adds numbers one by one: "Calculate 4 + 1 + 7." gives "4+1=5 5+7=12"."""
    first, *others = (int(number) for number in re.findall(r"\d+", question))
    steps = []
    total = first
    for number in others:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return " ".join(steps)


def build_up(question: str) -> str:
    """Writes an expression step by step: "Write f: add 3, times 2." gives "x+3 (x+3)*2"."""
    return " ".join(expressions(steps_of(question)))


WORKINGS: dict[str, Callable[[str], str]] = {
    "columns": columns,
    "running_total": running_total,
    "build_up": build_up,
}
"""A function from a task's question to its steps, by name."""


def demonstrations(
    recipe: TextBase, count: int, *, seed: int, held_out: Collection[str] = ()
) -> list[Demonstration]:
    """``count`` demonstrations in the order in which they are shown, with domains mixed by weight and without
    the prompts of ``held_out``."""
    rng = random.Random(seed)
    sources = [text_tasks(domain, rng.getrandbits(31), held_out) for domain in recipe.domains]
    weights = [domain.weight for domain in recipe.domains]
    drawn: list[Demonstration] = []
    for position, number in enumerate(rng.choices(range(len(sources)), weights, k=count)):
        question, answer = next(sources[number])
        if rng.random() < recipe.warm_up.worked_share_at(position / count):
            steps = WORKINGS[recipe.domains[number].working](question)
            answer = f"<think>{steps}</think>{answer}"
        drawn.append(Demonstration(prompt=question, response=answer))
    return drawn


def text_tasks(domain: Domain, seed: int, held_out: Collection[str]) -> Iterator[tuple[str, str]]:
    """An endless stream of questions and gold answers, with repetitions."""
    gym = importlib.import_module("reasoning_gym")
    block = 0
    while True:
        # reasoning-gym seeds task i with seed + i, so blocks a thousand apart do not overlap
        dataset = gym.create_dataset(
            domain.family.name, seed=seed + 1000 * block, size=1000, **domain.family.settings
        )
        for index in range(1000):
            entry = dataset[index]
            if entry["question"] not in held_out:
                yield entry["question"], entry["answer"]
        block += 1
