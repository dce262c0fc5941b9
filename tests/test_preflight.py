"""Room on disk and in shared memory, before a run starts; on a real file system of 2 MiB where root may."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from copd_megatron.checkpoint.manifest import (
    LOOP_STATE,
    BranchEntry,
    Manifest,
    complete_checkpoints,
    step_folder,
    write_durably,
    write_manifest,
)
from copd_megatron.cli.main import main
from copd_megatron.config import ConfigError, Device, load_config, read_model_shapes, to_yaml, validate
from copd_megatron.config.models import check_processors
from copd_megatron.config.schema import PrometheusConfig
from copd_megatron.data import check_shards
from copd_megatron.errors import DataError
from copd_megatron.launch import preflight, slurm
from copd_megatron.launch.device import check_device, check_memory
from copd_megatron.launch.lock import RunLock
from copd_megatron.launch.results import begin_exports, end_exports, read_exports, set_aside_others
from copd_megatron.launch.shared_memory import left_behind, segments
from copd_megatron.metrics.places import check_port
from copd_megatron.model.known import KNOWN
from copd_megatron.planner.disk import run_bytes
from copd_megatron.untrusted.json_text import dumped
from tests.support.checkpoint_runs import BRANCHES, write_config
from tests.support.domains import make_domains
from tests.support.models import make_model


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight")
    make_model(root / "base", seed=1)
    make_domains(root / "data", num_train=8, num_validation=4)
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


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("model.path", "export/alpha"),
        ("branches.beta.model_path", "export/alpha/inner"),
        ("branches.beta.model_path", "export/merged"),
        ("model.path", "export/beta.partial"),
        ("model.path", "checkpoints/step_000002"),
        ("model.path", "mean_as_it_is/alpha"),
    ],
)
@pytest.mark.parametrize("linked", [False, True], ids=["", "by a link"])
def test_a_run_does_not_replace_the_model_that_it_starts_from(
    config_path: Path, tmp_path: Path, key: str, place: str, linked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = shutil.copytree(config_path.parent / "base", run / place)
    if linked:
        (tmp_path / "link").symlink_to(model)
        model = tmp_path / "link"
    before = _tree(run)
    written = run / place.removesuffix("/inner").removesuffix("/step_000002")
    written = written.parent if written.parent.name == "mean_as_it_is" else written
    for said in _refusals(config_path, [f"run.dir={run}", f"{key}={model}"], capsys):
        assert f"{key}: {model} is in {written}, which this run writes" in said
        assert _tree(run) == before


def _refusals(config_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """What is said before a run, before one that overwrites, and in a dry run."""
    for more in ([], ["run.overwrite=true"]):
        config = load_config(config_path, [*words, *more])
        with pytest.raises(ConfigError) as caught:
            preflight.check_run_dir(config, Path(config.run.dir or ""))
        yield str(caught.value)
    assert main(["train", str(config_path), *words, "--dry-run"]) == 2
    yield capsys.readouterr().err


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        *("export/alpha/thesis.txt", "export/merged/thesis.txt", "export/beta.partial/p.txt"),
        *("export/merged.partial/p.txt", "evaluation.md", "evaluation.txt", "report.html", "report.png"),
        *("config.yaml", "exports.json", "mean_as_it_is/a.txt"),
    ],
)
def test_what_no_run_has_made_is_not_replaced(
    config_path: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found before the ranks start, not when they have trained."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    for said in _refusals(config_path, [f"run.dir={tmp_path}"], capsys):
        top = name if "/" not in name else name.rpartition("/")[0]
        assert f"{tmp_path} holds {top}, which no run has made and this one would replace" in said
        assert _tree(tmp_path) == {str(path): b"precious"}


def test_what_a_run_does_not_write_may_lie_in_its_directory(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path, ["end.merge=false", "end.export=false"])
    for name in ("notes.txt", "samples/mine.wav", "checkpoints/mine.pt", "export/alpha/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "export/beta").mkdir()
    before = _tree(tmp_path)
    preflight.check_run_dir(config, tmp_path)
    preflight.free_run_dir(config, tmp_path)
    assert _tree(tmp_path) == before


def test_in_the_way_of_an_export_only_what_the_run_made_is_replaced(
    config_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a directory in which a run has begun. Own: a finished export, and one that a kill cut short."""
    config = load_config(config_path)
    (tmp_path / "metrics.jsonl").touch()
    begin_exports(tmp_path, ["alpha", "beta"], step=6)
    for name in ("alpha/model.safetensors", "beta.partial/model.safetensors", "beta/model.safetensors"):
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / name).touch()
    end_exports(tmp_path, ["alpha"])
    preflight.free_run_dir(config, tmp_path)
    assert not list(tmp_path.glob("export/*.kept*")) and not caplog.records
    for name in ("alpha/thesis.txt", "merged/model.safetensors", "merged.partial/p.txt"):
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / name).touch()
    preflight.free_run_dir(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        *("alpha.kept", "beta", "beta.partial", "merged.kept", "merged.partial.kept"),
    ]
    assert (tmp_path / "export/alpha.kept/thesis.txt").exists()
    assert f"renamed to {tmp_path / 'export/merged.kept'}" in caplog.text


def test_a_list_of_exports_that_is_damaged_makes_them_nobodys(tmp_path: Path) -> None:
    (tmp_path / "export/text").mkdir(parents=True)
    (tmp_path / "export/text/w.txt").touch()
    (tmp_path / "exports.json").write_text('{"exports": {"text": {"step": "x"}}}')
    assert read_exports(tmp_path) == {}
    set_aside_others(tmp_path, ["text"])
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["text.kept"]


@pytest.fixture
def finished(config_path: Path, make_disk: Callable[[int], Path]) -> Path:
    """What a run leaves, and of its exports one that is not known to be its own; on a disk of its own."""
    run = make_disk(2 << 20) / "run"
    config = load_config(config_path, [f"run.dir={run}"])
    for name in ("metrics.jsonl", "starts.jsonl", "export/alpha/w", "logs/rank_00000.log"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}\n")
    folder, branches = step_folder(run, 2), {}
    for name in BRANCHES:
        (folder / name).mkdir(parents=True)
        shards = check_shards(config.branches[name].data.train)
        position = {"fingerprint": shards.fingerprint, "position": 2}
        file = write_durably(folder / name / LOOP_STATE, dumped({"streams": {"native": position}}).encode())
        branches[name] = BranchEntry(
            weight_version=2, layout={}, frozen=False, model_path="", dims={},
            files=(replace(file, path=f"{name}/{LOOP_STATE}"),),
        )  # fmt: skip
    write_manifest(folder, Manifest(step=2, branches=branches, config=to_yaml(config), saved_at="2026"))
    assert list(complete_checkpoints(run)) == [2]
    # sparse: as large as the run may get
    os.truncate(run / "logs/rank_00000.log", run_bytes(config, read_model_shapes(config)))
    return run


def test_a_start_that_is_refused_leaves_the_old_run_as_it_is(config_path: Path, finished: Path) -> None:
    """Whatever refuses it, everything is asked before the first file is deleted or renamed."""
    before = _tree(finished)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = f"logging.prometheus.port={server.getsockname()[1]}"
        for words, message in (
            ([port], "cannot listen on"),
            (["checkpoint.keep_last=9999"], "needs up to .* more"),
            (
                ["branch_defaults.rollout.cpu_kv_cache_gib=500000"],
                "500000 GiB for each rank, 1e\\+06 for all",
            ),
        ):
            for overwrite in ("true", "false"):
                config = load_config(
                    config_path, [f"run.dir={finished}", f"run.overwrite={overwrite}", *words]
                )
                with pytest.raises(ConfigError, match=message):
                    preflight.check_start(config)
                assert _tree(finished) == before, words
    config = load_config(config_path, [f"run.dir={finished}", "run.overwrite=true"])
    preflight.check_start(config)
    left = {str(Path(name).relative_to(finished)) for name in _tree(finished)}
    assert left == {"export/alpha.kept/w", "logs/rank_00000.log", "run.lock"}


def test_a_dry_run_and_the_check_of_a_slurm_job_ask_what_the_start_asks_of_the_run_directory(
    config_path: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _tree(finished)
    (tmp_path / "file").touch()
    shutil.copytree(config_path.parent / "base", tmp_path / "small/model")
    (tmp_path / "small/metrics.jsonl").touch()
    job = ["--hosts", "n1", "--ranks-per-node", "2"]

    def refused(message: str, *words: str) -> None:
        with pytest.raises((ConfigError, DataError), match=message):
            preflight.check_start(load_config(config_path, list(words)))
        assert main(["train", str(config_path), *words, "--dry-run"]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert slurm.main([str(config_path), *words, *job]) == 2
        assert re.search(message, capsys.readouterr().err)

    small, run = f"run.dir={tmp_path / 'small'}", f"run.dir={finished}"
    refused(r"run\.seed: 99, but .*step_000002 was saved with", run, "run.seed=99")
    short = ("schedule.cycles=1", "schedule.rlvr_steps=1", "schedule.opd_steps=0")
    short += ("evaluation.every_steps=0", "optimizer.lr_warmup_steps=0")
    refused(r"schedule: ends after step 1, but .*step_000002 is already further", run, *short)
    others = config_path.parent / "data/beta-train-*.tar"
    shards = f"branches.alpha.data.train=[{others}]"
    refused(r"branches\.alpha\.data\.train: the shards are not those that .*step_000002", run, shards)
    pool = f"branches.alpha.data={{train: [], validation: [], pools: {{p: {{train: ['{others}']}}}}}}"
    refused(r"branches\.alpha\.data\.pools: the pools are not those", run, pool)
    refused("run.dir: /proc/x cannot be made: /proc cannot be written to", "run.dir=/proc/x")
    refused(f"{tmp_path}/file/x cannot be made", f"run.dir={tmp_path}/file/x")
    refused(
        "which is in the run directory", small, f"model.path={tmp_path}/small/model", "run.overwrite=true"
    )
    refused("needs up to .* more", run, "checkpoint.keep_last=9999")
    for words in ([], [shards, "run.overwrite=true"]):
        preflight.check_run(load_config(config_path, [run, *words]))
    assert _tree(finished) == before


def test_a_run_directory_in_use_is_known_without_taking_its_lock(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(config_path), f"run.dir={tmp_path}", "--dry-run"]
    with RunLock(tmp_path):
        held = (tmp_path / "run.lock").read_bytes()
        assert main(["train", *words]) == 2
        assert f"{tmp_path} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert main(["train", *words]) == 0
    assert (tmp_path / "run.lock").read_bytes() == held
    (tmp_path / "run.lock").unlink()
    (tmp_path / "run.lock").mkdir()
    assert main(["train", *words]) == 2
    assert "run.lock cannot be opened" in capsys.readouterr().err


def test_a_dry_run_warns_of_what_another_machine_may_have(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["logging.prometheus.port=1", "logging.prometheus.host=192.0.2.1", f"run.dir={tmp_path}"]
    words.append("branch_defaults.rollout.cpu_kv_cache_gib=500000")
    assert main(["train", str(config_path), *words, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: on this machine the run would not start: ") == 2
    assert "cannot listen on 192.0.2.1:1" in said and "500000 GiB for each rank" in said


def test_caches_of_ranks_elsewhere_are_not_counted(config_path: Path, tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    config = load_config(config_path, [f"branch_defaults.rollout.cpu_kv_cache_gib={0.75 * memory}"])
    check_memory(config, alone=False)
    with pytest.raises(ConfigError, match=r"cpu_kv_cache_gib: .* for all, but this machine has"):
        check_memory(config, alone=True)
    (tmp_path / "gpu").touch()
    auto = replace(config, run=replace(config.run, device=Device.auto))
    check_memory(auto, alone=True, devices=[tmp_path / "gpu"])


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=rlvr"], "recipe=rlvr has no stage that distils"),
        (["branch_defaults.rollout.stop=['']"], r"rollout\.stop\[0\]: '' must be a text that is not empty"),
        (
            ["branch_defaults.rollout.temperature=2.5"],
            r"rollout\.temperature: 2\.5 must be between 0\.01 and 2",
        ),
        (["branch_defaults.rollout.temperature=0.001"], r"rollout\.temperature: 0\.001 must be between"),
        (["evaluation.temperature=3"], r"evaluation\.temperature: 3\.0 must be between 0\.01 and 2, or 0"),
        (["branch_defaults.rollout.quantization=fp8"], r"rollout\.quantization: fp8 needs a GPU"),
        (
            ["branch_defaults.rollout.cpu_kv_cache_gib=0.00001"],
            r"cpu_kv_cache_gib: 1e-05 GiB hold no sequence",
        ),
        (["precision.fp8=tensorwise"], r"precision\.fp8: tensorwise: no GPU"),
        (
            ["run.device=auto", "precision.fp8=tensorwise", "model.dtype=float32"],
            r"set model\.dtype=bfloat16",
        ),
        (
            ["optimizer.cpu_offload_fraction=0.5"],
            r"optimizer\.cpu_offload_fraction: 0\.5, but there is no GPU",
        ),
        (["optimizer.precision_aware=true"], r"optimizer\.precision_aware"),
        (["logging.prometheus.textfile=/nowhere/x.prom"], "/nowhere is not a folder that you can write to"),
        (
            ["branch_defaults.data.max_prompt_tokens=3"],
            "data.max_prompt_tokens: 3 is less than every training",
        ),
        (
            ["run.collective_timeout_seconds=1e300"],
            r"collective_timeout_seconds: 1e\+300 must be above 0 and at",
        ),
        (
            ["branch_defaults.reward.timeout_seconds=1e300"],
            r"reward\.timeout_seconds: 1e\+300 must be above 0",
        ),
        (
            ["checkpoint.save_before_seconds=1e300"],
            r"checkpoint\.save_before_seconds: 1e\+300 must be between",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_ranks_would(
    config_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_path), *overrides, "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_cache_that_holds_one_sequence_is_enough(config_path: Path) -> None:
    """As vLLM counts: the blocks of the longest sequence, and one that stays empty."""
    config = load_config(config_path)
    shapes = read_model_shapes(config)
    block = (
        2 * 32 * shapes["alpha"].num_query_groups * shapes["alpha"].head_dim * 4 * shapes["alpha"].num_layers
    )
    for spare, refused in ((0, False), (-1024, True)):
        gib = ((192 // 32 + 1) * block + spare) / 2**30
        given = load_config(config_path, [f"branch_defaults.rollout.cpu_kv_cache_gib={gib!r}"])
        with pytest.raises(ConfigError, match="cpu_kv_cache_gib") if refused else contextlib.nullcontext():
            validate(given, None, shapes)


def test_a_machine_without_gpus_is_known_before_the_ranks_start(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "gpu").touch()
    auto = load_config(config_path, ["run.device=auto", "optimizer.cpu_offload_fraction=0.5"])
    check_device(auto, [tmp_path / "gpu"])
    with pytest.raises(ConfigError, match="no GPU whose memory it would spare"):
        check_device(auto, [tmp_path / "none"])
    with pytest.raises(ConfigError, match=r"run\.device: cuda, but this machine shows no GPU"):
        check_device(load_config(config_path, ["run.device=cuda"]), [tmp_path / "none"])


def test_a_port_that_is_taken_is_refused_before_the_ranks_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            check_port(PrometheusConfig(port=port))
    check_port(PrometheusConfig(port=port))


def test_pixel_bounds_are_compared_with_the_processors_own(config_path: Path, tmp_path: Path) -> None:
    shape = replace(read_model_shapes(load_config(config_path))["alpha"], vision=KNOWN["qwen3-vl-4b"].vision)
    size = {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))
    model = f"model.path={tmp_path}"
    check_processors(load_config(config_path, [model, "media.image_max_pixels=2048"]), {"alpha": shape})
    with pytest.raises(ConfigError, match="at least 8192 pixels and at most 4096"):
        check_processors(load_config(config_path, [model, "media.image_min_pixels=8192"]), {"alpha": shape})


def test_ranks_of_a_machine() -> None:
    assert preflight.local_ranks(16, {"LOCAL_WORLD_SIZE": "4", "RANK": "0"}) == 4
    assert preflight.local_ranks(20, {"SLURM_STEP_NUM_NODES": "3", "RANK": "0"}) == 7
    assert preflight.local_ranks(4, {"SLURM_STEP_NUM_NODES": "3"}) == 4
