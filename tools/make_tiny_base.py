#!/usr/bin/env python3
"""Make the tiny base model of a CPU quickstart and the shards of its domains, unless they exist already.

    python tools/make_tiny_base.py --kind text --out .cache/tiny_text     # Qwen3, two text domains
    python tools/make_tiny_base.py --kind vl --out .cache/tiny_vl         # Qwen3-VL: text, image, video

The first writes the model, an ordinary Hugging Face folder, to ``.cache/tiny_text`` and the training and
validation shards to ``.cache/tiny_text_data``. This takes minutes on two cores, and no time when repeated.
``copd_megatron/tiny/recipe.py`` and ``vl_recipe.py`` define what is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.errors import DataError
from copd_megatron.tiny.base import TinyBaseError, make_data, make_tiny_base
from copd_megatron.tiny.recipe import TEXT_RECIPE, Recipe
from copd_megatron.tiny.vl import make_visual_base, make_visual_data
from copd_megatron.tiny.vl_recipe import VL_RECIPE, VisualRecipe

_SECONDS_BETWEEN_LINES = 10.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("text", "vl"), default="text", help="modalities; default: text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, help="folder of the shards; default: <out>_data")
    parser.add_argument("--seed", type=int, default=1, help="seed of the model and its warm-up")
    parser.add_argument("--steps", type=int, help="warm-up steps, instead of the recipe's")
    return parser.parse_args(arguments)


def recipe_of(arguments: argparse.Namespace) -> Recipe | VisualRecipe:
    recipe: Recipe | VisualRecipe = VL_RECIPE if arguments.kind == "vl" else TEXT_RECIPE
    if arguments.steps is None:
        return recipe
    return dataclasses.replace(recipe, warm_up=dataclasses.replace(recipe.warm_up, num_steps=arguments.steps))


class ProgressLines:
    """A line every few seconds, and for the first and the last step. The first step, which prepares data, is
    no measure of the remaining time."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._printed = float("-inf")
        self._first_done: float | None = None

    def __call__(self, step: int, num_steps: int, loss: float) -> None:
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = now
        if now - self._printed < _SECONDS_BETWEEN_LINES and step + 1 < num_steps:
            return
        self._printed = now
        line = f"  step {step + 1} of {num_steps}: loss {loss:.3f}; {now - self._started:.0f} s"
        if step:
            remaining = (now - self._first_done) / step * (num_steps - step - 1)
            line += f", {remaining:.0f} s to go"
        print(line, flush=True)


def main() -> int:
    arguments = parse_arguments()
    recipe = recipe_of(arguments)
    data = arguments.data or arguments.out.with_name(f"{arguments.out.name}_data")
    started = time.monotonic()
    try:
        if isinstance(recipe, VisualRecipe):
            names = ", ".join(recipe.names)
            made = make_visual_data(data, recipe)
        else:
            names = ", ".join(domain.name for domain in recipe.domains)
            made = make_data(data, recipe)
        print(f"{data}: shards of {names} {'written' if made else 'are there already'}", flush=True)
        if isinstance(recipe, VisualRecipe):
            made = make_visual_base(arguments.out, recipe, seed=arguments.seed, progress=ProgressLines())
        else:
            made = make_tiny_base(arguments.out, recipe, seed=arguments.seed, progress=ProgressLines())
        print(
            f"{arguments.out}: tiny base model "
            + (f"made in {time.monotonic() - started:.0f} s" if made else "is there already")
        )
    except (TinyBaseError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
