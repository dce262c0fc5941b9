"""Manifests: what makes a checkpoint valid, what damage is seen, what is kept; signals and limits; which
configurations may continue a checkpoint; how runs are compared. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.checkpoint.compare import compare_runs, metric_differences
from copd_megatron.checkpoint.compatible import check_compatible
from copd_megatron.checkpoint.manifest import (
    MANIFEST,
    UNFINISHED,
    BranchEntry,
    CheckpointError,
    FileEntry,
    Manifest,
    complete_checkpoints,
    hash_problems,
    make_folders,
    read_manifest,
    remove_checkpoint,
    remove_unfinished,
    set_aside,
    share,
    size_problems,
    step_folder,
    step_folders,
    to_delete,
    write_durably,
    write_manifest,
)
from copd_megatron.checkpoint.stop import StopSignals, deadline, must_save_now
from copd_megatron.config import BranchConfig, Config, ConfigError, ModelConfig, to_yaml
from copd_megatron.launch.lock import RunLock


def _checkpoint(run_dir: Path, step: int, *, accuracy: float | None = None) -> Path:
    """A checkpoint of two branches with a few bytes each."""
    folder = step_folder(run_dir, step)
    entries = {}
    for name in ("text", "image"):
        (folder / name).mkdir(parents=True)
        files = tuple(
            write_durably(folder / name / file, f"{name} {file} {step} ".encode() * 50)
            for file in ("__0_0.distcp", "loop.json")
        )
        entries[name] = BranchEntry(
            weight_version=step, layout={"tp": 2}, frozen=False, model_path="m", dims={}, files=files
        )
    write_manifest(
        folder,
        Manifest(
            step=step, branches=entries, config="run: {}", saved_at="2030", validation_accuracy=accuracy
        ),
    )
    return folder


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = read_manifest(_checkpoint(tmp_path, 4, accuracy=0.25))
    assert (manifest.step, manifest.validation_accuracy) == (4, 0.25)
    first = manifest.branches["text"].files[0]
    data = (step_folder(tmp_path, 4) / first.path).read_bytes()
    assert first == FileEntry(
        path="text/__0_0.distcp", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    assert list(complete_checkpoints(tmp_path)) == [4]


@settings(deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_manifest_is_seen(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    folder = _checkpoint(tmp_path_factory.mktemp("flip"), 1)
    path = folder / MANIFEST
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read_manifest(folder)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    # a flip between JSON's tokens (or of a letter's case in a hexadecimal digest's own field) changes nothing
    path.unlink()
    write_manifest(folder, found)
    rewritten = json.loads(path.read_bytes())["manifest"]
    assert rewritten == json.loads(bytes(data))["manifest"]


def test_damage_is_named(tmp_path: Path) -> None:
    flipped = _checkpoint(tmp_path, 1)
    file = flipped / "image" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    manifest = read_manifest(flipped)
    assert size_problems(flipped, manifest) == []
    (problem,) = hash_problems(flipped, manifest)
    assert str(file) in problem and "SHA-256" in problem

    truncated = _checkpoint(tmp_path, 2)
    os.truncate(truncated / "text" / "loop.json", 7)
    (problem,) = size_problems(truncated, read_manifest(truncated))
    assert "loop.json has 7 bytes" in problem

    missing = _checkpoint(tmp_path, 3)
    (missing / "text" / "__0_0.distcp").unlink()
    (problem,) = size_problems(missing, read_manifest(missing))
    assert "missing" in problem

    torn = _checkpoint(tmp_path, 4)
    (torn / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        read_manifest(torn)
    assert list(complete_checkpoints(tmp_path)) == [1], "only hashes tell that the first is damaged"


def test_an_accuracy_that_is_none_leaves_a_manifest_that_can_be_read(tmp_path: Path) -> None:
    """No response of a domain was graded in time, for example."""
    folder = _checkpoint(tmp_path, 1)
    unknown = dataclasses.replace(read_manifest(folder), validation_accuracy=float("nan"))
    write_manifest(folder, unknown)
    assert read_manifest(folder).validation_accuracy is None
    assert list(complete_checkpoints(tmp_path)) == [1]


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 1) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        read_manifest(path.parent)


@given(
    sizes=st.lists(st.integers(0, 1000), max_size=30),
    num_parts=st.integers(1, 7),
)
def test_ranks_share_the_files(sizes: list[int], num_parts: int) -> None:
    files = [FileEntry(path=str(i), num_bytes=size, sha256="") for i, size in enumerate(sizes)]
    parts = [share(files, part, num_parts) for part in range(num_parts)]
    assert sorted(f.path for part in parts for f in part) == sorted(f.path for f in files)
    loads = [sum(f.num_bytes for f in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0) + len(sizes)


@given(
    scores=st.dictionaries(st.integers(1, 50), st.none() | st.floats(0, 1), max_size=12),
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
)
def test_the_newest_and_the_best_are_kept(
    scores: dict[int, float | None], keep_last: int, keep_best: int
) -> None:
    gone = to_delete(scores, keep_last=keep_last, keep_best=keep_best)
    kept = set(scores) - set(gone)
    assert set(sorted(scores)[-keep_last:]) <= kept
    rated = sorted(s for s in scores.values() if s is not None)
    if keep_best and rated:
        worst_of_the_best = rated[-keep_best:][0]
        assert all(scores[step] is None or scores[step] <= worst_of_the_best for step in gone)  # type: ignore[operator]
    assert len(kept) <= keep_last + keep_best


def test_unfinished_saves_are_removed_and_damaged_ones_put_aside(tmp_path: Path) -> None:
    whole, damaged = _checkpoint(tmp_path, 1), _checkpoint(tmp_path, 2)
    step_folder(tmp_path, 3).mkdir()
    (step_folder(tmp_path, 3) / UNFINISHED).touch()
    remove_unfinished(tmp_path)
    assert list(step_folders(tmp_path)) == [2, 1]
    assert not list(step_folder(tmp_path, 3).parent.glob("step_000003*"))
    assert set_aside(damaged).name == "step_000002.damaged"
    again = _checkpoint(tmp_path, 2)
    assert set_aside(again).name == "step_000002.damaged1"
    assert list(step_folders(tmp_path).values()) == [whole]


def test_what_no_save_has_made_is_kept_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of somebody else's, and a checkpoint that lost its manifest and nothing else."""
    foreign = step_folder(tmp_path, 1000)
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    torn = _checkpoint(tmp_path, 2)
    files = sorted(path.name for path in torn.rglob("*") if path.is_file() and path.name != MANIFEST)
    (torn / MANIFEST).unlink()
    remove_unfinished(tmp_path)
    assert not step_folders(tmp_path)
    kept = foreign.with_name("step_001000.no_manifest")
    assert (kept / "thesis.txt").read_text() == "years of work"
    lost = torn.with_name("step_000002.no_manifest")
    assert sorted(path.name for path in lost.rglob("*") if path.is_file()) == files
    assert str(kept) in caplog.text and str(lost) in caplog.text


def test_a_checkpoint_that_is_being_deleted_is_no_ones_work(tmp_path: Path) -> None:
    """A crash between the deletion of the manifest and that of the rest."""
    folder = _checkpoint(tmp_path, 3)
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink()
    remove_unfinished(tmp_path)
    assert not list(folder.parent.glob("step_000003*"))


def test_what_stands_where_a_save_goes_is_kept_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = step_folder(tmp_path, 4)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    make_folders(folder, ["alpha", "beta"])
    assert sorted(path.name for path in folder.iterdir()) == [UNFINISHED, "alpha", "beta"]
    kept = folder.with_name("step_000004.old")
    assert (kept / "thesis.txt").read_text() == "years of work" and str(kept) in caplog.text


def test_of_a_checkpoint_that_is_a_link_only_the_link_goes(tmp_path: Path) -> None:
    """Somebody moved it to a larger disk."""
    folder = _checkpoint(tmp_path, 5)
    moved = folder.rename(tmp_path / "larger")
    folder.symlink_to(moved)
    assert list(complete_checkpoints(tmp_path)) == [5]
    remove_checkpoint(folder)
    assert not folder.is_symlink() and read_manifest(moved).step == 5


def test_a_run_directory_belongs_to_one_job(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as held:
        with (
            pytest.raises(ConfigError, match=rf"run\.dir: .* in use by process {os.getpid()} on "),
            RunLock(tmp_path / "run", wait_seconds=0.3),
        ):
            pass
        assert held.path.read_text().startswith("process ")
    with RunLock(tmp_path / "run", wait_seconds=0):
        pass


def test_a_killed_job_gives_its_run_directory_back(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from copd_megatron.launch.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError), RunLock(tmp_path, wait_seconds=0):
        pass
    holder.kill()
    with RunLock(tmp_path):
        pass
    holder.wait()


def test_signals_are_noted() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR1", "the first"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_limit_is_the_given_one_or_slurms() -> None:
    assert deadline(None, {}) is None
    assert deadline(60.0, {"SLURM_JOB_END_TIME": "5"}, started=100.0) == 160.0
    assert deadline(None, {"SLURM_JOB_END_TIME": "1700000000"}) == 1_700_000_000.0
    assert not must_save_now(None, now=9e9, longest_step_seconds=1, reserve_seconds=1)
    assert not must_save_now(100, now=60, longest_step_seconds=29, reserve_seconds=10)
    assert must_save_now(100, now=60, longest_step_seconds=30, reserve_seconds=10)


def _config() -> Config:
    return Config(model=ModelConfig(path="m"), branches={"text": BranchConfig(), "image": BranchConfig()})


def test_what_may_change_between_saving_and_resuming() -> None:
    saved = to_yaml(_config())
    free = _config()
    free.branches["text"].parallel.pipeline_model_parallel_size = 2
    free.run.dir, free.checkpoint.save_period, free.branches["image"].data.train = "elsewhere", 7, ["x.tar"]
    assert check_compatible(saved, free, where="step_000004") == []

    told = _config()
    told.optimizer.lr, told.branches["image"].num_prompts_per_step = 1e-3, 8
    assert check_compatible(saved, told, where="step_000004") == [
        "branches.image.num_prompts_per_step: 256 -> 8",
        "optimizer.lr: 1e-06 -> 0.001",
    ]

    seed = _config()
    seed.run.seed = 2
    with pytest.raises(ConfigError, match=r"run\.seed: 2, but step_000004 was saved with 1.*overwrite"):
        check_compatible(saved, seed, where="step_000004")
    branches = dataclasses.replace(_config(), branches={"image": BranchConfig(), "text": BranchConfig()})
    with pytest.raises(ConfigError, match="saved with the branches text, image"):
        check_compatible(saved, branches, where="step_000004")


def test_runs_are_compared_without_their_timings(tmp_path: Path) -> None:
    lines = [{"step": s, "phase": "opd", "text/train/loss": 0.1 * s, "text/timing/x": s} for s in (1, 2)]
    runs = [tmp_path / name for name in ("expected", "same", "other")]
    for number, run in enumerate(runs):
        (run / "export" / "text").mkdir(parents=True)
        (run / "export" / "text" / "model.safetensors").write_bytes(b"weights" if number < 2 else b"Weights")
        changed = [{**line, "text/timing/x": number} for line in lines]
        if number == 2:
            changed[1]["text/train/loss"] = 0.2 + 1e-9
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert compare_runs(runs[0], runs[1]) == []
    assert len(compare_runs(runs[0], runs[2])) == 2, "a metric and a file"
    assert metric_differences(runs[0], runs[2], relative=1e-6) == []
    (runs[1] / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "steps [1] instead of [1, 2]" in compare_runs(runs[0], runs[1])[0]


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 5000])
def test_a_manifest_with_a_name_that_no_file_has_is_named(name: str, tmp_path: Path) -> None:
    entry = FileEntry(path=name, num_bytes=1, sha256="0" * 64)
    branch = BranchEntry(
        weight_version=1, layout={}, frozen=False, model_path="", dims={}, files=(entry,)
    )  # fmt: skip
    manifest = Manifest(step=1, branches={"a": branch}, config="", saved_at="", validation_accuracy=None)
    for problems in (size_problems, hash_problems):
        (problem,) = problems(tmp_path, manifest)
        assert str(tmp_path) in problem and len(problem) < 6000
        problem.encode()
