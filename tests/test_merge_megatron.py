"""Merging Megatron's distributed format: as inputs, mixed with Hugging Face folders, and as the result."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from copd_megatron.checkpoint.manifest import (
    CheckpointError,
    read_manifest,
    write_manifest,
)
from copd_megatron.cli.main import main
from copd_megatron.config.schema import ParallelConfig
from copd_megatron.formats.megatron_reader import megatron_tensors_of
from copd_megatron.merge.check import MismatchError
from copd_megatron.merge.convert import hf_to_megatron, megatron_to_hf
from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.recipe import MergeRecipe, ModelInput
from copd_megatron.report.merge_distance import branch_distances
from tests.support.actors import load_and_compare
from tests.support.layouts import Job, run_layouts
from tests.support.merge_folders import joint_checkpoint, make_family, tensors_of, write_folder
from tests.support.models import make_model
from tests.support.models_vl import make_vl_model, publish

KINDS = ("text", "text tied", "vision tied", "text mixture")
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
TIED: dict[str, Any] = {"tie_word_embeddings": True, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """A base and two branches of each kind, as Hugging Face folders."""
    root = tmp_path_factory.mktemp("families")
    large = {"vocab_size": 9000, "hidden_size": 128}  # tensors of several blocks
    return {
        "text": make_family(root / "text", 2, dtype=torch.bfloat16, **large),
        "text tied": make_family(root / "tied", 2, **TIED),
        "vision tied": [make_vl_model(root / f"vl{seed}", seed=seed, tied=True) for seed in range(3)],
        "text mixture": [make_model(root / f"moe{seed}", seed=seed, **MIXTURE) for seed in range(3)],
        "vision mixture": [
            publish(make_vl_model(root / f"vl_moe{seed}", seed=seed, mixture=True)) for seed in range(3)
        ],
    }


@pytest.fixture(scope="module")
def converted(
    families: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """The same in Megatron's format."""
    root = tmp_path_factory.mktemp("converted")
    found: dict[str, list[Path]] = {}
    for kind, folders in families.items():
        found[kind] = [root / f"{kind.replace(' ', '_')}_{number}" for number in range(len(folders))]
        for source, target in zip(folders, found[kind], strict=True):
            hf_to_megatron(source, target)
    return found


def recipe_of(folders: list[Path], method: str = "ties") -> MergeRecipe:
    base, branches = (str(folders[0]), folders[1:]) if method != "linear" else (None, folders[1:])
    density = {"density": 0.6} if method != "linear" else {}
    return MergeRecipe(
        method=method,
        base=base,
        models=tuple(ModelInput(path=str(f), parameters={"weight": 0.4, **density}) for f in branches),
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", [*KINDS, "vision mixture"])
def test_the_format_of_the_inputs_does_not_matter(
    families: dict[str, list[Path]],
    converted: dict[str, list[Path]],
    tmp_path: Path,
    kind: str,
    method: str,
) -> None:
    """All Hugging Face, all Megatron, a Hugging Face base with Megatron branches: the same folder."""
    hf, megatron = families[kind], converted[kind]
    for name, folders in {"hf": hf, "megatron": megatron, "mixed": [hf[0], *megatron[1:]]}.items():
        run_merge(recipe_of(folders, method), tmp_path / name, shard_bytes=2_000_000)
    expected = files_of(tmp_path / "hf")
    assert "model.safetensors.index.json" in expected or kind != "text"
    assert files_of(tmp_path / "megatron") == expected
    assert files_of(tmp_path / "mixed") == expected


def test_a_joint_checkpoint_stands_for_its_trained_branches(
    families: dict[str, list[Path]],
    converted: dict[str, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, report and tokenizer too; the frozen branch has no weights there and is left out."""
    base = families["text"][0]
    names = dict(zip(("fixed", "image", "video"), converted["text"], strict=True))
    checkpoint = joint_checkpoint(tmp_path, names, base, frozen="fixed")
    out = tmp_path / "out"
    arguments = ["merge", str(checkpoint), "--weights", "0.25,0.75", "--out", str(out)]
    assert main([*arguments, "--base", str(base), "--report", "--verify"]) == 0
    assert "cos image·video" in capsys.readouterr().out
    tensors = [tensors_of(folder) for folder in families["text"][1:]]
    for name, merged in tensors_of(out).items():
        expected = 0.25 * tensors[0][name].float() + 0.75 * tensors[1][name].float()
        assert torch.equal(merged, expected.bfloat16()), name
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_distances_are_the_same_from_megatron_folders(
    families: dict[str, list[Path]], converted: dict[str, list[Path]]
) -> None:
    hf, megatron = families["text"], converted["text"]
    expected = branch_distances(hf[0], hf[1:], labels=["a", "b"])
    assert branch_distances(hf[0], megatron[1:], labels=["a", "b"]) == expected


def test_a_tied_output_embedding_that_the_base_stores(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Megatron keeps it once, the Hugging Face base twice: the branches are mergeable all the same."""
    folders = []
    for number, source in enumerate(families["text tied"]):
        tensors = tensors_of(source)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        folders.append(write_folder(tmp_path / f"hf{number}", tensors, **TIED))
    megatron = [folders[0], tmp_path / "m1", tmp_path / "m2"]
    for source, target in zip(folders[1:], megatron[1:], strict=True):
        hf_to_megatron(source, target)
    run_merge(recipe_of(folders), tmp_path / "hf")
    run_merge(recipe_of(megatron), tmp_path / "megatron")
    assert files_of(tmp_path / "megatron") == files_of(tmp_path / "hf")
    merged = tensors_of(tmp_path / "hf")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    # and written in Megatron's format, it is kept once
    run_merge(recipe_of(megatron), tmp_path / "once", output_format="megatron")
    assert not [key for key in megatron_tensors_of(tmp_path / "once") if "output_layer" in key]


# ---- the result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_in_megatrons_format_is_the_same_model(
    families: dict[str, list[Path]], converted: dict[str, list[Path]], tmp_path: Path, kind: str
) -> None:
    """Converted back it has the tensors, configuration and tokenizer of the Hugging Face result; and torch's
    own reader finds in it what it finds in the Hugging Face result converted by the other tool."""
    run_merge(recipe_of(families[kind]), tmp_path / "hf")
    run_merge(recipe_of(converted[kind]), tmp_path / "out", output_format="megatron", shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 2
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    one, other = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for path in (tmp_path / "hf").iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    hf_to_megatron(tmp_path / "hf", tmp_path / "expected")
    expected, found = (read_by_torch(tmp_path / name) for name in ("expected", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_stacks_of_experts_are_not_written_in_megatrons_format(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Qwen3VLMoeFor.*--format hf"):
        run_merge(recipe_of(families["vision mixture"]), tmp_path / "out", output_format="megatron")


def read_by_torch(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by ``torch.distributed.checkpoint`` itself."""
    state: dict[str, Any] = {
        key: torch.zeros(info.shape, dtype=info.dtype) for key, info in megatron_tensors_of(folder).items()
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


def test_the_split_of_the_work_changes_nothing(converted: dict[str, list[Path]], tmp_path: Path) -> None:
    """By one thread, by several, by two ranks (one after the other: a barrier waits for nobody here)."""
    recipe = recipe_of(converted["text"])
    options: dict[str, Any] = {"shard_bytes": 100_000, "output_format": "megatron"}
    run_merge(recipe, tmp_path / "one", threads=1, **options)
    run_merge(recipe, tmp_path / "threads", threads=3, **options)
    with pytest.raises(RuntimeError, match="not finished by their ranks"):
        run_merge(recipe, tmp_path / "ranks", rank=0, world_size=2, **options)
    run_merge(recipe, tmp_path / "ranks", rank=1, world_size=2, **options)
    run_merge(recipe, tmp_path / "ranks", rank=0, world_size=2, **options)
    expected = files_of(tmp_path / "one")
    assert len([name for name in expected if name.endswith(".distcp")]) > 5
    assert files_of(tmp_path / "threads") == expected
    assert files_of(tmp_path / "ranks") == expected


class Killed(BaseException):
    """Ends a merge as a signal would."""


def test_an_interrupted_merge_goes_on_and_a_damaged_file_is_merged_again(
    converted: dict[str, list[Path]], tmp_path: Path
) -> None:
    recipe, out = recipe_of(converted["text"]), tmp_path / "out"
    options: dict[str, Any] = {"shard_bytes": 100_000, "output_format": "megatron", "threads": 1}
    whole = run_merge(recipe, tmp_path / "whole", **options)
    journal = tmp_path / "out.partial" / ".merge"

    def watch(done: int, total: int) -> None:
        if len(list(journal.glob("shard-*.json"))) >= 4:
            raise Killed

    with pytest.raises(Killed):
        run_merge(recipe, out, progress=watch, **options)
    partial = tmp_path / "out.partial"
    with (partial / "__0_0.distcp").open("r+b") as file:  # the archive's end, no tensor's value
        file.seek(-5, os.SEEK_END)
        file.write(b"\1")
    with (partial / "__0_1.distcp").open("r+b") as file:
        file.seek(5000)
        file.write(b"\1\2\3")
    outcome = run_merge(recipe, out, **options)
    assert outcome.kept_shards == 2
    assert outcome.merged_shards == whole.merged_shards - 2
    assert files_of(out) == files_of(tmp_path / "whole")


def _wrong_after_loading(parallel: ParallelConfig, merged_hf: Path, merged: Path) -> str:
    """Loads a merged folder with Megatron itself; the tensors that are not those of the Hugging Face one."""
    _, wrong = load_and_compare(parallel, merged_hf, merged)
    return ", ".join(wrong)


@pytest.mark.slow
def test_megatron_loads_the_result_at_any_layout(
    families: dict[str, list[Path]], converted: dict[str, list[Path]], tmp_path: Path
) -> None:
    jobs = []
    for kind, (tp, pp) in {"text tied": (1, 2), "vision tied": (2, 1)}.items():
        hf, out = tmp_path / f"{kind} hf", tmp_path / kind
        run_merge(recipe_of(families[kind]), hf)
        run_merge(recipe_of(converted[kind]), out, output_format="megatron", shard_bytes=100_000)
        jobs.append(Job(tp=tp, pp=pp, args=(hf, out)))
    assert run_layouts(_wrong_after_loading, jobs) == [["", ""]] * 2


# ---- refusals ---------------------------------------------------------------------------------------------


def test_damage_is_found_and_named(
    families: dict[str, list[Path]],
    converted: dict[str, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = families["text tied"][0]
    names = dict(zip("ab", converted["text tied"][1:], strict=True))
    checkpoint = joint_checkpoint(tmp_path, names, base)
    recipe = recipe_of([base, checkpoint / "a", checkpoint / "b"])
    file = checkpoint / "b" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"b/__0_0\.distcp is damaged: SHA-256"):
        run_merge(recipe, tmp_path / "out", verify=True)
    file.write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match=r"b/__0_0\.distcp has \d+ bytes, the manifest says"):
        run_merge(recipe, tmp_path / "out")
    assert main(["merge", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    assert "the manifest says" in capsys.readouterr().err
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="does not say what model"):
        run_merge(recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds the branches a, b: name one"):
        run_merge(recipe_of([base, joint_checkpoint(tmp_path / "x", names, base)]), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_folder_that_is_gone_is_asked_for(
    families: dict[str, list[Path]], converted: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Branches whose base was moved merge with any input that has configuration and tokenizer, not alone."""
    base = shutil.copytree(families["text tied"][0], tmp_path / "base")
    names = dict(zip("ab", converted["text tied"][1:], strict=True))
    checkpoint = joint_checkpoint(tmp_path, names, base)
    shutil.rmtree(base)
    branches = [checkpoint / "a", checkpoint / "b"]
    with pytest.raises(FileNotFoundError, match="was trained from is gone, and no other"):
        run_merge(recipe_of([tmp_path, *branches], "linear"), tmp_path / "out")
    run_merge(recipe_of([families["text tied"][0], *branches]), tmp_path / "out")
    run_merge(recipe_of(families["text tied"]), tmp_path / "hf")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "hf")


def test_other_sizes_are_refused_by_name(
    families: dict[str, list[Path]], converted: dict[str, list[Path]], tmp_path: Path
) -> None:
    base = families["text tied"][0]
    checkpoint = joint_checkpoint(tmp_path, {"a": converted["text tied"][1]}, base)
    manifest = read_manifest(checkpoint)
    entry = manifest.branches["a"]
    moved = replace(entry, model_path=str(tmp_path / "gone"), dims={**entry.dims, "rope_theta": 500.0})
    write_manifest(checkpoint, replace(manifest, branches={"a": moved}))
    with pytest.raises(MismatchError, match=r"differ in sizes: rope_theta \(500\.0 and 1000000\.0\)"):
        run_merge(recipe_of([base, checkpoint / "a"]), tmp_path / "out")


def test_what_megatrons_format_cannot_hold_is_refused(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    tensors = tensors_of(families["text tied"][1])
    extra = write_folder(tmp_path / "extra", {**tensors, "model.extra": torch.ones(2)}, **TIED)
    recipe = MergeRecipe(method="linear", models=(ModelInput(path=str(extra), parameters={"weight": 1}),))
    with pytest.raises(ValueError, match=r"1 tensors too many for .* model\.extra"):
        run_merge(recipe, tmp_path / "out", output_format="megatron")
    mixed = {n: t.half() if n.endswith("q_proj.weight") else t for n, t in tensors.items()}
    save_file(mixed, extra / "model.safetensors")
    with pytest.raises(ValueError, match=r"have types torch\.float16, torch\.float32; choose one"):
        run_merge(recipe, tmp_path / "out", output_format="megatron")
    assert not (tmp_path / "out.partial").exists()
