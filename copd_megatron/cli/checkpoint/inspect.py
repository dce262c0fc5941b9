"""``copd checkpoint inspect``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from copd_megatron.checkpoint.manifest import MANIFEST, CheckpointError, step_folders
from copd_megatron.cli.group import Command
from copd_megatron.cli.output import reader_may_leave, say
from copd_megatron.cli.parameters import PATH, WORKERS
from copd_megatron.untrusted.json_text import dumped

EXAMPLES = """
    copd checkpoint inspect runs/copd                                       the run's checkpoints
    copd checkpoint inspect runs/copd/checkpoints/step_000100               layout, sizes, types, versions
    copd checkpoint inspect runs/copd/checkpoints/step_000100 --verify      read and hash every file
    copd checkpoint inspect runs/copd/checkpoints/step_000100 --files       size and SHA-256 of every file
    copd checkpoint inspect runs/copd/checkpoints/step_000100/text --tensors
"""


@click.command("inspect", cls=Command, examples=EXAMPLES)
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Compare the SHA-256 of every file with the manifest's.")
@click.option("--files", is_flag=True, help="List every file with its size and SHA-256.")
@click.option("--tensors", is_flag=True, help="List every tensor of a branch's folder.")
@click.option("--threads", type=WORKERS, default=4, show_default=True, help="Files hashed at once.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(path: Path, verify: bool, files: bool, tensors: bool, threads: int, as_json: bool) -> int:
    """Show what a checkpoint holds and whether it is whole.

    PATH is a run directory, one of its checkpoints, a branch's folder in one, or a folder in Megatron's
    format. Sizes are always compared with the manifest, hashes with --verify. A folder without a manifest is
    shown as it is: its files are compared with its own index. Exit status: 0 whole, 1 damaged or unfinished.
    """
    from copd_megatron.formats import inspection

    with reader_may_leave():
        if tensors:
            rows = inspection.tensor_rows(path)
            _print(rows, inspection.tensor_lines(rows), as_json)
            return 0
        folders = _checkpoints(path)
        if not folders:
            if verify:
                raise CheckpointError(
                    f"{path}: --verify compares with a manifest, and there is none here: give the whole "
                    "checkpoint, the folder with manifest.json"
                )
            record = inspection.describe_folder(path, files=files)
            _print(record, inspection.folder_lines(record), as_json)
            return 1 if record["problems"] else 0
        status = 0
        for folder in folders:
            try:
                record = inspection.describe_checkpoint(folder, verify=verify, threads=threads)
            except CheckpointError as error:  # told, and the run's other checkpoints are shown all the same
                say(f"copd: {error}", file=sys.stderr)
                status = 1
                continue
            _print(record, inspection.checkpoint_lines(record, files=files), as_json)
            status = 1 if record["problems"] else status
        return status


def _checkpoints(path: Path) -> list[Path]:
    """The joint checkpoints that ``path`` names, newest first; none: it is a folder of another kind.

    Raises:
        CheckpointError: a run directory without checkpoints.
    """
    if (path / "checkpoints").is_dir():
        if not (found := step_folders(path)):
            raise CheckpointError(f"{path}: no checkpoints; set checkpoint.save_period to have some")
        return list(found.values())
    is_one = (path / MANIFEST).is_file() or (path.is_dir() and path.name.startswith("step_"))
    return [path] if is_one else []


def _print(record: Any, lines: Iterable[str], as_json: bool) -> None:
    if as_json:
        say(dumped(record, indent=1))
        return
    for line in lines:
        say(line)
