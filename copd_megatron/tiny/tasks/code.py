"""Tasks whose answer is a very short program, graded by the verifier ``code``.

``programs`` becomes a family of reasoning-gym's, so that whatever takes families takes it, too::

    copd data make-text --out data --name programs --family programs --train 4000 --set max_steps=2

"Write f: add 3, times 2." asks for ``f=lambda x:(x+3)*2``, and the gold answer is such a program. What
decides is whether ``f`` has the values in the metadata, which are computed from the steps, not by the
program.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from copd_megatron.rewards.verifiers.reasoning_gym import library

FAMILY = "programs"
_STEPS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", lambda x, number: x + number),
    "subtract": ("-", lambda x, number: x - number),
    "times": ("*", lambda x, number: x * number),
}
_STEP = re.compile(rf"({'|'.join(_STEPS)}) (\d+)")
_ARGUMENTS = (0, 1, 7)
"""Two would tell linear functions apart; a third makes it hard to list the values instead."""


@dataclass(kw_only=True)
class ProgramSettings:
    """Settings of the family, as reasoning-gym's families have them."""

    min_steps: int = 1
    max_steps: int = 3
    max_number: int = 9
    """Steps use the numbers from 2 to this one."""
    seed: int = 0
    size: int = 500

    def validate(self) -> None:
        """Raises AssertionError, as reasoning-gym's families do."""
        assert 1 <= self.min_steps <= self.max_steps, "min_steps must be from 1 to max_steps"
        assert self.max_number >= 2, "max_number must be at least 2"


def task(steps: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The task of these steps, such as ``[("add", 3), ("times", 2)]``: ``question``, ``answer`` (a response's
    fenced block) and ``metadata`` with the ``tests`` of the verifier ``code``."""
    values = []
    for value in _ARGUMENTS:
        for name, number in steps:
            value = _STEPS[name][1](value, number)
        values.append(value)
    return {
        "question": f"Write f: {', '.join(f'{name} {number}' for name, number in steps)}.",
        "answer": f"```\nf=lambda x:{expressions(steps)[-1]}\n```",
        "metadata": {"tests": [f"assert [f(x) for x in {_ARGUMENTS}] == {values}"]},
    }


def expressions(steps: Sequence[tuple[str, int]]) -> list[str]:
    """The expression after each step: ``x+3``, ``(x+3)*2``."""
    found: list[str] = []
    text, is_sum = "x", False
    for name, number in steps:
        sign = _STEPS[name][0]
        text = f"({text}){sign}{number}" if is_sum and sign == "*" else f"{text}{sign}{number}"
        is_sum = sign != "*"
        found.append(text)
    return found


def steps_of(question: str) -> list[tuple[str, int]]:
    """The steps that a question asks for."""
    return [(name, int(number)) for name, number in _STEP.findall(question)]


@functools.cache
def register() -> None:
    """Makes the family known to reasoning-gym."""
    base: Any = library().dataset.ProceduralDataset

    class Programs(base):
        verifier = "code"

        def __init__(self, config: ProgramSettings) -> None:
            super().__init__(config=config, seed=config.seed, size=config.size)

        def __getitem__(self, index: int) -> dict[str, Any]:
            rng = random.Random(self.seed + index)
            count = rng.randint(self.config.min_steps, self.config.max_steps)
            return task(
                [(rng.choice(list(_STEPS)), rng.randint(2, self.config.max_number)) for _ in range(count)]
            )

    library().factory.register_dataset(FAMILY, Programs, ProgramSettings)
