"""``copd config``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import reader_may_leave, say
from copd_megatron.config import Config, load_config
from copd_megatron.config.reference import find_settings, markdown, shown_value, values_of
from copd_megatron.config.texts import Setting

EXAMPLES = """
    copd config                                  every setting
    copd config opd.beta                         one setting
    copd config branches.text.rollout --file configs/three_branch_tiny.yaml
    copd config --search truncated               settings that mention it
"""


@click.command("config", cls=Command, examples=EXAMPLES)
@click.argument("key", required=False)
@click.option(
    "--search", "word", metavar="WORD", help="Only settings with this text in key or documentation."
)
@click.option("--file", "-f", help="Show the values that this YAML file gives, too.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting on top of --file.")
@click.option("--markdown", "as_page", is_flag=True, help="The whole reference as a Markdown page.")
def command(
    key: str | None, word: str | None, file: str | None, overrides: tuple[str, ...], as_page: bool
) -> int:
    """Explain settings.

    KEY is a setting, or a section with all its settings; without it, all are shown: what each one does, what
    may be given, its default.
    """
    if overrides and file is None:
        raise click.UsageError("--set needs --file.", click.get_current_context())
    config = None if file is None else load_config(file, overrides)
    if not as_page and not (found := find_settings(key, word)):
        raise click.ClickException(f"no setting mentions {word!r}")
    with reader_may_leave():
        if as_page:
            say(markdown(), end="")
        else:
            for setting in found:
                _print(setting, config)
    return 0


def _print(setting: Setting, config: Config | None) -> None:
    for line in _heading(setting, config):
        click.echo(line)
    text = click.wrap_text(setting.text, width=100, initial_indent="    ", subsequent_indent="    ")
    click.echo(f"{text}\n")


def _heading(setting: Setting, config: Config | None) -> Iterator[str]:
    """Key, type and default, then the values of a configuration."""
    key = click.style(setting.key, bold=True)
    if setting.is_section:
        yield key
        return
    default = shown_value(setting.default)
    yield f"{key}: {setting.expected}; {'required' if default == 'required' else f'default {default}'}"
    for value in [] if config is None else values_of(setting, config):
        note = "" if value.is_default else click.style("  (changed)", fg="yellow")
        yield f"    {value.key}={shown_value(value.value)}{note}"
