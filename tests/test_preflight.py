"""Room on disk and in shared memory, before a run starts; on a real file system of 2 MiB where root may."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from copd_megatron.config import ConfigError, load_config, read_model_shapes, to_yaml
from copd_megatron.launch import preflight
from copd_megatron.launch.shared_memory import left_behind, segments
from copd_megatron.planner.disk import run_bytes
from tests.support.checkpoint_runs import BRANCHES, write_config
from tests.support.models import make_model


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight")
    make_model(root / "base", seed=1)
    return write_config(root, {name: {} for name in BRANCHES}, checkpoint={"save_period": 2, "keep_last": 3})


@pytest.fixture
def disk(make_disk: Callable[[int], Path]) -> Path:
    return make_disk(2 << 20)


def test_the_bound_is_what_the_header_says(config_path: Path) -> None:
    config = load_config(config_path)
    shapes = read_model_shapes(config)
    parameters = shapes["alpha"].num_parameters
    assert run_bytes(config, shapes) == (3 + 1) * 2 * parameters * 16 + 3 * parameters * 4
    config = load_config(config_path, ["checkpoint.save_period=0", "end.merge=false", "end.export=false"])
    assert run_bytes(config, shapes) == 2 * parameters * 16


@pytest.mark.parametrize(("earlier", "steps", "refused"), [(0, 1, True), (5, 10, False), (5, 11, True)])
def test_metrics_of_a_run_without_checkpoints_are_kept(
    config_path: Path, tmp_path: Path, earlier: int, steps: int, refused: bool
) -> None:
    """Whether it has lost nothing is for its own save period to say, not for that of the next command."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n" * steps)
    (run / "config.yaml").write_text(to_yaml(load_config(config_path, [f"checkpoint.save_period={earlier}"])))
    config = load_config(config_path, ["checkpoint.save_period=100"])
    if not refused:
        return preflight.check_run_dir(config, run)
    with pytest.raises(ConfigError, match=f"already holds a run of {steps} steps"):
        preflight.check_run_dir(config, run)
    assert (run / "metrics.jsonl").read_text() == "{}\n" * steps


def test_a_disk_that_is_too_small_is_refused(config_path: Path, disk: Path, tmp_path: Path) -> None:
    config = load_config(config_path)
    shapes = read_model_shapes(config)
    preflight.check_disk(config, shapes, tmp_path / "not/there/yet")
    with pytest.raises(ConfigError, match=rf"needs up to .*{disk} has 2\.0 MiB free; free some"):
        preflight.check_disk(config, shapes, disk / "runs/a")


def test_what_a_run_has_written_already_counts(config_path: Path, disk: Path) -> None:
    config = load_config(config_path)
    shapes = read_model_shapes(config)
    (disk / "checkpoint").write_bytes(b"")
    os.truncate(disk / "checkpoint", run_bytes(config, shapes))  # sparse
    preflight.check_disk(config, shapes, disk)


def test_little_shared_memory_is_refused_with_the_remedy(disk: Path, tmp_path: Path) -> None:
    preflight.check_shared_memory(1, tmp_path)
    with pytest.raises(ConfigError, match=r"2 MiB free, 3 ranks on this machine need about 192; .*--shm"):
        preflight.check_shared_memory(3, disk)
    with pytest.raises(ConfigError, match="mount a tmpfs"):
        preflight.check_shared_memory(1, tmp_path / "gone")


def test_segments_that_nobody_uses_are_named(disk: Path) -> None:
    assert left_behind(disk) == ""
    for name in ("psm_old", "copd-old", "open", "mapped"):
        (disk / name).write_bytes(bytes(1 << 18))
    os.truncate(disk / "copd-old", 1 << 12)
    with (disk / "open").open("rb"), (disk / "mapped").open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        file.close()
        assert {s.path.name: s.in_use for s in segments(disk)} == {
            "psm_old": False,
            "copd-old": False,
            "open": True,
            "mapped": True,
        }
        with pytest.raises(ConfigError, match=rf"rm {disk}/psm_old {disk}/copd-old; or give"):
            preflight.check_shared_memory(3, disk)
        held.close()


def test_ranks_of_a_machine() -> None:
    assert preflight.local_ranks(16, {"LOCAL_WORLD_SIZE": "4", "RANK": "0"}) == 4
    assert preflight.local_ranks(20, {"SLURM_STEP_NUM_NODES": "3", "RANK": "0"}) == 7
    assert preflight.local_ranks(4, {"SLURM_STEP_NUM_NODES": "3"}) == 4
