"""``copd doctor``."""

from __future__ import annotations

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say

EXAMPLES = """
    copd doctor
    copd doctor --json | jq .can_run
"""


@click.command("doctor", cls=Command, examples=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> int:
    """Show what this machine can do.

    Says what it has, what that enables, and how to get the rest.
    """
    from copd_megatron.launch.doctor import report

    found = report()
    say(found.to_json() if as_json else found.to_text())
    return 0
