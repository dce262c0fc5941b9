"""How a run on this machine ends: the exit status, and the last thing that a person sees."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from copd_megatron.checkpoint.manifest import BranchEntry, Manifest, step_folder, write_manifest
from copd_megatron.checkpoint.stop import EXIT_PREEMPTED, StopSignals
from copd_megatron.errors import EXIT_HOPELESS, ConfigError
from copd_megatron.launch.preflight import clear_run
from copd_megatron.launch.results import begin_exports, end_exports
from copd_megatron.launch.torchrun import handled_signals

ROOT = Path(__file__).resolve().parents[1]


def _launch(run_dir: Path, how: str) -> subprocess.CompletedProcess[str]:
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.run(
        [
            *(sys.executable, "-m", "copd_megatron.launch.local", str(run_dir)),
            *("--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=copd-loopback", "--rdzv-id=x"),
            *("--signals-to-handle=SIGTERM,SIGINT", "-m", "tests.support.failing_rank", str(run_dir), how),
        ],
        env={**environment, "COPD_MAX_RESTARTS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    ("how", "status", "starts", "cause"),
    [
        ("config", EXIT_HOPELESS, 1, "a rank 1 (global rank 1): ConfigError: run.seed: no good"),
        ("bug", 1, 2, "a rank 1 (global rank 1): KeyError: 'a bug'"),
        (
            "killed",
            1,
            2,
            "global rank 1 was killed by SIGKILL, as by the kernel when memory runs out (see dmesg)",
        ),
    ],
)
def test_the_last_lines_say_why_and_where_to_read_on(
    tmp_path: Path, how: str, status: int, starts: int, cause: str
) -> None:
    """A failure that starting again cannot mend is not started again."""
    done = _launch(tmp_path, how)
    assert done.returncode == status, done.stderr
    assert len(list(tmp_path.glob("started_1_*"))) == starts
    assert done.stderr.strip().splitlines()[-3:] == [
        f"copd: the run ended: {cause}",
        "copd: nothing is saved yet",
        f"copd: more: copd logs {tmp_path} --level ERROR, and the lines above",
    ]
    assert ("Traceback" in done.stderr) == (how == "bug"), "only what is not meant for people has one"


@pytest.fixture
def full_group() -> Iterator[Path]:
    """A control group with room for 64 MiB more than a process that is moved there, which counts as none."""
    parents = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    parent = next((p for p in parents if (p / "cgroup.procs").exists()), None)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("this process may not make a control group")
    group = parent / f"copd-test-{os.getpid()}"
    group.mkdir()
    limit = group / ("memory.limit_in_bytes" if parent.name == "memory" else "memory.max")
    try:
        if not limit.exists():
            pytest.skip("control groups do not limit memory here")
        limit.write_text(str(64 << 20))
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_memory_is_named(
    tmp_path: Path, full_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULL_GROUP", str(full_group))
    done = _launch(tmp_path, "memory")
    assert done.returncode == 1, done.stderr
    cause, _, _ = done.stderr.strip().splitlines()[-3:]
    assert cause.startswith(
        "copd: the run ended: global rank 1 was killed by SIGKILL, by the kernel for want of memory: give"
    )
    assert "Traceback" not in done.stderr


def test_a_run_that_was_told_to_stop_and_could_not_save_does_not_say_that_it_has(tmp_path: Path) -> None:
    done = _launch(tmp_path, "unsaved")
    assert done.returncode == EXIT_HOPELESS != EXIT_PREEMPTED, done.stderr
    cause, next_start = done.stderr.strip().splitlines()[-2:]
    assert (
        cause.startswith("copd: the run ended: a rank ") and "RunStorageError: stopping after step 3" in cause
    )
    assert next_start == "copd: nothing is saved yet"


def test_what_a_person_has_to_mend_is_not_continued_before(tmp_path: Path) -> None:
    entry = BranchEntry(weight_version=1, layout={}, frozen=True, model_path="m", dims={}, files=())
    folder = step_folder(tmp_path, 6)
    folder.mkdir(parents=True)
    write_manifest(folder, Manifest(step=6, branches={"a": entry}, config="", saved_at=""))
    assert _launch(tmp_path, "config").stderr.strip().splitlines()[-2] == (
        "copd: when that is mended, the same command continues from step 6"
    )


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    done = _launch(tmp_path, "interrupt")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "copd: ended by SIGINT; nothing is saved yet"


def test_ctrl_c_before_torchrun_is_there_is_one_line_too(tmp_path: Path) -> None:
    """The seconds in which torch is imported."""
    with subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED_IMPORT, str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "copd: ended by SIGINT; nothing is saved yet\n")


_INTERRUPTED_IMPORT = """
import os, signal, sys
from copd_megatron.launch import local
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Importing())
sys.exit(local.main([sys.argv[1]]))
"""


def test_signals_that_are_ignored_stay_ignored() -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert "SIGHUP" in handled_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert "SIGHUP" not in handled_signals()
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_overwriting_deletes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in OF_A_RUN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}\n")
    for name in ("export/text", "export/merged"):
        begin_exports(run, [Path(name).name], step=4)
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").touch()
    end_exports(run, ["text"])
    (run / "export/merged.partial").mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"starts from .*export/text, which is in the run directory"):
        clear_run(run, [str(run / "export/text")])
    clear_run(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    clear_run(run)  # there is nothing to delete
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


OF_A_RUN = (
    *("metrics.jsonl", "config.yaml", "wandb_run_id", "stuck_rank_00001.txt", "distances.json"),
    *("evaluation.json", "evaluation.txt", "evaluation.md", "report.html", "report.png"),
    *("checkpoints/step_000001/manifest.json", "checkpoints/step_000002/.unfinished"),
    *("checkpoints/step_000003.damaged/text/loop.json", "mean_as_it_is/text/model.safetensors"),
    *("samples/text/train-000001.jsonl.gz", "samples/text/.train-000002.jsonl.gz.0123456789ab.partial"),
    *("tensorboard/events.out.tfevents.17.host.1.0", "timeline/rank_00000.jsonl", "timeline/trace.json"),
    "profile/text_rank_00000_steps_2-2.trace.json.gz",
)
"""Files that a run leaves."""
OF_SOMEBODY = (
    *("checkpoints/notes/a.txt", "checkpoints/my_model.pt", "checkpoints/step_001000/thesis.txt"),
    *("samples/mine.txt", "samples/recording.wav", "tensorboard/other", "timeline/mine.txt"),
    *("profile/mine.txt", "export/my_own_model/w.txt", "export/text.partial/p.txt"),
)


@pytest.mark.parametrize("begun", [True, False], ids=["a run", "no run"])
def test_overwriting_leaves_what_no_run_has_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, begun: bool
) -> None:
    for name in [*OF_SOMEBODY, *(OF_A_RUN if begun else [])]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    clear_run(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(OF_SOMEBODY)
    assert ("no run has made export/my_own_model" in caplog.text) == begun


def test_logs_of_ranks_that_the_new_run_has_not_go(tmp_path: Path) -> None:
    """The others have opened theirs anew by then."""
    for name in ("metrics.jsonl", "logs/rank_00001.log", "logs/rank_00002.log", "logs/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clear_run(tmp_path, num_ranks=2)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["mine.txt", "rank_00001.log"]


def test_checkpoints_behind_a_link_are_left_alone_and_not_continued(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    (kept / "step_000001").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(kept)
    with pytest.raises(ConfigError, match=r"run\.overwrite: .*checkpoints is a link to .*elsewhere"):
        clear_run(run)
    assert (kept / "step_000001").is_dir()


def test_what_cannot_be_deleted_is_named(tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)  # a folder is no file to unlink, for root either
    with pytest.raises(ConfigError, match=r"run\.overwrite: .*metrics\.jsonl cannot be deleted"):
        clear_run(tmp_path / "run")
