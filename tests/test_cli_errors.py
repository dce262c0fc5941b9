"""What a user's mistakes look like at the prompt: one message, exit status 2, nothing started.

Each runs ``python -m copd_megatron.cli`` as a user would. Mistakes in the configuration must show without
the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from copd_megatron.data.convert.write import NewSample, write_shards
from tests.support.watched_copd import Answer, watched_copd

ROOT = Path(__file__).resolve().parents[1]

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rope_theta": 1e6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}


def _shard(folder: Path, name: str, verifier: str = "exact") -> Path:
    samples = [NewSample(prompt=f"{name} {i}", answer=str(i), verifier=verifier) for i in range(3)]
    return write_shards(samples, folder, f"{name}-{verifier}")[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and shards that are sound as far as these checks look."""
    root = tmp_path_factory.mktemp("cli")
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (model / "tokenizer.json").write_text("{}")
    for name in ("alpha", "beta"):
        _shard(root, name)
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(root / "model"), "max_sequence_tokens": 128},
        "branch_defaults": {
            "data": {"max_prompt_tokens": 96},
            "rollout": {"max_new_tokens": 32},
            "parallel": {"tensor_model_parallel_size": 2},
        },
        "branches": {
            name: {"data": {"train": [str(root / f"{name}-exact-000000.tar")]}} for name in ("alpha", "beta")
        },
    }


def _train(config: dict[str, Any], tmp_path: Path, *overrides: str, **environment: str) -> Answer:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = watched_copd("train", str(path), *overrides, **environment)
    assert answer.status == 2, answer.stderr
    assert not (tmp_path / "run" / "config.yaml").exists(), "nothing was started"
    return answer


def test_misspelt_key_names_the_nearest(config: dict[str, Any], tmp_path: Path) -> None:
    answer = _train(config, tmp_path, "optimizer.learning_rat=1")
    assert "learning_rat" in answer.message
    assert not answer.modules
    config["branches"]["alpha"]["parallel"] = {"tensor_model_paralel_size": 2}
    answer = _train(config, tmp_path)
    assert "tensor_model_paralel_size" in answer.message
    assert "did you mean 'branches.alpha.parallel.tensor_model_parallel_size'" in answer.message
    assert not answer.modules


@pytest.mark.parametrize("world_size", ["3", "8"])
def test_layout_that_does_not_fit_the_world(config: dict[str, Any], tmp_path: Path, world_size: str) -> None:
    """As under srun: the launcher has said how many processes there are."""
    answer = _train(config, tmp_path, WORLD_SIZE=world_size)
    assert world_size in answer.message
    assert "4" in answer.message
    assert not answer.modules


def test_layout_that_does_not_fit_the_model(config: dict[str, Any], tmp_path: Path) -> None:
    answer = _train(config, tmp_path, "branches.alpha.parallel.pipeline_model_parallel_size=3")
    assert "branches.alpha" in answer.message
    assert "pipeline_model_parallel_size" in answer.message
    assert not answer.modules


def test_missing_model_folder(config: dict[str, Any], tmp_path: Path) -> None:
    answer = _train(config, tmp_path, f"model.path={tmp_path / 'nowhere'}")
    assert "model.path" in answer.message
    assert "nowhere" in answer.message
    assert not answer.modules


def test_model_folder_without_weights(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "weightless"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "tokenizer.json").write_text("{}")
    answer = _train(config, tmp_path, f"model.path={folder}")
    assert "safetensors" in answer.message
    assert not answer.modules


@pytest.mark.skipif(find_spec("wandb") is not None, reason="the optional package wandb is installed")
def test_a_package_that_is_not_installed(config: dict[str, Any], tmp_path: Path) -> None:
    answer = _train(config, tmp_path, "logging.wandb.enabled=true")
    assert "logging.wandb.enabled: the package wandb is not installed" in answer.message
    assert "pip install wandb" in answer.message
    assert not answer.modules


def test_missing_config_file(tmp_path: Path) -> None:
    answer = watched_copd("train", str(tmp_path / "absent.yaml"))
    assert answer.status == 2
    assert "absent.yaml" in answer.message
    assert not answer.modules


def _with_shard(config: dict[str, Any], path: Path) -> dict[str, Any]:
    config["branches"]["beta"]["data"]["train"] = [str(path)]
    return config


def test_empty_shard(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "empty-000000.tar"
    with tarfile.open(path, "w"):
        pass
    answer = _train(_with_shard(config, path), tmp_path)
    assert "empty-000000.tar" in answer.message
    assert "empty" in answer.message.replace("empty-000000", "")


@pytest.mark.parametrize("damage", ["cut off", "not a tar"])
def test_broken_shard(config: dict[str, Any], tmp_path: Path, root: Path, damage: str) -> None:
    path = tmp_path / "broken-000000.tar"
    whole = (root / "beta-exact-000000.tar").read_bytes()
    path.write_bytes(whole[:1300] if damage == "cut off" else b"nothing of the kind" * 100)
    answer = _train(_with_shard(config, path), tmp_path)
    assert "broken-000000.tar" in answer.message
    assert "Write it again" in answer.message or "not" in answer.message


def test_missing_shard(config: dict[str, Any], tmp_path: Path, root: Path) -> None:
    answer = _train(_with_shard(config, root / "gamma-*.tar"), tmp_path)
    assert "gamma-*.tar" in answer.message
    assert "matches" in answer.message


def test_unknown_verifier_in_the_config(config: dict[str, Any], tmp_path: Path) -> None:
    answer = _train(config, tmp_path, "branches.alpha.reward.verifiers=[exakt]")
    assert "exakt" in answer.message
    assert "exact" in answer.message.replace("exakt", "")


def test_unknown_verifier_in_a_sample(config: dict[str, Any], tmp_path: Path) -> None:
    path = _shard(tmp_path, "odd", verifier="guess")
    answer = _train(_with_shard(config, path), tmp_path)
    assert "guess" in answer.message
    assert path.name in answer.message


def test_existing_run_is_not_overwritten(config: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    line = json.dumps({"step": 1, "phase": "rlvr"}) + "\n"
    (run / "metrics.jsonl").write_text(line)
    answer = _train(config, tmp_path, "checkpoint.save_period=0")
    assert "run.overwrite=true" in answer.message
    assert str(run) in answer.message
    assert (run / "metrics.jsonl").read_text() == line


def test_eval_of_a_folder_that_is_not_there(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = watched_copd("eval", str(path), str(tmp_path / "nowhere"))
    assert answer.status == 2
    assert "nowhere" in answer.message
    assert not answer.modules


def test_merge_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    answer = watched_copd(
        "merge", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "out")
    )
    assert answer.status == 2
    assert "one" in answer.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("branches.alpha.data.train=[nowhere/at-all-*.tar]", "no shard matches 'nowhere/at-all-*.tar'"),
        ("branches.alpha.reward.verifiers=[mathematics]", "mathematics"),
    ],
)
def test_dry_run_finds_what_is_missing(
    config: dict[str, Any], tmp_path: Path, override: str, said: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = watched_copd("train", str(path), "--dry-run", override)
    assert answer.status == 2
    assert said in answer.message


def test_dry_run_starts_nothing_and_needs_no_torch(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = watched_copd("train", str(path), "--dry-run", "run.seed=7")
    assert answer.status == 0, answer.stderr
    assert not answer.modules
    assert not (tmp_path / "run").exists()
