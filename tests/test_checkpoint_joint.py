"""Joint saves of two real branches (TP 2 and one rank): synchronous and asynchronous, a full disk, damage."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    complete_checkpoints,
    hash_problems,
    read_manifest,
    step_folder,
)
from copd_megatron.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from tests.distributed import run_distributed
from tests.models import make_model

pytestmark = pytest.mark.slow  # minutes on two cores

RANKS = {"alpha": [0, 1], "beta": [2]}


class _Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _actor(model: Path, branch: str) -> Any:
    from copd_megatron.policy.actor import MegatronActor

    return MegatronActor(
        model_path=model,
        parallel=ParallelConfig(tensor_model_parallel_size=len(RANKS[branch])),
        training=TrainingConfig(),
        optimizer=OptimizerConfig(lr=1e-3),
        dtype=torch.float32,
        max_tokens=64,
        temperature=1.0,
        seed=3,
        total_steps=10,
    )


def _add(actor: Any, amount: float) -> None:
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.add_(amount)


def _saves(model: Path, run_dir: Path, small: Path | None) -> dict[str, Any]:
    """One rank's part in everything below; what it found."""
    from copd_megatron.checkpoint.joint import JointSaver, Saved, find_checkpoint, load_checkpoint
    from copd_megatron.topology.world import init_world

    log = _Lines()
    logging.getLogger("copd_megatron.checkpoint").addHandler(log)
    logging.getLogger("copd_megatron.checkpoint").setLevel(logging.INFO)
    with init_world(RANKS, device="cpu", timeout_seconds=60, run_id="saves") as world:
        actor = _actor(model, world.branch)
        found: dict[str, Any] = {}

        def saved(step: int, accuracy: float | None = None) -> Saved:
            actor.version = step
            state = {"branch": world.branch, "steps_done": step, "teacher_version": None}
            return Saved(
                step=step, loop_state=state, teacher=None, config="run: {}", model_path=str(model),
                validation_accuracy=accuracy,
            )  # fmt: skip

        def saver(folder: Path, *, asynchronous: bool = False) -> JointSaver:
            return JointSaver(world, actor, folder, asynchronous=asynchronous, keep_last=2, keep_best=1)

        _rotation_and_background(world, actor, saver, saved, run_dir, found)
        found["one rank cannot write"] = _limited(world, saver(run_dir), saved(5), log)
        if small is not None:
            found["disk full"] = _on_a_full_disk(world, saver(small), saved, small, log)
        _damage(world, run_dir)
        manifest = find_checkpoint(world, run_dir, verify_hashes=True)
        assert manifest is not None
        before = [p.detach().clone() for p in actor.model.parameters()]
        _add(actor, 9.0)
        state, _ = load_checkpoint(world, actor, run_dir, manifest)
        found["resumed"] = (manifest.step, actor.version, state["branch"])
        found["weights back"] = all(
            torch.equal(a, b) for a, b in zip(before, actor.model.parameters(), strict=True)
        )
        return {**found, "log": log.lines}


def _rotation_and_background(
    world: Any, actor: Any, saver: Any, saved: Any, run_dir: Path, found: dict[str, Any]
) -> None:
    """Steps 1 and 2 in the loop's thread, 3 and 4 in another while the weights change."""
    first = saver(run_dir)
    first.save(saved(1, accuracy=0.9))
    first.save(saved(2, accuracy=0.1))
    second = saver(run_dir, asynchronous=True)
    second.save(saved(3))
    found["pending"] = second.pending
    weights = actor.snapshot()
    _add(actor, 1.0)
    second.save(saved(4))  # completes 3 first
    with torch.no_grad():
        for parameter, value in zip(actor.model.parameters(), weights.tensors, strict=True):
            parameter.copy_(value)
    found["valid"] = second.complete()
    found["kept"] = sorted(complete_checkpoints(run_dir))


def _limited(world: Any, saver: Any, saved: Any, log: _Lines) -> list[str]:
    """A save in which only rank 1 fails: its files may not grow beyond 4 kB (an OSError like a full disk)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    count = len(log.lines)
    saver.save(saved)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return log.lines[count:]


def _on_a_full_disk(world: Any, saver: Any, saved: Any, small: Path, log: _Lines) -> dict[str, Any]:
    """A save on a file system with room for one checkpoint and a half, and one when there is room again."""
    saver.save(saved(1))
    manifest = read_manifest(step_folder(small, 1))
    filler = small / "filler"
    if world.is_first:
        space = os.statvfs(small)
        filler.write_bytes(bytes(space.f_bavail * space.f_frsize - manifest.num_bytes // 2))
    world.barrier("filled")
    count = len(log.lines)
    saver.save(saved(2))
    lines = log.lines[count:]
    intact = not hash_problems(step_folder(small, 1), manifest) and not step_folder(small, 2).exists()
    world.barrier("looked")
    if world.is_first:
        filler.unlink()
    world.barrier("emptied")
    saver.save(saved(3))
    world.barrier("saved")
    return {"lines": lines, "intact": intact, "then": sorted(complete_checkpoints(small))}


def _damage(world: Any, run_dir: Path) -> None:
    """Step 4: a flipped bit. Step 6: torn. Step 7: a truncated file. Leaves step 3."""
    if world.is_first:
        newest = step_folder(run_dir, 4)
        (step_folder(run_dir, 6) / "alpha").mkdir(parents=True)
        copied = step_folder(run_dir, 7)
        subprocess.run(["cp", "-r", newest, copied], check=True)
        os.truncate(copied / "beta" / "__0_0.distcp", 1000)
        file = newest / "alpha" / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    world.barrier("damaged")


@contextlib.contextmanager
def _small_disk(folder: Path, num_bytes: int) -> Iterator[Path | None]:
    """A file system of that size, or None where this process may not mount one."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "copd-test", str(folder)]
    try:
        mounted = subprocess.run(options, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    base = tmp_path_factory.mktemp("joint")
    model = make_model(base / "model")
    with _small_disk(base / "small", 30_000_000) as small:
        results = run_distributed(_saves, 3, args=(model, base / "run", small), timeout=200)
    return results, base / "run"


def test_old_checkpoints_go_and_the_best_stays(outcome: Any) -> None:
    for rank in outcome[0]:
        assert rank["valid"] and rank["pending"]
        assert rank["kept"] == [1, 3, 4], "the two newest, and the best"


def test_when_one_rank_cannot_write_all_hear_of_it(outcome: Any) -> None:
    (line,) = outcome[0][0]["one rank cannot write"]
    assert "step_000005 not saved" in line and os.strerror(errno.EFBIG) in line and "__1_0.distcp" in line
    assert "step_000004, stays usable" in line


def test_a_full_disk_leaves_the_checkpoint_before(outcome: Any) -> None:
    if "disk full" not in outcome[0][0]:
        pytest.skip("this process may not mount a small file system")
    found = outcome[0][0]["disk full"]
    (line,) = found["lines"]
    assert os.strerror(errno.ENOSPC) in line and "step_000001, stays usable" in line
    assert all(rank["disk full"]["intact"] for rank in outcome[0])
    assert found["then"] == [1, 3], "and the next save works again"


def test_damaged_checkpoints_are_named_and_skipped(outcome: Any) -> None:
    results, run_dir = outcome
    lines = results[0]["log"]
    for step, reason in ((7, "has 1000 bytes"), (4, "SHA-256")):
        assert any(f"step_{step:06d} is damaged" in line and reason in line for line in lines), step
        assert (run_dir / "checkpoints" / f"step_{step:06d}.damaged").is_dir()
    assert any("step_000006, an unfinished save" in line for line in lines)
    assert list(complete_checkpoints(run_dir)) == [3, 1]


def test_the_save_in_the_background_holds_the_weights_of_its_step(outcome: Any) -> None:
    results, _ = outcome
    for rank, result in enumerate(results):
        assert result["resumed"] == (3, 3, "beta" if rank == 2 else "alpha")
        assert result["weights back"]


def test_a_manifest_lists_every_file(outcome: Any) -> None:
    folder = step_folder(outcome[1], 3)
    listed = {file.path for file in read_manifest(folder).files}
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == listed | {MANIFEST}
    of_each = {".metadata", "metadata.json", "loop.json", "__0_0.distcp"}
    assert listed == {f"{branch}/{file}" for branch in RANKS for file in of_each} | {"alpha/__1_0.distcp"}
