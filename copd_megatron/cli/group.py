"""Commands with examples in their help, and groups that import a command only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from textwrap import dedent
from typing import Any

import click


class _WithExamples(click.Command):
    """A command whose help ends with examples: shell lines, shown as they are written."""

    def __init__(self, *arguments: Any, examples: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.examples = dedent(examples).strip("\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, then the closing text."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}".rstrip() + "\n")
        super().format_epilog(ctx, formatter)


class Command(_WithExamples):
    """A command with examples in its help."""


class LazyGroup(_WithExamples, click.Group):
    """A group of commands that are imported when they are asked for: ``copd train`` pays for training
    alone."""

    def __init__(self, *arguments: Any, modules: Mapping[str, str], **options: Any) -> None:
        """
        Args:
            modules: name of each command to the module that defines it, as ``command``.
        """
        super().__init__(*arguments, **options)
        self._modules = dict(modules)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order in which help shows them."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; None when there is none."""
        if cmd_name not in self._modules:
            return None
        found = importlib.import_module(self._modules[cmd_name]).command
        assert isinstance(found, click.Command)
        return found
