"""``copd eval`` with real engines: several models, several ranks, and a second attempt give the same
verdicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from copd_megatron.config import load_config
from copd_megatron.evaluation.table import save_table
from tests.support.commands import copd, python
from tests.support.domains import make_domains
from tests.support.models import make_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    make_domains(root / "data", num_validation=7)
    for seed, name in enumerate(("one", "two")):
        make_model(root / name, seed=seed, num_hidden_layers=2)
    config = {
        "run": {"dir": str(root / "run"), "device": "cpu", "collective_timeout_seconds": 200},
        "model": {"path": str(root / "one"), "max_sequence_tokens": 160},
        "branches": {
            name: {
                "data": {"validation": [str(root / "data" / f"{name}-validation-*.tar")]},
                "rollout": {"max_new_tokens": 6, "max_num_seqs": 2},  # several parts
            }
            for name in ("alpha", "beta")
        },
        "evaluation": {"num_generations_per_prompt": 2, "temperature": 1.0},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
SETTINGS = {
    "run.seed": 7,
    "model.dtype": "bfloat16",
    "model.system_prompt": "Be brief.",
    "model.max_sequence_tokens": 99,
    "media.image_max_pixels": 999_999,
    "evaluation.temperature": 0.25,
    "evaluation.num_generations_per_prompt": 3,
    "branches.alpha.rollout.max_new_tokens": 5,
    "branches.alpha.data.max_prompt_tokens": 8,
    "branches.alpha.reward.timeout_seconds": 0.01,
    "branches.alpha.reward.verifiers": "[exact]",
}


def test_whatever_verdicts_depend_on_makes_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file beside the weights, each setting, the shards, and verifiers of one's own."""
    from copd_megatron.evaluation import models

    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "own_verifier_of_eval.py"
    own.write_text("def grade(response, answer, metadata): return 1.0\n")
    folder = shutil.copytree(root / "one", tmp_path / "model")
    shard = shutil.copy(next((root / "data").glob("alpha-validation-*.tar")), tmp_path / "far-000000.tar")
    remote = f"branches.alpha.data.validation=['pipe:cat {shard}']"

    def state(*overrides: str) -> str:
        config = load_config(root / "config.yaml", [remote, *overrides])
        (model,) = models.open_models([folder])
        return models._settings_text(config, model)

    seen = [state()]
    assert state() == seen[0]
    for name in COMPANIONS:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() and path.suffix == ".json" else {}
        path.write_text(json.dumps({**content, "rope_theta": 12345.0}))
        seen.append(state())
    for setting, value in SETTINGS.items():
        seen.append(state(f"{setting}={value}"))
    mine = "branches.alpha.reward.verifiers=['own_verifier_of_eval:grade']"
    seen.append(state(mine))
    own.write_text("def grade(response, answer, metadata): return 0.0\n")
    seen.append(state(mine))
    shutil.copy(next((root / "data").glob("beta-validation-*.tar")), shard)
    assert state() in seen, "what was fetched is still there"
    shutil.rmtree(tmp_path / "cache")
    seen.append(state())
    assert len(set(seen)) == len(seen)
    before = state()
    shutil.rmtree(tmp_path / "cache")
    assert state() == before, "fetched again, the same"


def test_one_engine_measures_models_that_differ_in_weights_alone(root: Path, tmp_path: Path) -> None:
    from copd_megatron.evaluation import models

    folders = [shutil.copytree(root / "one", tmp_path / name) for name in ("same", "noted", "rope", "eos")]
    for folder, name, change in (
        (folders[1], "config.json", {"_name_or_path": "x", "transformers_version": "0"}),
        (folders[2], "config.json", {"rope_theta": 12345.0}),
        (folders[3], "generation_config.json", {"eos_token_id": 3}),
    ):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **change}))
    groups = models._alike(models.open_models(folders))
    assert [[model.label for model in group] for group in groups] == [["same", "noted"], ["rope"], ["eos"]]


def file_of(out: Path, model: str) -> Path:
    (path,) = out.glob(f"{model}-*/verdicts.jsonl")
    return path


def verdicts(out: Path, model: str) -> list[dict[str, Any]]:
    lines = file_of(out, model).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda v: (v["domain"], v["prompt"]))


@pytest.mark.slow
def test_models_ranks_and_attempts(root: Path) -> None:
    command = ("eval", root / "config.yaml", root / "one", root / "two")
    done = copd(*command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "two - one" in done.stdout and "pass@k" in done.stdout and "maj@k" in done.stdout
    table = json.loads((root / "run/eval/evaluation.json").read_text())
    assert list(table["models"]) == ["one", "two"]
    assert table["models"]["two"]["beta"]["num_responses"] == 14
    first = {name: verdicts(root / "run/eval", name) for name in ("one", "two")}
    assert first["one"] != first["two"] and len(first["one"]) == 14

    # killed in the middle of the second model, in the middle of a line
    path = file_of(root / "run/eval", "two")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    again = copd(*command)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {name: verdicts(root / "run/eval", name) for name in first} == first
    assert again.stdout == done.stdout, "bit for bit"

    module = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "copd_megatron.cli")
    spread = python(*module, *command, "--out", root / "spread")
    assert spread.returncode == 0, spread.stderr[-4000:]
    assert {name: verdicts(root / "spread", name) for name in first} == first
    assert spread.stdout.split("written:")[0] == done.stdout.split("written:")[0]


def test_what_cannot_be_measured_is_said_before_engines_start(root: Path) -> None:
    def said(*arguments: object) -> str:
        done = copd("eval", root / "config.yaml", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "no such folder" in said(root / "nowhere")
    assert "name at least one MODEL" in said("run.seed=1")
    assert "a model is named twice" in said(root / "one", root / "one")
    save_table(root / "of_a_run", {"base": {"alpha": 0.5}}, ["alpha"])
    before = (root / "of_a_run/evaluation.json").read_text()
    assert "evaluation.json is there already and is no result of copd eval" in said(
        root / "one", "--out", root / "of_a_run"
    )
    assert (root / "of_a_run/evaluation.json").read_text() == before


@pytest.mark.slow
def test_models_of_two_shapes_a_checkpoint_and_tensor_parallel(root: Path) -> None:
    make_model(root / "wide", seed=2, num_hidden_layers=3, hidden_size=128)
    made = copd("checkpoint", "to-megatron", root / "wide", root / "sharded")
    assert made.returncode == 0, made.stderr[-4000:]
    command = ("eval", root / "config.yaml", root / "one", root / "wide", root / "two", root / "sharded")
    done = copd(*command, "--out", root / "shapes")
    assert done.returncode == 0, done.stderr[-4000:]
    table = json.loads((root / "shapes/evaluation.json").read_text())
    assert list(table["models"]) == ["one", "wide", "two", "sharded"], "in the order of the command"
    found = {name: verdicts(root / "shapes", name) for name in ("one", "wide", "two", "sharded")}
    assert found["wide"] == found["sharded"] != found["one"]

    alone = copd("eval", root / "config.yaml", root / "wide", "--out", root / "alone")
    assert alone.returncode == 0, alone.stderr[-4000:]
    assert verdicts(root / "alone", "wide") == found["wide"], "an engine before it changes nothing"

    module = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "copd_megatron.cli")
    halves = [f"branches.{name}.rollout.tensor_parallel_size=2" for name in ("alpha", "beta")]
    split = python(*module, *command, *halves, "--out", root / "split")
    assert split.returncode == 0, split.stderr[-4000:]
    assert {name: verdicts(root / "split", name) for name in found} == found
