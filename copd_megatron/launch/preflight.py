"""What is checked before anything is started: packages, data, verifiers, the run directory, room on the disk
and in shared memory. Imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from copd_megatron.checkpoint.compatible import check_compatible
from copd_megatron.checkpoint.manifest import checkpoints_dir, complete_checkpoints, step_folder
from copd_megatron.config import Config, ConfigError, ModelShape, load_config, read_model_shapes
from copd_megatron.config.domains import all_domains
from copd_megatron.config.models import check_processors, check_tokenizers
from copd_megatron.data import check_shards
from copd_megatron.data.difficulty import load_difficulty
from copd_megatron.launch.device import check_device, check_memory
from copd_megatron.launch.lock import LOCK_WAIT_SECONDS, RunLock, refuse_in_use
from copd_megatron.launch.positions import check_positions
from copd_megatron.launch.prompts import PromptLengths
from copd_megatron.launch.results import (
    METRICS,
    delete_results,
    export_names,
    holds_run,
    refuse_others,
    refuse_own_models,
    set_aside_others,
)
from copd_megatron.launch.run_dir import run_directory, starts_anew
from copd_megatron.launch.shared_memory import SHARED_MEMORY, left_behind
from copd_megatron.metrics.packages import check_packages
from copd_megatron.metrics.places import check_port, check_textfile
from copd_megatron.planner.disk import _size, run_bytes
from copd_megatron.rewards import registry
from copd_megatron.rewards.terms import OWN
from copd_megatron.untrusted.json_text import lines_of
from copd_megatron.untrusted.regular_file import open_regular

SHARED_MEMORY_BYTES_PER_RANK = 64 * 2**20
"""NCCL's and vLLM's segments in /dev/shm, roughly."""


def check_start(config: Config) -> None:
    """Everything that can be known before the first process of a run is started; when nothing speaks against
    it, the run directory is made free.

    Raises:
        ConfigError, DataError, UnknownVerifierError: the run could not start, or would harm another one.
    """
    check_device(config)
    check_machine(config)
    check_port(config.logging.prometheus)
    check_run(config)
    folder = run_directory(config)
    with RunLock(folder):  # the job's first rank takes it for good
        free_run_dir(config, folder)


def check_run(config: Config, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> dict[str, int]:
    """What the run needs on whatever machine: its packages and inputs, its run directory, and the data of the
    run that it continues. Changes nothing.

    Args:
        wait_seconds: for another job in the run directory to end.

    Returns:
        As ``check_inputs``.

    Raises:
        ConfigError, DataError, UnknownVerifierError: the run could not start, or would harm another one.
    """
    num_samples, folder = check_inputs(config), run_directory(config)
    check_run_dir(config, folder, wait_seconds=wait_seconds)
    check_positions(config, folder)
    return num_samples


def check_place(config: Config) -> None:
    """Where a run takes place: this machine, by the first rank on it, and the run directory, by the first
    rank of all. A rank asks when it has joined the job, so that the others learn of a refusal. Changes
    nothing.

    Raises:
        ConfigError: there is no room, or the run directory is in use or holds another run.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_machine(config)
    if int(os.environ.get("RANK", "0")) == 0:
        check_port(config.logging.prometheus)
        check_run_dir(config, run_directory(config))


def check_machine(config: Config) -> None:
    """Whether this machine has the memory for its ranks.

    Raises:
        ConfigError: it does not.
    """
    total = sum(branch.parallel.world_size for branch in config.branches.values())
    here = local_ranks(total)
    check_memory(config, alone=here >= total)
    check_shared_memory(here)


def refusals_here(config: Config) -> Iterator[str]:
    """What speaks against a start on this machine, and may be otherwise on another one."""
    port = config.logging.prometheus
    for check in (partial(check_device, config), partial(check_machine, config), partial(check_port, port)):
        try:
            check()
        except ConfigError as error:
            yield str(error)


def check_inputs(config: Config) -> dict[str, int]:
    """Packages, tokenizers, verifiers and shards that the configuration names.

    Returns:
        Training samples of each domain that has any.

    Raises:
        ConfigError, DataError, UnknownVerifierError: something is missing or cannot be used.
    """
    check_packages(config.logging)
    if os.environ.get("RANK", "0") == "0":
        check_textfile(config.logging.prometheus)
    registry.check_requirements(named_verifiers(config))
    return check_files(config)


def named_verifiers(config: Config) -> list[str]:
    """Verifiers that the settings name."""
    branches = config.branches.values()
    return [
        name
        for branch in branches
        for name in (*branch.reward.verifiers, *branch.reward.terms)
        if name != OWN
    ]


def check_files(config: Config) -> dict[str, int]:
    """What ``check_inputs`` reads of models and data, which needs none of the packages that a run needs.

    Returns:
        Training samples of each domain that has any.

    Raises:
        ConfigError, DataError: something is missing or cannot be used.
    """
    check_tokenizers(config)
    check_processors(config, read_model_shapes(config))
    num_samples, lengths = {}, PromptLengths(config)
    for domain in all_domains(config):
        branch = config.branches[domain.branch]
        if domain.train:
            shards = check_shards(domain.train, branch.reward.verifiers)
            load_difficulty(domain, branch.data.difficulty, shards)
            lengths.check(domain, "training", shards)
            num_samples[domain.name] = len(shards.refs)
        if domain.validation:
            shards = check_shards(domain.validation, branch.reward.verifiers)
            lengths.check(domain, "validation", shards)
    return num_samples


def check_run_dir(config: Config, folder: Path, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> None:
    """Whether the run can be in the directory: it can be written, has room, and is free or holds a run that
    this configuration can continue, or with ``run.overwrite`` may delete. Changes nothing.

    Args:
        wait_seconds: for a job that uses it to end.

    Raises:
        ConfigError: the run cannot be there, or would destroy what is not its own.
    """
    check_writable(folder)
    refuse_in_use(folder, wait_seconds=wait_seconds)
    refuse_own_models(config, folder)
    refuse_others(config, folder)
    if starts_anew(config):
        check_clearing(folder, _models(config))
    else:
        _check_continues(config, folder)
    check_disk(config, read_model_shapes(config), folder)


def free_run_dir(config: Config, folder: Path) -> None:
    """Makes room for a run that nothing speaks against: deletes what an earlier run has left, with
    ``run.overwrite``, and renames what stands where the run will export. For whoever holds the lock.

    Raises:
        ConfigError: something cannot be deleted.
    """
    if starts_anew(config):
        num_ranks = sum(branch.parallel.world_size for branch in config.branches.values())
        clear_run(folder, _models(config), num_ranks=num_ranks)
    set_aside_others(folder, export_names(config))


def _models(config: Config) -> list[str]:
    """Folders that the run starts from."""
    return [config.model.path, *(b.model_path for b in config.branches.values() if b.model_path)]


def check_writable(folder: Path) -> None:
    """Whether a folder can be made and written.

    Raises:
        ConfigError: it cannot.
    """
    place = _nearest(folder)
    try:
        # without a name where the file system can do that: nothing shows
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        what = "written to" if place == folder.absolute() else f"made: {place} cannot be written to"
        raise ConfigError(
            f"run.dir: {folder} cannot be {what} ({error.strerror}); choose another run.name or run.dir"
        ) from error


def _nearest(folder: Path) -> Path:
    """A folder, or of those above it the first that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))


def _check_continues(config: Config, folder: Path) -> None:
    """Raises ConfigError: what the folder holds cannot be continued."""
    if found := complete_checkpoints(folder):
        step, manifest = next(iter(found.items()))
        check_compatible(manifest.config, config, where=str(step_folder(folder, step)))
        last = config.schedule.cycles * (config.schedule.rlvr_steps + config.schedule.opd_steps)
        if step > last:
            raise ConfigError(
                f"schedule: ends after step {last}, but {step_folder(folder, step)} is already further, and "
                "so would be what is evaluated and exported; raise schedule.cycles, or choose another "
                "run.name or run.dir"
            )
        return
    # a run that was killed before its first save was complete (in the background: before the second was due)
    # has lost nothing that starting over does not bring back
    steps_done = _num_lines(folder / METRICS)
    if steps_done > 2 * min(config.checkpoint.save_period, _earlier_save_period(folder)):
        raise ConfigError(
            f"run.dir: {folder} already holds a run of {steps_done} steps, without a checkpoint to continue "
            "from; choose another run.name or run.dir, or set run.overwrite=true"
        )


def _num_lines(path: Path) -> int:
    """Of a file; 0 where there is none."""
    if not path.exists():
        return 0
    with open_regular(path) as file:
        return sum(1 for _ in lines_of(file, path))


def _earlier_save_period(folder: Path) -> int:
    """The save period that the run in a folder had; 0 where nothing says it, so that nothing is lost."""
    try:
        earlier = load_config(folder / "config.yaml")
    except (ConfigError, OSError):
        return 0
    return earlier.checkpoint.save_period


def check_clearing(folder: Path, models: Sequence[str] = ()) -> None:
    """Whether what an earlier run has left may be deleted. Changes nothing.

    Args:
        models: folders that the new run starts from.

    Raises:
        ConfigError: a model is in it, or ``checkpoints`` is a link to somewhere else: the new run would
            continue the old one.
    """
    for model in models:
        if Path(model).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"run.overwrite: the run starts from {model}, which is in the run directory {folder} that it "
                "would clear; choose another run.name or run.dir"
            )
    checkpoints = checkpoints_dir(folder)
    if checkpoints.is_symlink():
        raise ConfigError(
            f"run.overwrite: {checkpoints} is a link to {checkpoints.resolve()}, which is left alone; remove "
            "the link, or choose another run.name or run.dir"
        )


def clear_run(folder: Path, models: Sequence[str] = (), *, num_ranks: int | None = None) -> None:
    """Deletes what an earlier run has left: all that ``results.py`` lists, and nothing else.

    Args:
        models: folders that the new run starts from.
        num_ranks: of the new run.

    Raises:
        ConfigError: something cannot be deleted, or may not (``check_clearing``).
    """
    check_clearing(folder, models)
    try:
        if holds_run(folder):
            delete_results(folder, num_ranks=num_ranks)
    except OSError as error:
        raise ConfigError(
            f"run.overwrite: {error.filename} cannot be deleted ({error.strerror}); delete it yourself, or "
            "choose another run.name or run.dir"
        ) from error


def check_disk(config: Config, shapes: Mapping[str, ModelShape], folder: Path) -> None:
    """Whether the file system of the run directory has room for the run.

    Raises:
        ConfigError: it does not.
    """
    place = _nearest(folder)
    # what an earlier run has left is replaced or deleted: it counts as free
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    needed = run_bytes(config, shapes) - there
    free = shutil.disk_usage(place).free
    if free < needed:
        options = config.checkpoint
        raise ConfigError(
            f"run.dir: {folder} needs up to {_size(needed)} more (checkpoints of all branches, "
            f"checkpoint.keep_last={options.keep_last} + keep_best={options.keep_best} + the one being "
            f"written, and the exports), {place} has {_size(free)} free; free some, choose another "
            "run.dir, or keep fewer checkpoints"
        )


def check_shared_memory(num_ranks: int, folder: Path = SHARED_MEMORY) -> None:
    """Whether this machine has shared memory for ``num_ranks`` ranks.

    Raises:
        ConfigError: it does not; a container has 64 MiB by default.
    """
    needed = num_ranks * SHARED_MEMORY_BYTES_PER_RANK
    try:
        free = shutil.disk_usage(folder).free
    except FileNotFoundError:
        raise ConfigError(f"{folder} does not exist: mount a tmpfs there, NCCL and vLLM need it") from None
    if free < needed:
        unused = left_behind(folder)
        raise ConfigError(
            f"{folder}: {free / 2**20:.0f} MiB free, {num_ranks} ranks on this machine need about "
            f"{needed / 2**20:.0f}; {f'{unused}; or ' if unused else ''}give the container more (docker run "
            "--shm-size=8g, or --ipc=host)"
        )


def local_ranks(total: int, environment: Mapping[str, str] | None = None) -> int:
    """Ranks of the job on this machine, as torchrun says; srun's tasks are taken to be spread evenly."""
    found = os.environ if environment is None else environment
    if "LOCAL_WORLD_SIZE" in found:
        return int(found["LOCAL_WORLD_SIZE"])
    nodes = int(found.get("SLURM_STEP_NUM_NODES", "1")) if "RANK" in found else 1
    return -(-total // nodes)
