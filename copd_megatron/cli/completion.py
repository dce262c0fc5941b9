"""``copd completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from copd_megatron.cli.group import Command

EXAMPLES = """
    eval "$(copd completion bash)"                                   bash: this shell, or a line of ~/.bashrc
    copd completion zsh > "${fpath[1]}/_copd"                        zsh: from the next shell on
    copd completion fish > ~/.config/fish/completions/copd.fish      fish: from the next shell on
"""


@click.command("completion", cls=Command, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> int:
    """Print a shell's completion script.

    It makes the shell complete the commands, options and files of copd.
    """
    from copd_megatron.cli.main import COMPLETE, copd

    found = get_completion_class(shell)
    assert found is not None  # click knows these three
    print(found(copd, {}, "copd", COMPLETE).source())
    return 0
