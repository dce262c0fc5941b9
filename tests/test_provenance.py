"""Which code, settings and machine a run directory comes from, over several starts."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path

from copd_megatron import __version__
from copd_megatron.config import Config, ModelConfig, load_config
from copd_megatron.launch.preflight import clear_run
from copd_megatron.launch.provenance import commit, record_start


def _config(seed: int) -> Config:
    config = Config(model=ModelConfig(path="/m/base"))
    config.run.seed = seed
    return config


def _starts(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "starts.jsonl").open()]


def test_a_start_says_what_ran(tmp_path: Path) -> None:
    record_start(_config(1), tmp_path, ["train", "my run.yaml", "run.seed=1"])
    (start,) = _starts(tmp_path)
    assert start["command"] == "copd train 'my run.yaml' run.seed=1"
    assert start["version"] == __version__ and start["host"]
    assert datetime.fromisoformat(str(start["time"])).tzinfo is not None
    assert isinstance(start["packages"], dict) and {"torch", "megatron-core"} <= start["packages"].keys()
    assert load_config(tmp_path / "config.yaml").run.seed == 1


def test_later_starts_keep_the_settings_of_earlier_ones(tmp_path: Path) -> None:
    for seed in (1, 1, 2, 3):
        record_start(_config(seed), tmp_path, ["train"])
    starts = _starts(tmp_path)
    assert [start["start"] for start in starts] == [1, 2, 3, 4]
    assert [load_config(tmp_path / str(start["settings"])).run.seed for start in starts] == [1, 1, 2, 3]
    assert starts[-1]["settings"] == "config.yaml"


def test_another_run_in_the_directory_begins_with_its_own_first_start(tmp_path: Path) -> None:
    for seed in (1, 2):
        record_start(_config(seed), tmp_path, ["train"])
    (tmp_path / "config.mine.yaml").write_text("# the user's own\n")
    clear_run(tmp_path)
    record_start(_config(3), tmp_path, ["train"])
    assert [start["start"] for start in _starts(tmp_path)] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.mine.yaml",
        "config.yaml",
        "starts.jsonl",
    ]


def test_a_damaged_list_of_starts_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_bytes(b'{"start": 1, "settings": "config.yaml"}\n\xff\n[]\n{"sta')
    record_start(_config(1), tmp_path, ["train"])
    assert [start["start"] for start in _starts(tmp_path)] == [1, 2]


def test_the_commit_says_whether_files_were_changed(tmp_path: Path) -> None:
    assert commit(tmp_path) is None

    def git(*words: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *settings, *words], check=True, capture_output=True)

    git("init")
    assert commit(tmp_path) is None, "no commit yet"
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "a")
    head = commit(tmp_path)
    assert head is not None and len(head) == 40
    (tmp_path / "a.py").write_text("a = 2\n")
    assert commit(tmp_path) == f"{head} with changes"
