"""``copd``: the commands by name, and how a command ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

from copd_megatron import __version__
from copd_megatron.cli.group import LazyGroup
from copd_megatron.cli.output import reader_may_leave, say
from copd_megatron.errors import EXIT_HOPELESS, CheckpointError, is_hopeless
from copd_megatron.untrusted.visible import show_tracebacks_visibly

COMPLETE: Final = "_COPD_COMPLETE"
"""Set by the script of ``copd completion`` when the shell asks what could follow."""

EXIT_FAILED: Final = 1
"""The command was right and could not be carried out: a full disk, a damaged checkpoint."""
EXIT_MISTAKE: Final = 2
"""The user has to change something: the command line, a setting, a file."""
EXIT_INTERRUPTED: Final = 130

_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)

_REMEDIES: Final = {
    errno.ENOSPC: "free some room there, or write to another folder",
    errno.EDQUOT: "free some room there, or write to another folder",
    errno.EROFS: "write to another folder",
}

EXAMPLES = """
    copd doctor                                                 what this machine can do
    copd train configs/three_branch_tiny.yaml --dry-run         check a run without starting it
    copd train configs/three_branch_tiny.yaml run.seed=2        train, with a setting changed
    copd report runs/three_branch_tiny                          accuracies, similarity of branches, curves
    copd merge runs/a/export/text runs/a/export/image --out m   merge two branches
    copd data jsonl-to-shards mine.jsonl --out data --name mine --verifier math
"""

MODULES: Final = {
    "train": "copd_megatron.cli.train",
    "eval": "copd_megatron.cli.eval",
    "merge": "copd_megatron.cli.merge",
    "report": "copd_megatron.cli.report",
    "samples": "copd_megatron.cli.samples",
    "logs": "copd_megatron.cli.logs",
    "timeline": "copd_megatron.cli.timeline",
    "data": "copd_megatron.cli.data",
    "checkpoint": "copd_megatron.cli.checkpoint",
    "tiny-base": "copd_megatron.cli.tiny_base",
    "config": "copd_megatron.cli.config",
    "plan": "copd_megatron.cli.plan",
    "doctor": "copd_megatron.cli.doctor",
    "completion": "copd_megatron.cli.completion",
}


@click.group(
    "copd",
    cls=LazyGroup,
    modules=MODULES,
    examples=EXAMPLES,
    epilog="Exit status: 0 done, 1 failed, 2 something to change on your side, 75 saved and stopped "
    "(start it again to go on), 78 a run failed in a way that no restart can mend, 130 interrupted. "
    "COPD_TRACEBACK=1 shows where an error came from.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def copd() -> None:
    """Co-evolving policy distillation on Megatron-Core and vLLM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status.

    A mistake of the user ends with one message on standard error. A rank of a running job, and anybody who
    sets ``COPD_TRACEBACK``, gets the exception itself.

    Args:
        argv: the words behind ``copd``; None: the process's own.
    """
    show_tracebacks_visibly()
    try:
        if instruction := os.environ.get(COMPLETE):
            from click.shell_completion import shell_complete

            return shell_complete(copd, {}, "copd", COMPLETE, instruction)
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        if os.environ.get("COPD_TRACEBACK"):
            raise
        return EXIT_INTERRUPTED
    except Exception as error:
        if "RANK" in os.environ and is_hopeless(error):
            # into this rank's log and onto the screen
            sys.excepthook(type(error), error, error.__traceback__)
            return EXIT_HOPELESS
        if isinstance(error, _MISTAKES):
            return _told(error, EXIT_MISTAKE)
        if isinstance(error, OSError | CheckpointError):
            return _told(error, EXIT_FAILED)
        raise
    finally:
        with reader_may_leave():
            pass  # what is buffered is said now, or never


def _run(arguments: list[str]) -> int:
    """One command line without what errors become, but for errors in the command line itself."""
    try:
        with copd.make_context("copd", arguments) as context:
            status = copd.invoke(context)
    except click.exceptions.Exit as end:  # --help and --version have said what there is to say
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_MISTAKE
    except click.ClickException as error:
        where: click.Context | None = getattr(error, "ctx", None)
        hint = f" Try: {where.command_path} --help" if where is not None else ""
        say(f"copd: {error.format_message()}{hint}", file=sys.stderr)
        return EXIT_MISTAKE
    return status if isinstance(status, int) else 0


def _told(error: Exception, status: int) -> int:
    """Says what went wrong, and returns ``status``; raises the error where a traceback is wanted."""
    if _wants_traceback():
        raise error
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{error.filename}: {error.strerror}"
        if error.errno in _REMEDIES and ";" not in error.strerror:
            message += f"; {_REMEDIES[error.errno]}"
    say(f"copd: {message}", file=sys.stderr)
    return status


def _wants_traceback() -> bool:
    """Whether this is a rank of a running job, or somebody who looks for a fault."""
    return "RANK" in os.environ or bool(os.environ.get("COPD_TRACEBACK"))
