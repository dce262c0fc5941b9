"""``copd checkpoint``: the commands that look into checkpoints and convert them."""

from __future__ import annotations

import click

from copd_megatron.cli.group import LazyGroup

EXAMPLES = """
    copd checkpoint inspect runs/copd
    copd checkpoint inspect runs/copd/checkpoints/step_000100 --verify
    copd checkpoint to-hf runs/copd/checkpoints/step_000100/text exported/text
    copd checkpoint to-megatron models/Qwen3-4B checkpoints/qwen3-4b
"""

MODULES = {
    "inspect": "copd_megatron.cli.checkpoint.inspect",
    "to-hf": "copd_megatron.cli.checkpoint.to_hf",
    "to-megatron": "copd_megatron.cli.checkpoint.to_megatron",
}


@click.group("checkpoint", cls=LazyGroup, modules=MODULES, examples=EXAMPLES)
def command() -> None:
    """Look into checkpoints, and convert them.

    Converts between Hugging Face's and Megatron's format. Works on any machine: no GPU, no Megatron-Core, no
    launcher, and never more than one tensor in memory.
    """
