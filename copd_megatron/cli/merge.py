"""``copd merge``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import SEED, WORKERS, Finite, Size, log_plainly
from copd_megatron.cli.progress import byte_bar
from copd_megatron.errors import ConfigError
from copd_megatron.merge.flags import MergeFlags, recipe_from, refuse_unread_base
from copd_megatron.merge.recipe import ALIASES, METHODS, MergeRecipe

EXAMPLES = """
    copd merge text image video --out merged                            uniform mean
    copd merge text image --weights 0.7,0.3 --out merged                weighted mean
    copd merge text image --base base --method ties --density 0.5 --out merged
    copd merge text image --weights '*.mlp.*=0.9,0.1' --weights 0.5,0.5 --out merged
    copd merge runs/copd/checkpoints/step_000100 --out merged           all branches of a joint checkpoint
    copd merge text image --out merged --format megatron                write Megatron's distributed format
    copd merge recipe.yaml --out merged                                 a merge recipe in mergekit's manner
    copd merge text image --base base --report moved                    no merge: how far each branch moved
    torchrun --nproc-per-node 8 -m copd_megatron.cli merge ...          shards divided among ranks
"""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """How the merge is carried out."""

    shard_size: int
    format: Literal["hf", "megatron"]
    verify: bool
    processes: int
    threads: int | None
    allow: tuple[str, ...]
    allow_nan: bool
    overwrite: bool
    fresh: bool
    fsync: bool


@click.command("merge", cls=Command, examples=EXAMPLES)
@click.argument("models", nargs=-1, required=True)
@click.option("--out", help="Folder to write; without it, --report alone is made.")
@click.option("--method", type=click.Choice([*METHODS, *ALIASES]), help="Default: mean.")
@click.option("--base", help="The model that all branches started from.")
@click.option(
    "--weights",
    multiple=True,
    metavar="[PATTERN=]W,W,...",
    help="One number per model; with a pattern (part of a name, a glob, or re:...) for the tensors that it "
    "fits. Repeatable, the first that fits counts. Default: equal.",
)
@click.option(
    "--density",
    multiple=True,
    metavar="[PATTERN=]D[,D,...]",
    help="ties, dare: share of each task vector that is kept; one number for all models, or one per model.",
)
@click.option("--lambda", "scale", type=Finite(), help="Factor on the combined task vectors.")
@click.option("--t", type=Finite(0, 1), help="slerp: 0 gives the first model, 1 the second.")
@click.option("--normalize/--no-normalize", default=None, help="Divide by the sum of the weights.")
@click.option("--rescale/--no-rescale", default=None, help="Keep the L1 norm of task vectors.")
@click.option("--dtype", help="Type that inputs are cast to before merging; default: their own.")
@click.option("--out-dtype", help="Type of the result; default: --dtype.")
@click.option(
    "--tokenizer-source", default="base", show_default=True, help="Input whose tokenizer files are copied."
)
@click.option("--seed", type=SEED, help="dare: root of the random masks; default: 0.")
@click.option("--shard-size", type=Size(), default="2GiB", show_default=True, help="Largest output file.")
@click.option(
    "--format",
    type=click.Choice(["hf", "megatron"]),
    default="hf",
    show_default=True,
    help="Of the result: safetensors, or Megatron's distributed format.",
)
@click.option("--verify", is_flag=True, help="First compare joint checkpoints with their recorded digests.")
@click.option(
    "--processes", type=WORKERS, default=1, show_default=True, help="Each takes whole output files."
)
@click.option("--threads", type=WORKERS, help="Per process; default: all cores.")
@click.option(
    "--allow", multiple=True, metavar="KEY", help="Key in which config.json may differ; repeatable."
)
@click.option("--allow-nan", is_flag=True, help="Write NaN and infinities that a model holds.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --out.")
@click.option("--fresh", is_flag=True, help="Do not go on with an interrupted merge.")
@click.option("--fsync", is_flag=True, help="Wait for the disk before an output file counts as done.")
@click.option(
    "--report",
    is_flag=False,
    flag_value="",
    metavar="[STEM]",
    help="How far each branch moved from the base, per layer, and their cosines: print the table and write "
    "STEM.md, .json and .png. Default STEM: OUT/merge_report.",
)
def command(out: str | None, report: str | None, **options: Any) -> int:
    """Merge branches into one model.

    MODELS are folders of one architecture, in Hugging Face's or Megatron's distributed format, mixed freely;
    a joint checkpoint stands for its trained branches. One YAML merge recipe may take their place, and that
    of the options from --method to --out-dtype. Goes
    from file to file, with bounded memory. Interrupted, the same command goes on where it stopped.
    """
    from copd_megatron.merge.target import refuse_other_report, refuse_to_overwrite

    log_plainly()
    flags, work = flags_of(options), _Work(**_fields_of(_Work, options))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    recipe = recipe_from(flags)
    if out is None and report is None:
        raise ConfigError("merge: --out is missing; say where to write")
    if out is not None and flags.base is not None:
        refuse_to_overwrite(Path(out), Path(flags.base))
    if report is None:
        refuse_unread_base(flags, recipe)
    if report is not None:
        report = report or str(Path(out or ".") / "merge_report")
        refuse_other_report(Path(f"{report}.json"))
    if report is not None and (flags.base or recipe.base) is None:
        raise ConfigError("merge: --report measures from a base; give it with --base")
    if out is not None:
        _merge(recipe, out, work, rank, world_size)
    if report is not None and rank == 0:
        _report(recipe, flags, work, report)
    return 0


def flags_of(options: Mapping[str, Any]) -> MergeFlags:
    """What to merge and how, out of all options of the command."""
    return MergeFlags(**_fields_of(MergeFlags, options))


def _fields_of(kind: type[MergeFlags] | type[_Work], options: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: options[item.name] for item in fields(kind)}


def _merge(recipe: MergeRecipe, out: str, work: _Work, rank: int, world_size: int) -> None:
    from copd_megatron.merge.engine import run_merge

    with _barrier(world_size) as barrier, byte_bar("merging", shown=rank == 0) as progress:
        outcome = run_merge(
            recipe,
            out,
            shard_bytes=work.shard_size,
            allow=work.allow,
            allow_nan=work.allow_nan,
            overwrite=work.overwrite,
            resume=not work.fresh,
            fsync=work.fsync,
            output_format=work.format,
            verify=work.verify,
            processes=work.processes,
            threads=work.threads,
            rank=rank,
            world_size=world_size,
            barrier=barrier,
            progress=progress,
        )
    if rank == 0:
        kept = f", {outcome.kept_shards} shards kept" if outcome.kept_shards else ""
        say(
            f"wrote {out}: {outcome.num_tensors} tensors, {outcome.num_bytes / 1e9:.2f} GB "
            f"in {outcome.seconds:.1f} s{kept}"
        )


def _report(recipe: MergeRecipe, flags: MergeFlags, work: _Work, stem: str) -> None:
    from copd_megatron.report.merge_distance import branch_distances

    base = flags.base or recipe.base
    assert base is not None  # asked for before the merge
    if flags.base is None and recipe.method == "slerp":
        say(f"no --base: movements are measured from {base}, the model that slerp starts from")
    with byte_bar("measuring") as progress:
        found = branch_distances(
            base,
            [model.path for model in recipe.models],
            threads=work.threads or os.cpu_count() or 1,
            allow=work.allow,
            progress=progress,
        )
    say(found.to_text())
    say("wrote " + ", ".join(str(path) for path in found.write(stem)))


@contextmanager
def _barrier(world_size: int) -> Iterator[Callable[[], None]]:
    """A barrier over torchrun's ranks; it does nothing in a single process."""
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
