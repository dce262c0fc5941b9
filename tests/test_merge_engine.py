"""Merging from file to file: equal to merging in memory, however the work is split, cut off or resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from copd_megatron.cli.main import main
from copd_megatron.hf.folder import HFFolder
from copd_megatron.merge.check import MismatchError
from copd_megatron.merge.engine import MergeOutcome, run_merge
from copd_megatron.merge.methods import Settings, merge_tensors
from copd_megatron.merge.recipe import MergeRecipe, ModelInput
from copd_megatron.report.merge_distance import branch_distances
from tests.support import merge_reference as reference
from tests.support.merge_folders import make_family, tensors_of, write_folder
from tests.support.shadows import shadowing_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three branches."""
    return make_family(tmp_path_factory.mktemp("family"), 3)


def recipe_of(family: list[Path], method: str = "linear", **options: Any) -> MergeRecipe:
    base, branches = (None, family[1:]) if method == "linear" else (str(family[0]), family[1:])
    branches = branches[:1] if method == "slerp" else branches
    parameters: dict[str, Any] = {} if method == "slerp" else {"weight": 0.4}
    if method in ("ties", "dare_linear", "dare_ties"):
        parameters["density"] = 0.6
    shared = {"t": 0.3} if method == "slerp" else {}
    return MergeRecipe(
        method=method,
        base=base,
        models=tuple(ModelInput(path=str(b), parameters=parameters) for b in branches),
        parameters=options.pop("parameters", shared),
        **options,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
def test_from_file_to_file_equals_in_memory(family: list[Path], tmp_path: Path, method: str) -> None:
    run_merge(recipe_of(family, method), tmp_path / "out", shard_bytes=100_000)
    merged = tensors_of(tmp_path / "out")
    inputs = [tensors_of(folder) for folder in family]
    inputs = inputs[1:] if method == "linear" else inputs[:2] if method == "slerp" else inputs
    settings = Settings(
        weights=(0.4,) * 3,
        densities=(0.6,) * 3,
        normalize=method in ("linear", "ties"),
        rescale=method.startswith("dare"),
        t=0.3,
    )
    if method == "slerp":
        settings = Settings(t=0.3)
    assert set(merged) == set(inputs[0])
    for name, tensor in merged.items():
        expected = merge_tensors(method, [source[name] for source in inputs], settings, name=name)
        assert torch.equal(tensor, expected), name
    assert not torch.equal(merged["lm_head.weight"], inputs[0]["lm_head.weight"])


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_split_of_the_work_changes_nothing(tmp_path: Path, method: str) -> None:
    """A tensor of several blocks, by one thread, several threads, two processes, two ranks."""
    family = make_family(tmp_path / "m", 2, vocab_size=9000, hidden_size=128, num_hidden_layers=1)
    recipe = recipe_of(family, method, seed=7)
    for name, options in {
        "one": {"threads": 1},
        "threads": {"threads": 3},
        "processes": {"threads": 1, "processes": 2},
    }.items():
        run_merge(recipe, tmp_path / name, shard_bytes=2_000_000, **options)
    ranks = tmp_path / "ranks"
    # One after the other: what the first leaves is what the second finds.
    with pytest.raises(RuntimeError, match="not finished by their ranks"):
        run_merge(recipe, ranks, shard_bytes=2_000_000, rank=0, world_size=2)
    run_merge(recipe, ranks, shard_bytes=2_000_000, rank=1, world_size=2)
    run_merge(recipe, ranks, shard_bytes=2_000_000, rank=0, world_size=2)
    expected = files_of(tmp_path / "one")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 2
    for name in ("threads", "processes", "ranks"):
        assert files_of(tmp_path / name) == expected


def test_shards_do_not_change_the_tensors(family: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(family, "dare_ties")
    run_merge(recipe, tmp_path / "one")
    run_merge(recipe, tmp_path / "many", shard_bytes=30_000)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())


def test_the_safetensors_library_reads_what_is_written(family: list[Path], tmp_path: Path) -> None:
    run_merge(recipe_of(family), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors_of(family[0]))


def test_sharded_inputs(family: list[Path], tmp_path: Path) -> None:
    """Inputs that are cut into files differently."""
    run_merge(recipe_of(family), tmp_path / "whole")
    cut = [
        write_folder(tmp_path / folder.name, tensors_of(folder), num_shards=number + 1)
        for number, folder in enumerate(family)
    ]
    run_merge(recipe_of(cut), tmp_path / "cut")
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_types(tmp_path: Path) -> None:
    """Cast first to dtype, merged in float32, rounded to out_dtype; config.json says so."""
    family = make_family(tmp_path / "m", 2, dtype=torch.bfloat16)
    run_merge(recipe_of(family, "task_arithmetic"), tmp_path / "asis")
    run_merge(recipe_of(family, "task_arithmetic", dtype="float32"), tmp_path / "wide")
    run_merge(
        recipe_of(family, "task_arithmetic", dtype="float32", out_dtype="bfloat16"), tmp_path / "narrow"
    )
    for name, dtype in (("asis", "bfloat16"), ("wide", "float32"), ("narrow", "bfloat16")):
        assert {t.dtype for t in tensors_of(tmp_path / name).values()} == {getattr(torch, dtype)}
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == dtype
    wide, narrow = tensors_of(tmp_path / "wide"), tensors_of(tmp_path / "narrow")
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in wide)


def test_inputs_of_different_types_are_promoted(family: list[Path], tmp_path: Path) -> None:
    half = write_folder(tmp_path / "half", {n: t.bfloat16() for n, t in tensors_of(family[1]).items()})
    recipe = MergeRecipe(
        method="linear",
        models=(
            ModelInput(path=str(half), parameters={"weight": 1}),
            ModelInput(path=str(family[2]), parameters={"weight": 1}),
        ),
    )
    run_merge(recipe, tmp_path / "out")
    name = "model.norm.weight"
    expected = (tensors_of(half)[name].double() + tensors_of(family[2])[name].double()) / 2
    assert torch.equal(tensors_of(tmp_path / "out")[name], expected.float())


def test_whole_numbers_must_agree(family: list[Path], tmp_path: Path) -> None:
    buffers = [torch.arange(5), torch.arange(5)]
    folders = [
        write_folder(tmp_path / str(k), {**tensors_of(family[k]), "model.ids": buffers[k]}) for k in range(2)
    ]
    recipe = MergeRecipe(
        method="linear", models=tuple(ModelInput(path=str(f), parameters={"weight": 1}) for f in folders)
    )
    run_merge(recipe, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")["model.ids"], torch.arange(5))
    write_folder(folders[1], {**tensors_of(family[1]), "model.ids": torch.arange(5) + 1})
    with pytest.raises(ValueError, match=r"model\.ids .* differs"):
        run_merge(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_by_pattern_and_depth_reach_the_tensors(family: list[Path], tmp_path: Path) -> None:
    weight = [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "norm", "value": 0.25}, {"value": 0.5}]
    recipe = MergeRecipe(
        method="task_arithmetic",
        base=str(family[0]),
        models=(ModelInput(path=str(family[1]), parameters={"weight": weight}),),
    )
    run_merge(recipe, tmp_path / "out")
    base, branch, merged = (tensors_of(f) for f in (*family[:2], tmp_path / "out"))
    for name, share in {
        "model.layers.0.mlp.up_proj.weight": 0.0,
        "model.layers.1.mlp.up_proj.weight": 0.5,
        "model.layers.2.mlp.up_proj.weight": 1.0,
        "model.layers.1.input_layernorm.weight": 0.25,
        "lm_head.weight": 0.5,
    }.items():
        expected = base[name] + share * (branch[name] - base[name])
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-8)


def test_companions_come_along(family: list[Path], tmp_path: Path) -> None:
    source = shutil.copytree(family[1], tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "training.log").write_text("not this")
    folders = [family[0], source, *family[2:]]
    run_merge(recipe_of(folders, "ties", tokenizer_source=str(source)), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"}
    assert names == wanted | {"model.safetensors", "tokenizer_config.json"}


# ---- cut off and resumed ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a merge as a signal would."""


def interrupted(recipe: MergeRecipe, out: Path, *, after_shards: int, shard_bytes: int) -> None:
    """Runs a merge until some shards are finished."""

    def watch(done: int, total: int) -> None:
        journal = out.with_name(out.name + ".partial") / ".merge"
        if len(list(journal.glob("shard-*.json"))) >= after_shards:
            raise Killed

    with pytest.raises(Killed):
        run_merge(recipe, out, shard_bytes=shard_bytes, threads=1, progress=watch)
    assert not out.exists()


def resumed(recipe: MergeRecipe, out: Path, **options: Any) -> MergeOutcome:
    return run_merge(recipe, out, shard_bytes=60_000, threads=1, **options)


def test_an_interrupted_merge_goes_on(family: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(family, "dare_ties")
    whole = resumed(recipe, tmp_path / "whole")
    interrupted(recipe, tmp_path / "out", after_shards=3, shard_bytes=60_000)
    outcome = resumed(recipe, tmp_path / "out")
    assert outcome.kept_shards == 3
    assert outcome.merged_shards == whole.merged_shards - 3
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_damaged_shard_is_merged_again(family: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(family, "ties")
    resumed(recipe, tmp_path / "whole")
    interrupted(recipe, tmp_path / "out", after_shards=3, shard_bytes=60_000)
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    with shards[0].open("r+b") as file:  # one bit
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    with shards[1].open("r+b") as file:  # torn
        file.truncate(1000)
    outcome = resumed(recipe, tmp_path / "out")
    assert outcome.kept_shards == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["recipe", "input", "shards", "fresh"])
def test_another_merge_starts_anew(family: list[Path], tmp_path: Path, change: str) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in family]
    interrupted(recipe_of(folders, "dare_ties"), tmp_path / "out", after_shards=2, shard_bytes=60_000)
    recipe, size = recipe_of(folders, "dare_ties", seed=int(change == "recipe")), 60_000
    if change == "input":
        write_folder(folders[1], {n: t + 1 for n, t in tensors_of(folders[1]).items()})
    elif change == "shards":
        size = 50_000
    outcome = run_merge(recipe, tmp_path / "out", shard_bytes=size, resume=change != "fresh")
    assert outcome.kept_shards == 0
    run_merge(recipe, tmp_path / "whole", shard_bytes=size)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_killed_process_can_be_resumed(tmp_path: Path) -> None:
    """SIGKILL at whatever instant, then the same command."""
    family = make_family(tmp_path / "m", 2, vocab_size=20_000, hidden_size=128, num_hidden_layers=2)
    command = [
        *(sys.executable, "-m", "copd_megatron.cli", "merge", *map(str, family[1:])),
        *("--base", str(family[0]), "--method", "ties", "--density", "0.5", "--shard-size", "1MB"),
    ]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], cwd=ROOT, check=True)
    journal = tmp_path / "out.partial" / ".merge"
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], cwd=ROOT)
    while process.poll() is None and len(list(journal.glob("shard-*.json"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    found = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "shards kept" in found.stdout
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_finished(
    family: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def allocate(descriptor: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    recipe = recipe_of(family, "ties")
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(OSError, match=r"no space for shard 4 .* finished shards are kept"):
        resumed(recipe, tmp_path / "out")
    monkeypatch.undo()
    assert resumed(recipe, tmp_path / "out").kept_shards == 3


def test_a_failure_in_a_worker_process_is_told(
    family: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in a folder whose files have the names of what it imports, which are left alone."""
    monkeypatch.chdir(shadowing_folder(tmp_path / "received"))
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in family[:3]]
    for k in (1, 2):
        write_folder(folders[k], {**tensors_of(folders[k]), "model.ids": torch.full((3,), k)})
    with pytest.raises(ValueError, match=r"model\.ids"):
        run_merge(recipe_of(folders), tmp_path / "out", processes=2, shard_bytes=60_000)
    assert not (tmp_path / "out").exists()


def test_the_old_result_stands_until_the_new_one_is_complete(family: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="choose another folder"):
        run_merge(recipe_of(family), out)
    with pytest.raises(Killed):
        run_merge(recipe_of(family), out, overwrite=True, progress=lambda done, total: kill_at(done))
    assert (out / "keep.txt").read_text() == "precious"
    run_merge(recipe_of(family), out, overwrite=True)
    assert not (out / "keep.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def kill_at(done: int) -> None:
    if done > 50_000:
        raise Killed


def test_progress_is_told(family: list[Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    outcome = run_merge(recipe_of(family), tmp_path / "out", progress=lambda *step: told.append(step))
    assert told[0] == (0, outcome.num_bytes)
    assert told[-1] == (outcome.num_bytes, outcome.num_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# ---- memory -----------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys, threading
from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.recipe import read_recipe
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_merge(read_recipe(sys.argv[1]), sys.argv[2], threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, method: str) -> None:
    """Four inputs of 80 MB, one tensor of 64 MB: a merge takes less than half of one input."""
    family = make_family(tmp_path / "m", 3, vocab_size=32_000, hidden_size=512, num_hidden_layers=1)
    size = (family[0] / "model.safetensors").stat().st_size
    models = "".join(f"- {{model: {f}, parameters: {{weight: 1}}}}\n" for f in family[1:])
    extra = "" if method == "linear" else f"base_model: {family[0]}\nparameters: {{density: 0.5}}\n"
    (tmp_path / "r.yaml").write_text(f"merge_method: {method}\n{extra}models:\n{models}")
    arguments = [sys.executable, "-c", _PEAK, str(tmp_path / "r.yaml"), str(tmp_path / "out")]
    found = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True)
    assert size > 120e6
    assert int(found.stdout) * 1024 < 0.4 * size


# ---- refusals ---------------------------------------------------------------------------------------------


def refuse(family: list[Path], other: Path, out: Path) -> str:
    with pytest.raises(MismatchError) as raised:
        run_merge(recipe_of([family[0], family[1], other]), out)
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return str(raised.value)


def test_models_that_differ_are_refused_by_name(family: list[Path], tmp_path: Path) -> None:
    tensors = tensors_of(family[1])
    out = tmp_path / "out"

    def variant(name: str, values: dict[str, Tensor], **config: Any) -> Path:
        return write_folder(tmp_path / name, values, **config)

    message = refuse(family, variant("theta", tensors, rope_theta=1e4), out)
    assert "config.json: rope_theta (10000.0 and 1000000.0)" in message
    message = refuse(family, variant("nested", tensors, rope_scaling={"factor": 2}), out)
    assert "rope_scaling.factor (2 and missing)" in message
    fewer = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    assert "lm_head.weight" in refuse(family, variant("fewer", fewer), out)
    more = {**tensors, "model.extra": torch.zeros(1)}
    assert f"only in {tmp_path / 'more'}: model.extra" in refuse(family, variant("more", more), out)
    cut = {**tensors, "model.norm.weight": torch.zeros(63)}
    assert "model.norm.weight [63] and [64]" in refuse(family, variant("cut", cut), out)
    whole = {**tensors, "model.norm.weight": torch.zeros(64, dtype=torch.int64)}
    assert "types that cannot be merged" in refuse(family, variant("whole", whole), out)


def test_a_configuration_key_may_be_allowed_to_differ(family: list[Path], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", tensors_of(family[1]), max_position_embeddings=9)
    assert "max_position_embeddings (9 and 512)" in refuse(family, other, tmp_path / "out")
    folders = [family[0], family[1], other]
    run_merge(recipe_of(folders), tmp_path / "out", allow=["max_position_embeddings"])
    same = write_folder(tmp_path / "same", tensors_of(family[1]), torch_dtype="bfloat16", use_cache=False)
    run_merge(recipe_of([family[0], family[1], same]), tmp_path / "more")


def test_other_tokenizers_are_refused(family: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(family[1], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refuse(family, other, tmp_path / "out")
    assert "different tokenizers" in message and "'a'" in message and "'b'" in message
    tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer["added_tokens"][0]["content"] = "<other>"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "'<other>' (id 256 and missing)" in refuse(family, other, tmp_path / "out")


def test_broken_inputs_are_named(family: list[Path], tmp_path: Path) -> None:
    broken = shutil.copytree(family[1], tmp_path / "broken")
    file = broken / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="truncated"):
        HFFolder(broken)
    file.write_bytes(data[:20])
    with pytest.raises(ValueError, match="torn"):
        HFFolder(broken)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint that can be read"):
        run_merge(recipe_of([family[0], broken]), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no"):
        run_merge(recipe_of([family[0], tmp_path / "nowhere"]), tmp_path / "out")
    part = write_folder(tmp_path / "part", tensors_of(family[1]), num_shards=3)
    (part / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        run_merge(recipe_of([family[0], part]), tmp_path / "out")


# ---- report -----------------------------------------------------------------------------------------------


def test_distances_equal_the_reference(family: list[Path], tmp_path: Path) -> None:
    found = branch_distances(family[0], family[1:3], threads=2)
    base, first, second = (
        {n: t.double().numpy() for n, t in tensors_of(folder).items()} for folder in family[:3]
    )
    rows = {row.layer: row for row in found.layers}
    assert [row.layer for row in found.layers] == [
        *("embed_tokens", "layers.0", "layers.1", "layers.2", "lm_head", "norm", "all")
    ]
    for label, part in {"layers.1": ".layers.1.", "embed_tokens": "embed", "all": ""}.items():
        names = [n for n in base if part in n]
        expected = reference.distances(*({n: m[n] for n in names} for m in (base, first, second)))
        np.testing.assert_allclose(rows[label].moved, expected["moved"], rtol=1e-12)
        np.testing.assert_allclose(rows[label].cosines, [expected["cosine"]], rtol=1e-9, atol=1e-12)
        assert rows[label].num_elements == sum(base[n].size for n in names)
    legend, _, *text = found.to_text().splitlines()
    assert str(family[0]) in legend
    assert len({len(line) for line in text}) == 1
    assert len(found.to_markdown().splitlines()) == len(text) + 3
    paths = found.write(tmp_path / "report" / "distances")
    assert paths[2].read_bytes().startswith(b"\x89PNG") and paths[2].stat().st_size > 10_000
    content = json.loads(paths[1].read_text())
    assert content["layers"][1]["moved"]["branch0"] == pytest.approx(rows["layers.0"].moved[0])


def test_a_branch_that_did_not_move_has_no_direction(family: list[Path]) -> None:
    found = branch_distances(family[0], [family[0], family[1]], labels=["still", "moved"])
    assert all(row.moved[0] == 0 for row in found.layers)
    content = json.loads(found.to_json())
    assert all(layer["cosine"] == {"still·moved": None} for layer in content["layers"])
    assert content["base"] == str(family[0])
    assert "nan" not in found.to_text() and "nan" not in found.to_markdown()
    assert all(line.endswith("  -") for line in found.to_text().splitlines()[3:])


# ---- command line -----------------------------------------------------------------------------------------


def test_the_command_merges_and_reports(
    family: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = main(
        [
            *("merge", str(family[1]), str(family[2]), "--base", str(family[0]), "--out", str(out)),
            *("--weights", "0.25,0.75", "--report"),
        ]
    )
    assert status == 0
    said = capsys.readouterr().out
    assert "wrote" in said and "layers.2" in said and "cos branch0·branch1" in said
    assert (out / "merge_report.png").is_file()
    name = "model.norm.weight"
    expected = 0.25 * tensors_of(family[1])[name].double() + 0.75 * tensors_of(family[2])[name].double()
    assert torch.equal(tensors_of(out)[name], expected.float())


def test_the_command_refuses_in_one_line(
    family: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(family[1]), str(tmp_path / "none"), "--out", str(tmp_path / "out")], "there is no"),
        ([str(family[1]), str(family[2])], "--out is missing"),
        ([str(family[1]), "--out", str(tmp_path / "out"), "--report"], "give it with --base"),
    ):
        assert main(["merge", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    assert main(["merge", str(family[1]), "--out", str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_tool_under_torchrun(family: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(family, "ties")
    run_merge(recipe, tmp_path / "one", shard_bytes=60_000)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("tools/merge_branches.py", *map(str, family[1:]), "--base", str(family[0]), "--method", "ties"),
        *("--weights", "0.4,0.4,0.4", "--density", "0.6", "--shard-size", "60000"),
        *("--out", str(tmp_path / "two")),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
