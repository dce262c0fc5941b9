"""``copd tiny-base``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import COUNT, PATH, SEED
from copd_megatron.cli.progress import StepLines
from copd_megatron.untrusted.whole_file import naming

if TYPE_CHECKING:  # read when the command runs, so that the list of commands is there at once
    from copd_megatron.tiny.recipe import TextBase
    from copd_megatron.tiny.vl_recipe import VisualBase

EXAMPLES = """
    copd tiny-base --kind vl --out .cache/tiny_vl         Qwen3-VL: text, image, video
    copd tiny-base --kind text --out .cache/tiny_text     Qwen3: two text domains
    copd tiny-base --kind code --out .cache/tiny_code     Qwen3: the same, and short programs
"""


@click.command("tiny-base", cls=Command, examples=EXAMPLES)
@click.option(
    "--kind",
    type=click.Choice(["text", "code", "vl"]),
    default="text",
    show_default=True,
    help="What the model is to learn.",
)
@click.option("--out", type=PATH, required=True, help="Folder of the model.")
@click.option("--data", type=PATH, help="Folder of the shards; default: OUT_data.")
@click.option("--seed", type=SEED, default=1, show_default=True, help="Of the model and its warm-up.")
@click.option("--steps", type=COUNT, help="Warm-up steps, instead of the recipe's.")
def command(kind: str, out: Path, data: Path | None, seed: int, steps: int | None) -> int:
    """Make the quickstart's model and data.

    A tiny base model for a CPU, and the shards of its domains. The model is an ordinary Hugging Face folder.
    Takes minutes on two cores, and no time where both are there already. What is made is written down in
    copd_megatron/tiny/recipe.py and vl_recipe.py.
    """
    from copd_megatron.tiny.base import TinyBaseError

    recipe = _recipe(kind, steps)
    started = time.monotonic()
    try:
        with naming(out):
            _make_data(data or out.with_name(f"{out.name}_data"), recipe)
            made = _make_base(out, recipe, seed)
    except TinyBaseError as error:
        raise click.ClickException(str(error)) from error
    ending = f"made in {time.monotonic() - started:.0f} s" if made else "is there already"
    say(f"{out}: tiny base model {ending}")
    return 0


def _recipe(kind: str, steps: int | None) -> TextBase | VisualBase:
    from copd_megatron.tiny.recipe import CODE_BASE, TEXT_BASE
    from copd_megatron.tiny.vl_recipe import VL_BASE

    recipes: dict[str, TextBase | VisualBase] = {"text": TEXT_BASE, "code": CODE_BASE, "vl": VL_BASE}
    recipe = recipes[kind]
    if steps is None:
        return recipe
    return dataclasses.replace(recipe, warm_up=dataclasses.replace(recipe.warm_up, num_steps=steps))


def _make_data(folder: Path, recipe: TextBase | VisualBase) -> None:
    from copd_megatron.tiny.base import make_data
    from copd_megatron.tiny.vl import make_visual_data
    from copd_megatron.tiny.vl_recipe import VisualBase

    if isinstance(recipe, VisualBase):
        names, made = ", ".join(recipe.names), make_visual_data(folder, recipe)
    else:
        names, made = ", ".join(domain.name for domain in recipe.domains), make_data(folder, recipe)
    say(f"{folder}: shards of {names} {'written' if made else 'are there already'}", flush=True)


def _make_base(folder: Path, recipe: TextBase | VisualBase, seed: int) -> bool:
    """Whether it had to be made."""
    from copd_megatron.tiny.base import make_tiny_base
    from copd_megatron.tiny.vl import make_visual_base
    from copd_megatron.tiny.vl_recipe import VisualBase

    if isinstance(recipe, VisualBase):
        lines = StepLines()
        return make_visual_base(folder, recipe, seed=seed, progress=lines, prepared=lines.prepared)
    return make_tiny_base(folder, recipe, seed=seed, progress=StepLines())
