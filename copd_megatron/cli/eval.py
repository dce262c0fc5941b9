"""``copd eval``."""

from __future__ import annotations

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.parameters import OVERRIDES
from copd_megatron.config import load_config
from copd_megatron.hf.model_config import read_model_shape

EXAMPLES = """
    copd eval configs/two_branch_tiny.yaml runs/two_branch_tiny/export/merged
    copd eval configs/two_branch_tiny.yaml .cache/tiny_text evaluation.max_prompts=50
"""


@click.command("eval", cls=Command, examples=EXAMPLES)
@click.argument("config")
@click.argument("model")
@OVERRIDES
def command(config: str, model: str, overrides: tuple[str, ...]) -> int:
    """Measure a model on validation sets.

    CONFIG is a YAML file, whose validation sets, verifiers and sampling settings are used; MODEL is a Hugging
    Face folder, such as an exported branch or a merged model. Prints one row of the table that ends a run.
    """
    settings = load_config(config, overrides)
    read_model_shape(model, "model")  # refused here, before the engines take their time to import

    from copd_megatron.evaluation.folder import evaluate_folder

    print(evaluate_folder(settings, model))
    return 0
