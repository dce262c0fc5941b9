"""Joint saves of two real branches (TP 2 and one rank): synchronous and asynchronous, a full disk, damage."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    complete_checkpoints,
    hash_problems,
    read_manifest,
    step_folder,
)
from copd_megatron.config import BranchConfig, Config, ModelConfig
from copd_megatron.config.schema import OptimizerConfig, ParallelConfig
from copd_megatron.hf.folder import HFFolder
from copd_megatron.topology.layout import Layout
from tests.support.actors import make_actor
from tests.support.commands import load_tool, run_tool
from tests.support.disks import small_disk
from tests.support.distributed import run_distributed
from tests.support.models import make_model

RANKS = {"alpha": [0, 1], "beta": [2]}


class _Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _actor(model: Path, branch: str) -> Any:
    parallel = ParallelConfig(tensor_model_parallel_size=len(RANKS[branch]))
    return make_actor(parallel, model, optimizer=OptimizerConfig(lr=1e-3), max_tokens=64)


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
            state = {"branch": world.branch, "teacher_version": None, "table": {"base": {"a": math.nan}}}
            return Saved(
                step=step, loop_state=state, teacher=None, config="run: {}", model_path=str(model),
                validation_accuracy=accuracy,
            )  # fmt: skip

        def saver(folder: Path, *, asynchronous: bool = False) -> JointSaver:
            return JointSaver(world, actor, folder, asynchronous=asynchronous, keep_last=2, keep_best=1)

        _rotation_and_background(world, actor, saver, saved, run_dir, found)
        found["one rank cannot write"] = _limited(world, saver(run_dir), saved(5), log)
        if small is not None:
            found["disk full"] = _on_a_full_disk(world, saver, saved, small, log)
        _damage(world, run_dir)
        manifest = find_checkpoint(world, run_dir, verify_hashes=True)
        assert manifest is not None
        before = [p.detach().clone() for p in actor.model.parameters()]
        _add(actor, 9.0)
        state, _ = load_checkpoint(world, actor, run_dir, manifest)
        found["no score"] = state["table"]["base"]["a"]
        found["resumed"] = (manifest.step, actor.version, state["branch"])
        found["weights back"] = all(
            torch.equal(a, b) for a, b in zip(before, actor.model.parameters(), strict=True)
        )
        found["thread failed"] = _failure_in_the_background(run_dir.with_name("failed"))
        found["without its loop state"] = _without_loop_state(world, run_dir.with_name("loop"), run_dir)
        found["nothing whole"] = _all_damaged(world, run_dir.with_name("lost"), run_dir)
        return {**found, "log": log.lines}


def _rotation_and_background(
    world: Any, actor: Any, saver: Any, saved: Any, run_dir: Path, found: dict[str, Any]
) -> None:
    """Steps 1 and 2 in the loop's thread, 3 and 4 in another while the weights change."""
    first = saver(run_dir)
    first.save(saved(1, accuracy=0.9))
    first.save(saved(2, accuracy=math.nan))
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
    world.barrier("deleted")  # the first rank deletes after the others have gone on
    found["kept"] = sorted(complete_checkpoints(run_dir))


def _limited(world: Any, saver: Any, saved: Any, log: _Lines) -> list[str]:
    """A save in which only rank 1 fails: its files may not grow beyond 4 kB (an OSError like a full disk)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    count = len(log.lines)
    saver.save(saved)
    assert not saver.saved
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return log.lines[count:]


def _on_a_full_disk(world: Any, saver: Any, saved: Any, small: Path, log: _Lines) -> dict[str, Any]:
    """Saves, in the loop's thread and in the background, on a file system with room for one checkpoint and a
    half; and one when there is room again."""
    first, second = saver(small), saver(small, asynchronous=True)
    first.save(saved(1))
    manifest = read_manifest(step_folder(small, 1))
    filler = small / "filler"
    if world.is_first:
        space = os.statvfs(small)
        filler.write_bytes(bytes(space.f_bavail * space.f_frsize - manifest.num_bytes // 2))
    world.barrier("filled")
    count = len(log.lines)
    first.save(saved(2))
    second.save(saved(2))
    valid = second.complete()
    lines = log.lines[count:]
    world.barrier("removed")
    intact = not hash_problems(step_folder(small, 1), manifest) and not step_folder(small, 2).exists()
    world.barrier("looked")
    if world.is_first:
        filler.unlink()
    world.barrier("emptied")
    assert not (first.saved or second.saved)
    first.save(saved(3))
    assert first.saved
    world.barrier("saved")
    return {"lines": lines, "intact": intact and not valid, "then": sorted(complete_checkpoints(small))}


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


def _failure_in_the_background(folder: Path) -> bool:
    """Whether an error that is no full disk comes out of the writer's thread."""
    from copd_megatron.checkpoint.files import RankWriter

    folder.mkdir(exist_ok=True)
    writer = RankWriter(folder, copy=True)
    writer._items.append(("no item", "no tensor"))  # type: ignore[arg-type]
    writer.start()
    with pytest.raises(AttributeError):
        writer.result()
    return writer.done


def _without_loop_state(world: Any, lost: Path, run_dir: Path) -> list[int]:
    """The steps of two checkpoints that are found in turn: of the newer one, what a branch remembers is of
    the right size, and no JSON; of the older one, nothing is wrong."""
    from copd_megatron.checkpoint.joint import find_checkpoint

    if world.is_first:
        for step in (1, 3):
            shutil.copytree(step_folder(run_dir, step), step_folder(lost, step))
        loop = step_folder(lost, 3) / "beta" / "loop.json"
        loop.write_bytes(loop.read_bytes().replace(b"null", b"NaN "))
    world.barrier("copied")
    found = [find_checkpoint(world, lost, verify_hashes=False) for _ in range(2)]
    return [manifest.step for manifest in found if manifest is not None]


def _all_damaged(world: Any, lost: Path, run_dir: Path) -> list[str]:
    """What a run is told whose only checkpoint has lost a file, at two starts."""
    from copd_megatron.checkpoint.joint import find_checkpoint

    if world.is_first:
        shutil.copytree(step_folder(run_dir, 3), step_folder(lost, 3))
        (step_folder(lost, 3) / "beta" / "loop.json").unlink()
    world.barrier("lost")
    said = []
    for start in range(2):
        with pytest.raises(CheckpointError) as caught:
            find_checkpoint(world, lost, verify_hashes=True)
        said.append(str(caught.value))
        world.barrier(f"start {start}")
    return said


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    base = tmp_path_factory.mktemp("joint")
    model = make_model(base / "model")
    with small_disk(base / "small", 30_000_000) as small:
        results = run_distributed(_saves, 3, args=(model, base / "run", small), timeout=200, megatron=True)
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
    assert len(found["lines"]) == 2, "in the loop's thread, and in the background"
    for line in found["lines"]:
        assert os.strerror(errno.ENOSPC) in line and "step_000001, stays usable" in line
    assert all(rank["disk full"]["intact"] for rank in outcome[0])
    assert found["then"] == [1, 3], "and the next save works again"


def test_damaged_checkpoints_are_named_and_skipped(outcome: Any) -> None:
    results, run_dir = outcome
    lines = results[0]["log"]
    for step, reason in ((7, "has 1000 bytes"), (4, "SHA-256")):
        assert any(f"step_{step:06d} is damaged" in line and reason in line for line in lines), step
        assert (run_dir / "checkpoints" / f"step_{step:06d}.damaged").is_dir()
    assert any("step_000006 has no manifest.json and is not used; renamed to" in line for line in lines)
    assert (run_dir / "checkpoints/step_000006.no_manifest").is_dir()
    assert list(complete_checkpoints(run_dir)) == [3, 1]


def test_a_score_that_nobody_has_is_null_and_harms_no_checkpoint(outcome: Any) -> None:
    """NaN is no JSON, which the reader insists on."""
    assert all(rank["no score"] is None for rank in outcome[0])
    assert read_manifest(step_folder(outcome[1], 1)).validation_accuracy == 0.9
    assert outcome[0][0]["kept"] == [1, 3, 4], "a mean that is none is not the best one"


def test_a_checkpoint_whose_loop_state_cannot_be_read_is_skipped(outcome: Any) -> None:
    assert all(rank["without its loop state"] == [1, 1] for rank in outcome[0])
    assert any(
        "step_000003 is damaged" in line and "NaN is no number" in line for line in outcome[0][0]["log"]
    )


def test_a_run_without_a_whole_checkpoint_does_not_start_over(outcome: Any) -> None:
    for rank in outcome[0]:
        said, again = rank["nothing whole"]
        assert said == again, "the second start finds it renamed"
        assert f"all checkpoints of {outcome[1].with_name('lost')} are damaged: step_000003.damaged;" in said
        assert "run.overwrite=true" in said


def test_the_save_in_the_background_holds_the_weights_of_its_step(outcome: Any) -> None:
    results, _ = outcome
    for rank, result in enumerate(results):
        assert result["thread failed"]
        assert result["resumed"] == (3, 3, "beta" if rank == 2 else "alpha")
        assert result["weights back"]


def test_a_manifest_lists_every_file(outcome: Any) -> None:
    folder = step_folder(outcome[1], 3)
    listed = {file.path for file in read_manifest(folder).files}
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == listed | {MANIFEST}
    of_each = {".metadata", "metadata.json", "loop.json", "__0_0.distcp"}
    assert listed == {f"{branch}/{file}" for branch in RANKS for file in of_each} | {"alpha/__1_0.distcp"}


def test_the_inspector_says_what_a_checkpoint_holds(outcome: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = step_folder(outcome[1], 3)
    assert run_tool("inspect_checkpoint", folder, "--verify", "--files") == 0
    said = capsys.readouterr().out
    assert f"{folder}: step 3" in said and "whole (sizes and hashes checked)" in said
    assert "alpha: Qwen3ForCausalLM, weights version 3, tp 2, 5 files" in said
    assert "beta: Qwen3ForCausalLM, weights version 3, one rank, 4 files" in said
    parameters = sum(math.prod(spec.shape) for spec in HFFolder(outcome[1].parent / "model").layouts[0].specs)
    of_weights = re.findall(r"weights float32: \d+ tensors, (\S+) kB", said)
    assert [float(size) for size in of_weights] == pytest.approx([parameters * 4 / 1e3] * 2, rel=0.01)
    for file in read_manifest(folder).files:
        assert f"{file.sha256}  {file.path}, " in said

    assert run_tool("inspect_checkpoint", folder / "beta", "--tensors", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["embedding.word_embeddings.weight"]["shape"] == [321, 64]
    assert rows["embedding.word_embeddings.weight"]["dtype"] == "float32"


def test_the_inspector_names_damage(outcome: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = step_folder(tmp_path, 3)
    shutil.copytree(step_folder(outcome[1], 3), folder)
    file = folder / "beta" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run_tool("inspect_checkpoint", folder) == 0, "sizes alone do not tell"
    capsys.readouterr()
    assert run_tool("inspect_checkpoint", folder, "--verify") == 1
    said = capsys.readouterr().out
    assert "DAMAGED" in said and f"{file} is damaged: SHA-256" in said
    (folder / MANIFEST).unlink()
    assert run_tool("inspect_checkpoint", tmp_path) == 1
    assert "the save was not finished" in capsys.readouterr().err


def test_a_drill_kills_everything_in_saves_and_exchanges_and_fits_into_the_run() -> None:
    tool = load_tool("fault_drill")
    config = Config(model=ModelConfig(path="m"), branches={"text": BranchConfig(), "image": BranchConfig()})
    layout, saves = Layout.from_config(config), tool["SAVE_OPERATIONS"]
    plans = [tool["plan_kills"](10, layout, seed, 12, saves) for seed in range(20)]
    assert plans[3] == tool["plan_kills"](10, layout, 3, 12, saves) != plans[4]
    for plan in plans:
        assert len(plan) == 10 and {kill.target for kill in plan} == set(tool["TARGETS"])
        assert sum(kill.operations[:1] in [(name,) for name in saves] for kill in plan) >= 2
        assert sum(kill.operations == tool["EXCHANGE"] for kill in plan) >= 2
        assert all(kill.after <= 1.5 * 12 / 10 for kill in plan if not kill.operations)
