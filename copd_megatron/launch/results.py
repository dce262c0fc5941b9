"""What a run writes into its directory, and what of it a run has made: the one list for starting anew, for
starting in a folder of somebody's, and for going on with a finished run. Imports no torch.

What a run exports is noted in ``exports.json`` before it is written, because nothing else tells an exported
branch from a model that somebody has put there:

    {"exports": {"text": {"step": 400, "files": ["config.json", "model.safetensors"]}}}

``files`` is null while the folder is being written.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    UNFINISHED,
    checkpoints_dir,
    complete_checkpoints,
    remove_checkpoint,
    set_aside,
)
from copd_megatron.config import Config, ConfigError
from copd_megatron.launch.provenance import SETTINGS, STARTS, forget_starts
from copd_megatron.untrusted.json_text import dumped, load_file, made
from copd_megatron.untrusted.whole_file import write_whole

logger = logging.getLogger(__name__)

METRICS: Final = "metrics.jsonl"
EXPORT: Final = "export"
EXPORTS: Final = "exports.json"
MERGED: Final = "merged"
MEAN: Final = "mean_as_it_is"
"""Where the branches are merged in between, if it cannot be done in memory."""
_REPLACED: Final = (
    *(
        "evaluation.json",
        "evaluation.txt",
        "evaluation.md",
        "report.html",
        "report.png",
        EXPORTS,
        SETTINGS,
        MEAN,
    ),
)
"""What a run writes anew, whatever is there."""
_FILES: Final = (*_REPLACED[:-1], "distances.json", "wandb_run_id", METRICS, STARTS)
"""Those that say that there is a run come last: what is interrupted here can be done again."""
_FOLDERS: Final[Mapping[str, re.Pattern[str]]] = {
    "samples": re.compile(r"[^/]+/[^/]+-\d{6,}\.jsonl\.gz"),
    "tensorboard": re.compile(r"events\.out\.tfevents\.[^/]+"),
    "timeline": re.compile(r"rank_\d{5,}\.jsonl|trace\.json"),
    "profile": re.compile(r"[^/]+_rank_\d{5,}_steps_\d+-\d+\.(trace\.json\.gz|memory\.pickle)"),
}
"""Folders that others may add to, and what the files are called that a run writes there."""
_TORN: Final = re.compile(r"(.*/)?\.[^/]+\.[0-9a-f]{12}\.partial")
"""Files that a killed process had not finished."""
_STUCK: Final = "stuck_rank_*.txt"
_LOG: Final = re.compile(r"rank_(\d{5,})\.log")
_STEP: Final = re.compile(r"step_\d{6,}(?P<damaged>\.damaged\d*)?")
_MAX_NAMED: Final = 6


@dataclass(frozen=True)
class Export:
    """A folder that a run has exported."""

    step: int
    """Steps that the weights have been trained for."""
    files: tuple[str, ...] | None
    """Names in it; None: it was being written."""


@dataclass(frozen=True)
class _Exports:
    exports: dict[str, Export]


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return any((folder / name).exists() for name in (STARTS, METRICS)) or bool(complete_checkpoints(folder))


def export_names(config: Config) -> list[str]:
    """Folders below ``export`` that a run writes at its end."""
    trained = [name for name, branch in config.branches.items() if not branch.frozen]
    merges = config.end.merge and len(trained) > 1
    return [*(trained if config.end.export or config.end.merge else []), *([MERGED] if merges else [])]


# ---- what a run would destroy ------------------------------------------------------------------------------


def refuse_own_models(config: Config, folder: Path) -> None:
    """Raises ConfigError if a model that the run reads is in a place that it writes anew or cleans up."""
    names = [*config.branches, MERGED]
    exports = [folder / EXPORT / f"{name}{end}" for name in names for end in ("", ".partial")]
    places = [*exports, *(folder / name for name in (MEAN, "checkpoints", *_FOLDERS))]
    models = {"model.path": config.model.path} | {
        f"branches.{name}.model_path": branch.model_path
        for name, branch in config.branches.items()
        if branch.model_path
    }
    for key, model in models.items():
        resolved = Path(model).expanduser().resolve()
        for place in places:
            if resolved.is_relative_to(place.resolve()):
                raise ConfigError(
                    f"{key}: {model} is in {place}, which this run writes: its own base would be lost; "
                    "choose another run.name or run.dir, or copy the model to another place"
                )


def refuse_others(config: Config, folder: Path) -> None:
    """Raises ConfigError if a folder in which no run has begun holds what a run would replace."""
    if holds_run(folder):
        return
    found = [folder / name for name in _REPLACED if os.path.lexists(folder / name)]
    found += _others_exports(folder, export_names(config))
    if found:
        raise ConfigError(
            f"run.dir: {folder} holds {_named(folder, found)}, which no run has made and this one would "
            "replace: move that away, or choose another run.name or run.dir"
        )


def set_aside_others(folder: Path, names: Sequence[str]) -> None:
    """Renames what stands where a run is going to export and is not known to be a run's, and says so."""
    for path in _others_exports(folder, names):
        logger.warning(
            "%s is not known to be of this run, which will write there; renamed to %s",
            path, set_aside(path, "kept"),
        )  # fmt: skip


def _others_exports(folder: Path, names: Sequence[str]) -> list[Path]:
    known = read_exports(folder)
    return [path for name in names for path in _of_others(folder / EXPORT / name, known.get(name))]


def _of_others(target: Path, export: Export | None) -> Iterator[Path]:
    """The folder of an export, and the unfinished one beside it, where they are there and no run's."""
    partial = target.with_name(f"{target.name}.partial")
    if _is_there(target) and not _is_own(target, export):
        yield target
    if _is_there(partial) and (export is None or export.files is not None):
        yield partial


def _is_there(path: Path) -> bool:
    """An empty folder is nothing."""
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir()))


def _is_own(target: Path, export: Export | None) -> bool:
    if export is None or target.is_symlink() or not target.is_dir():
        return False
    return export.files is None or {path.name for path in target.iterdir()} <= set(export.files)


# ---- what a run has exported -------------------------------------------------------------------------------


def read_exports(folder: Path) -> dict[str, Export]:
    """What a run has exported, by name; nothing where the list is missing or damaged."""
    try:
        return made(_Exports, load_file(folder / EXPORTS, inside=folder)).exports
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): its exports count as nobody's", folder / EXPORTS, error)
        return {}


def begin_exports(folder: Path, names: Sequence[str], step: int) -> None:
    """Notes that a run begins to export, after ``step`` steps. What is in the way and of somebody else is set
    aside."""
    set_aside_others(folder, names)
    _write_exports(folder, read_exports(folder) | {name: Export(step, None) for name in names})


def end_exports(folder: Path, names: Sequence[str]) -> None:
    """Notes that these are complete."""
    known = read_exports(folder)
    for name in names:
        files = sorted(path.name for path in (folder / EXPORT / name).iterdir())
        known[name] = Export(known[name].step, tuple(files))
    _write_exports(folder, known)


def _write_exports(folder: Path, exports: Mapping[str, Export]) -> None:
    record = {"exports": {name: asdict(export) for name, export in exports.items()}}
    write_whole(folder / EXPORTS, dumped(record, indent=1) + "\n")


# ---- starting anew -----------------------------------------------------------------------------------------


def delete_results(folder: Path, *, num_ranks: int | None = None) -> None:
    """Deletes what the runs in a folder have written; what others have put there stays, and is named. Of the
    logs, which the ranks of the new run have open already, those of further ranks go.

    Raises:
        OSError: something cannot be deleted.
    """
    for name, export in read_exports(folder).items():
        target = folder / EXPORT / name
        others = list(_of_others(target, export))
        for path in (target, target.with_name(f"{name}.partial")):
            if path not in others and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
    if (folder / MEAN).is_dir() and not (folder / MEAN).is_symlink():
        shutil.rmtree(folder / MEAN)
    for path in _entries(checkpoints_dir(folder)):
        match = _STEP.fullmatch(path.name)
        if match and (match["damaged"] or any((path / mark).exists() for mark in (MANIFEST, UNFINISHED))):
            remove_checkpoint(path)
    for name, pattern in _FOLDERS.items():
        _delete_files(folder / name, pattern)
    for path in _entries(folder / "logs"):
        match = _LOG.fullmatch(path.name)
        if match and num_ranks is not None and int(match[1]) >= num_ranks:
            path.unlink()
    for path in folder.glob(_STUCK):
        path.unlink()
    kept: list[Path] = []
    _remove_if_empty(folder / "logs")
    for name in (EXPORT, "checkpoints", *_FOLDERS):
        _remove_if_empty(folder / name)
        kept += _entries(folder / name)
    forget_starts(folder)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    if kept:
        logger.warning("run.overwrite: no run has made %s; it stays", _named(folder, kept))


def _delete_files(folder: Path, pattern: re.Pattern[str]) -> None:
    """Deletes a folder's files of this pattern, and folders that are empty then."""
    if folder.is_symlink():
        return
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            inner = path.relative_to(folder).as_posix()
            if pattern.fullmatch(inner) or _TORN.fullmatch(inner):
                path.unlink()
        for name in folders:
            _remove_if_empty(Path(place, name))


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_dir() and not folder.is_symlink():
        yield from sorted(folder.iterdir())


def _named(folder: Path, paths: Sequence[Path]) -> str:
    names = [str(path.relative_to(folder)) for path in paths]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
