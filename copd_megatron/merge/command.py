"""The command line of merging, shared by ``copd merge`` and ``tools/merge_branches.py``. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.checkpoint.manifest import MANIFEST, CheckpointError, read_manifest
from copd_megatron.errors import ConfigError
from copd_megatron.merge.recipe import ALIASES, METHODS, WITHOUT_BASE, ModelInput, Recipe, read_recipe

if TYPE_CHECKING:
    from copd_megatron.merge.engine import MergeOutcome

DESCRIPTION = """\
Merge branches into one model, from file to file with bounded memory.

  copd merge text image video --out merged                             uniform mean
  copd merge text image --weights 0.7,0.3 --out merged                 weighted mean
  copd merge text image --base base --method ties --density 0.5 --out merged
  copd merge text image --weights '*.mlp.*=0.9,0.1' --weights 0.5,0.5 --out merged
  copd merge runs/copd/checkpoints/step_000100 --out merged            all branches of a joint checkpoint
  copd merge text image --out merged --format megatron                 write Megatron's distributed format
  copd merge recipe.yaml --out merged                                  a recipe in mergekit's manner
  torchrun --nproc-per-node 8 -m copd_megatron.cli merge ...           shards dealt to ranks

Interrupted, the same command goes on where it stopped.
"""

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NEEDS_BASE = set(METHODS) - WITHOUT_BASE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what ``run`` reads."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument(
        "models",
        nargs="+",
        help="folders of one architecture, in Hugging Face's or Megatron's distributed format, mixed freely; "
        "a joint checkpoint stands for its trained branches; or one YAML recipe",
    )
    parser.add_argument("--out", help="folder to write; without it, --report alone is made")
    how = parser.add_argument_group("how to merge (not with a recipe)")
    how.add_argument("--method", choices=[*METHODS, *ALIASES], help="default: mean")
    how.add_argument("--base", help="the model that all branches started from")
    how.add_argument(
        "--weights",
        action="append",
        metavar="[PATTERN=]W,W,...",
        help="one per model; with a pattern (part of a name, a glob, or re:...) for the tensors that it "
        "fits, the first that fits counts; default: equal",
    )
    how.add_argument(
        "--density",
        action="append",
        metavar="[PATTERN=]D[,D,...]",
        help="ties, dare: share of each task vector that is kept; one for all or one per model",
    )
    how.add_argument("--lambda", dest="scale", type=float, help="factor on the combined task vectors")
    how.add_argument("--t", type=float, help="slerp: 0 gives the first model, 1 the second")
    how.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide by the weights' sum")
    how.add_argument("--rescale", action=argparse.BooleanOptionalAction, help="keep task vectors' L1 norm")
    how.add_argument("--dtype", help="type that inputs are cast to before merging; default: as they are")
    how.add_argument("--out-dtype", help="type of the result; default: --dtype")
    how.add_argument("--tokenizer-source", default="base", help="input whose tokenizer files are copied")
    parser.add_argument("--seed", type=int, default=0, help="dare: root of the random masks")
    parser.add_argument("--shard-size", default="2GiB", help="largest output file (default: %(default)s)")
    parser.add_argument(
        "--format",
        choices=["hf", "megatron"],
        default="hf",
        help="of the result: safetensors (default), or Megatron's distributed format",
    )
    parser.add_argument(
        "--verify", action="store_true", help="first compare joint checkpoints with their recorded digests"
    )
    parser.add_argument("--processes", type=int, default=1, help="workers, each taking whole shards")
    parser.add_argument("--threads", type=int, help="per process; default: all cores")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="config.json may differ in it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an interrupted merge")
    parser.add_argument(
        "--fsync", action="store_true", help="wait for the disk before a shard counts as done"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="STEM",
        help="how far each branch moved from the base, per layer, and their cosines: print the table and "
        "write STEM.md, .json, .png (default STEM: <out>/merge_report)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carries out the command. Returns the exit status.

    Raises:
        ConfigError, FileNotFoundError, ValueError: what was asked for cannot be; says why.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = recipe_from(arguments)
        if arguments.out is None and arguments.report is None:
            raise ConfigError("merge: --out is missing; say where to write")
        if arguments.report is not None and (arguments.base or recipe.base) is None:
            raise ConfigError("merge: --report measures from a base; give it with --base")
        if arguments.out is not None:
            outcome = _merge(arguments, recipe, rank, world_size)
            if rank == 0:
                kept = f", {outcome.kept_shards} shards kept" if outcome.kept_shards else ""
                print(
                    f"wrote {arguments.out}: {outcome.num_tensors} tensors, "
                    f"{outcome.num_bytes / 1e9:.2f} GB in {outcome.seconds:.1f} s{kept}"
                )
        if arguments.report is not None and rank == 0:
            _report(arguments, recipe)
    except FileNotFoundError:
        raise
    except (OSError, CheckpointError) as error:
        print(f"copd: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    return 0


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the command line gives.

    Raises:
        ConfigError: flags that contradict each other or the recipe.
    """
    if len(arguments.models) == 1 and arguments.models[0].endswith((".yaml", ".yml")):
        given = {
            "--method": arguments.method,
            "--weights": arguments.weights,
            "--density": arguments.density,
            "--lambda": arguments.scale,
            "--t": arguments.t,
            "--normalize": arguments.normalize,
            "--rescale": arguments.rescale,
            "--dtype": arguments.dtype,
            "--out-dtype": arguments.out_dtype,
        }
        if clash := [flag for flag, value in given.items() if value is not None]:
            raise ConfigError(
                f"merge: {', '.join(clash)}: stand in the recipe {arguments.models[0]}; change it there"
            )
        return read_recipe(arguments.models[0], seed=arguments.seed)
    method = ALIASES.get(arguments.method or "mean", arguments.method or "mean")
    models = [branch for path in arguments.models for branch in _branches_of(path)]
    base = arguments.base
    if method == "slerp" and base is None and len(models) == 2:
        base, models = models[0], models[1:]
    if method in _NEEDS_BASE and base is None:
        raise ConfigError(f"merge: --method {method} needs --base, the model that the branches started from")
    if arguments.method == "weighted" and not arguments.weights:
        raise ConfigError("merge: --method weighted needs --weights, one per model")
    shared: dict[str, Any] = {
        "lambda": arguments.scale,
        "t": arguments.t,
        "normalize": arguments.normalize,
        "rescale": arguments.rescale,
    }
    if method == "slerp" and arguments.t is None:
        shared["t"] = 0.5
    per_model: list[dict[str, Any]] = [{} for _ in models]
    if "weight" in METHODS[method]["model"]:
        _spread("weight", _per_model("--weights", arguments.weights, len(models)), per_model)
        if not arguments.weights:
            # The uniform mean, or its like: task vectors are summed unless the method divides by the weights.
            divides = method in ("linear", "ties") if arguments.normalize is None else arguments.normalize
            for parameters in per_model:
                parameters["weight"] = 1.0 if divides else 1.0 / len(models)
    elif arguments.weights:
        instead = "--t instead, the way from the first model to the second" if method == "slerp" else "none"
        raise ConfigError(f"merge: --weights: {method} takes {instead}")
    _spread("density", _per_model("--density", arguments.density, len(models)), per_model)
    return Recipe(
        method=method,
        models=tuple(
            ModelInput(path=path, parameters=parameters)
            for path, parameters in zip(models, per_model, strict=True)
        ),
        base=base if method not in WITHOUT_BASE else None,
        parameters={key: value for key, value in shared.items() if value is not None},
        dtype=arguments.dtype,
        out_dtype=arguments.out_dtype,
        tokenizer_source=arguments.tokenizer_source,
        seed=arguments.seed,
    )


def _branches_of(path: str) -> list[str]:
    """The trained branches of a joint checkpoint; any other path as it is."""
    if not (Path(path) / MANIFEST).is_file():
        return [path]
    branches = read_manifest(Path(path)).branches
    return [str(Path(path) / name) for name, entry in branches.items() if not entry.frozen]


def _per_model(flag: str, texts: Sequence[str] | None, count: int) -> list[tuple[str | None, list[float]]]:
    """``[PATTERN=]v,v,...`` as pattern and values, one value per model."""
    found = []
    for text in texts or ():
        pattern, _, numbers = text.rpartition("=")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"merge: {flag} {text}: {numbers!r} is no list of numbers; write 0.5,0.5"
            ) from error
        if len(values) == 1 and flag == "--density":
            values *= count
        if len(values) != count:
            raise ConfigError(f"merge: {flag} {text}: {len(values)} numbers for {count} models")
        found.append((pattern or None, values))
    return found


def _spread(
    key: str, entries: Sequence[tuple[str | None, list[float]]], per_model: Sequence[dict[str, Any]]
) -> None:
    """Gives each model its column of the entries, as filters."""
    for index, parameters in enumerate(per_model):
        if entries:
            parameters[key] = [{"filter": pattern, "value": values[index]} for pattern, values in entries]


def parse_size(text: str) -> int:
    """Bytes from ``500M``, ``2GiB`` ...

    Raises:
        ConfigError: not a size.
    """
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(digits) :].strip().upper()
    unit = unit[:-1] if unit in ("KB", "MB", "GB") else unit
    try:
        size = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"merge: --shard-size {text}: not a size; write 500MB or 2GiB") from error
    if size <= 0:
        raise ConfigError(f"merge: --shard-size {text}: must be above 0")
    return size


def _merge(arguments: argparse.Namespace, recipe: Recipe, rank: int, world_size: int) -> MergeOutcome:
    from copd_megatron.merge.engine import run_merge

    with _world(world_size) as barrier, _bar("merging", rank) as progress:
        return run_merge(
            recipe,
            arguments.out,
            shard_bytes=parse_size(arguments.shard_size),
            allow=arguments.allow,
            overwrite=arguments.overwrite,
            resume=not arguments.fresh,
            fsync=arguments.fsync,
            output_format=arguments.format,
            verify=arguments.verify,
            processes=arguments.processes,
            threads=arguments.threads,
            rank=rank,
            world_size=world_size,
            barrier=barrier,
            progress=progress,
        )


def _report(arguments: argparse.Namespace, recipe: Recipe) -> None:
    from copd_megatron.report.merge_distance import branch_distances

    stem = arguments.report or str(Path(arguments.out or ".") / "merge_report")
    base = arguments.base or recipe.base
    assert base is not None  # checked by run
    branches = [model.path for model in recipe.models]
    with _bar("measuring", 0) as progress:
        found = branch_distances(
            base,
            branches,
            threads=arguments.threads or os.cpu_count() or 1,
            allow=arguments.allow,
            progress=progress,
        )
    print(found.to_text())
    print("wrote " + ", ".join(str(path) for path in found.write(stem)))


@contextmanager
def _world(world_size: int) -> Iterator[Callable[[], None]]:
    """A barrier over torchrun's ranks; none of it in a single process."""
    if world_size == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    # A rank may merge for hours while another has nothing left to do.
    dist.init_process_group("gloo", timeout=timedelta(hours=24))
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()


@contextmanager
def _bar(title: str, rank: int) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on rank 0's terminal (nothing where there is none)."""
    if rank != 0 or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
