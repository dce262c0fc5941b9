"""What a merge must not do: write NaN, destroy what it reads or did not make, hide that it merged nothing."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from copd_megatron.checkpoint.manifest import MANIFEST
from copd_megatron.cli.main import main
from copd_megatron.cli.merge import command as merge_command
from copd_megatron.config import ConfigError
from copd_megatron.merge.check import MismatchError, NotFiniteError
from copd_megatron.merge.convert import hf_to_megatron, megatron_to_hf
from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.mean import merge_mean
from copd_megatron.merge.parameters import check_setting
from copd_megatron.merge.recipe import MergeRecipe, ModelInput, read_recipe
from copd_megatron.report.merge_distance import branch_distances
from tests.support.merge_folders import joint_checkpoint, make_family, tensors_of, write_folder

ENDS: list[tuple[float, str]] = [(float("nan"), "NaN"), (float("inf"), "infinities")]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two branches."""
    return make_family(tmp_path_factory.mktemp("family"), 2, num_hidden_layers=1)


@pytest.fixture
def folders(family: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may spoil."""
    return [shutil.copytree(folder, tmp_path / "models" / folder.name) for folder in family]


def recipe_of(models: list[Path], method: str = "linear", **options: Any) -> MergeRecipe:
    density = options.pop("density", 0.5)
    base = None if method in ("linear", "passthrough") else str(models[0])
    each: dict[str, Any] = {} if method in ("slerp", "passthrough") else {"weight": 1.0}
    if method in ("ties", "dare_linear", "dare_ties"):
        each["density"] = density
    shared = {"t": 0.5} if method == "slerp" else {}
    return MergeRecipe(
        method=method,
        base=base,
        models=tuple(
            ModelInput(path=str(m), parameters=each) for m in (models if base is None else models[1:])
        ),
        parameters=options.pop("parameters", shared),
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- numbers that are none --------------------------------------------------------------------------------


def spoil(folder: Path, value: float, name: str = "model.norm.weight") -> None:
    tensors = tensors_of(folder)
    tensors[name].view(-1)[7] = value
    write_folder(folder, tensors, num_hidden_layers=1)


@pytest.mark.parametrize(("value", "kind"), ENDS)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_model_with_nan_is_refused_by_name(
    folders: list[Path], tmp_path: Path, method: str, value: float, kind: str, threads: int
) -> None:
    spoil(folders[1], value)
    models = folders[:2] if method == "slerp" else folders
    with pytest.raises(NotFiniteError, match=rf"model\.norm\.weight of {folders[1]} holds {kind}") as raised:
        run_merge(recipe_of(models, method, density=1.0), tmp_path / "out", threads=threads)
    assert "--allow-nan" in str(raised.value)
    assert not (tmp_path / "out").exists()
    run_merge(recipe_of(models, method, density=1.0), tmp_path / "out", threads=threads, allow_nan=True)
    assert not tensors_of(tmp_path / "out")["model.norm.weight"].isfinite().all()


def test_a_result_too_large_for_its_type_is_refused(folders: list[Path], tmp_path: Path) -> None:
    spoil(folders[1], 3e38)
    with pytest.raises(NotFiniteError, match=r"model\.norm\.weight becomes too large for torch\.float16"):
        run_merge(recipe_of(folders[1:], out_dtype="float16"), tmp_path / "out")


def test_the_command_refuses_nan_unless_told_to(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folders[2], float("nan"))
    arguments = ["merge", str(folders[1]), str(folders[2]), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"model.norm.weight of {folders[2]} holds NaN" in capsys.readouterr().err
    assert main([*arguments, "--allow-nan"]) == 0
    assert tensors_of(tmp_path / "out")["model.norm.weight"].isnan().sum() == 1


def test_a_conversion_copies_nan(folders: list[Path], tmp_path: Path) -> None:
    """Bit for bit, with its payload."""
    tensors = tensors_of(folders[1])
    tensors["model.norm.weight"].view(torch.int32)[7] = 0x7FC01234
    write_folder(folders[1], tensors, num_hidden_layers=1)
    hf_to_megatron(folders[1], tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folders[1])


# ---- where a merge may write ------------------------------------------------------------------------------


def test_what_a_merge_did_not_make_stays(folders: list[Path], tmp_path: Path) -> None:
    for name in ("out.partial", "out.old", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text(name)
    (tmp_path / "out.old1").write_text("a file")
    with pytest.raises(FileExistsError, match=r"out\.partial, .* no merge made it"):
        run_merge(recipe_of(folders), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious").exists() and (tmp_path / "out.partial" / "precious").exists()
    shutil.rmtree(tmp_path / "out.partial")
    run_merge(recipe_of(folders), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.old" / "precious").read_text() == "out.old"
    assert (tmp_path / "out.old1").read_text() == "a file"
    assert {path.name for path in tmp_path.iterdir()} == {"models", "out", "out.old", "out.old1"}


def test_a_file_or_link_in_the_place_of_the_unfinished_result_stays(
    folders: list[Path], tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    partial.write_text("precious")
    with pytest.raises(FileExistsError, match="no merge made it"):
        run_merge(recipe_of(folders), tmp_path / "out")
    partial.unlink()
    (tmp_path / "elsewhere").mkdir()
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="no merge made it"):
        run_merge(recipe_of(folders), tmp_path / "out")
    partial.unlink()
    partial.mkdir()  # an empty folder is nobody's
    run_merge(recipe_of(folders), tmp_path / "out")


@pytest.mark.parametrize(
    "target", ["branch", "base", "parent", "link to the parent", "through ..", "companions"]
)
def test_what_is_read_is_not_overwritten(folders: list[Path], tmp_path: Path, target: str) -> None:
    models, recipe = tmp_path / "models", recipe_of(folders, "ties")
    (tmp_path / "link").symlink_to(tmp_path)
    if target == "companions":  # a branch in Megatron's format, whose tokenizer comes from the base
        hf_to_megatron(folders[1], tmp_path / "converted")
        checkpoint = joint_checkpoint(tmp_path, {"a": tmp_path / "converted"}, folders[0])
        recipe = recipe_of([checkpoint / "a"])
    out = {
        "branch": folders[2],
        "base": folders[0],
        "parent": models,
        "link to the parent": tmp_path / "link" / "models",
        "through ..": models / "branch0" / ".." / "branch1",
        "companions": folders[0],
    }[target]
    before = contents(models)
    with pytest.raises(ConfigError, match="overwriting it would destroy that"):
        run_merge(recipe, out, overwrite=True)
    assert contents(models) == before and not list(tmp_path.glob("**/*.partial"))


def test_a_recipe_in_the_target_is_not_overwritten(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    (out / "recipe.yaml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    assert main(["merge", str(out / "recipe.yaml"), "--out", str(out), "--overwrite"]) == 2
    assert (out / "recipe.yaml").exists()


def test_targets_that_are_no_folders_are_refused(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    for name, aim in (("link", tmp_path / "empty"), ("dangling", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(aim)
    monkeypatch.chdir(here)
    for target, message in {
        ".": "holds the working directory",
        "..": "holds the working directory",
        "../here": "holds the working directory",
        "/": "holds the working directory",
        "../link": "is a symbolic link; give what it leads to",
        "../dangling": "is a symbolic link",
        "../file": "is a file; choose another name",
        "../file/out": "file is a file; choose another folder",
        "../empty": "is there already",
    }.items():
        with pytest.raises((ConfigError, FileExistsError), match=message):
            run_merge(recipe_of(folders), Path(target), overwrite=target != "../empty")
    assert (tmp_path / "file").read_text() == "precious" and here.is_dir()


# ---- merges that merge nothing ----------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture, recipe: MergeRecipe, out: Path, **options: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_merge(recipe, out, **options)
    return "\n".join(record.getMessage() for record in caplog.records)


def test_one_model_alone(folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = said(caplog, recipe_of(folders[1:2]), tmp_path / "out")
    assert f"{folders[1]} is the only model: there is nothing to merge it with" in text
    assert f"the result equals {folders[1]}, element for element" in text


def test_a_model_given_twice(folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = said(caplog, recipe_of([folders[1], folders[1]]), tmp_path / "out")
    assert f"{folders[1]} is given 2 times, and counts as often" in text
    text = said(caplog, recipe_of([folders[0], folders[0], folders[1]], "ties"), tmp_path / "ties")
    assert f"{folders[0]} is given 2 times, and is the base too, from which it has not moved" in text


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_models_that_are_the_same(
    folders: list[Path], tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    twin = shutil.copytree(folders[0], tmp_path / "twin")
    text = said(caplog, recipe_of([folders[0], twin], method), tmp_path / "out", threads=3)
    assert f"the result equals {folders[0]}, {twin}, element for element" in text


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_a_density_of_nothing(
    folders: list[Path], tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = said(caplog, recipe_of(folders, method, density=0), tmp_path / "out", shard_bytes=60_000)
    assert f"the density of {folders[1]} is 0: nothing of it gets into the result" in text
    assert f"the result equals {folders[0]}, element for element" in text


def test_nothing_is_said_of_a_merge_that_merges(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for method in ("linear", "ties", "dare_ties"):
        assert said(caplog, recipe_of(folders, method), tmp_path / method) == ""
    assert said(caplog, recipe_of(folders[:1], "passthrough"), tmp_path / "copy") == ""


def test_equality_is_told_after_a_resume_too(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(folders[1:2])

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_merge(recipe, tmp_path / "out", shard_bytes=60_000, threads=1, progress=stop)
    assert "element for element" in said(caplog, recipe, tmp_path / "out", shard_bytes=60_000, processes=2)


def test_a_report_of_slerp_says_what_it_measures_from(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(folders[0]), str(folders[1]), "--method", "slerp"]
    assert main([*arguments, "--report", str(tmp_path / "report")]) == 0
    text = capsys.readouterr().out
    assert f"no --base: movements are measured from {folders[0]}" in text
    assert f"how far x moved from {folders[0]}" in text
    assert json.loads((tmp_path / "report.json").read_text())["base"] == str(folders[0])


# ---- what would decide nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "BASE"], "--base: linear takes the models alone and would not read"),
        (["--base", "/nowhere"], "--base: linear takes the models alone and would not read /nowhere"),
        (["--weights", "*.mpl.*=0.9,0.1", "--weights", "0.5,0.5"], "mpl.* has no effect: it fits the name"),
        (["--weights", "1,1", "--weights", "mlp=0.9,0.1"], "'mlp' has no effect: it stands"),
        (["--weights", "mlp=1,2", "--weights", "up_proj=3,4", "--weights", "1,1"], "'up_proj' has no effect"),
        (
            ["--base", "BASE", "--method", "ties", "--density", "*.nosuch.*=0.1", "--density", "0.5"],
            "the density for .* has no effect: it fits the name of no tensor",
        ),
    ],
)
def test_flags_that_would_decide_nothing_are_refused(
    folders: list[Path], tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folders[0]) if flag == "BASE" else flag for flag in flags]
    assert main(["merge", *map(str, folders[1:]), "--out", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_flags_that_decide_something_are_not_refused(folders: list[Path], tmp_path: Path) -> None:
    weights = ["--weights", "mlp=0.9,0.1", "--weights", "re:.=0.5,0.5", "--weights", "1,1"]
    report = ["--base", str(folders[0]), "--report", str(tmp_path / "report")]
    assert main(["merge", *map(str, folders[1:]), "--out", str(tmp_path / "out"), *weights, *report]) == 0


def test_what_a_recipes_file_says_of_no_tensor_is_told(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A recipe may serve several architectures."""
    weight = [{"filter": "nosuch", "value": 0.1}, {"value": 1.0}]
    models = [{"model": str(folder), "parameters": {"weight": weight}} for folder in folders[1:]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    text = said(caplog, read_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert "the weight for 'nosuch' has no effect: it fits the name of no tensor" in text
    assert main(["merge", str(tmp_path / "recipe.yaml"), "--base", str(folders[0]), "--out", "x"]) == 2


def test_chat_templates_that_differ_are_told(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folders[1] / "chat_template.jinja").write_text("{{ one }}")
    (folders[2] / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ one }}"}))
    assert said(caplog, recipe_of(folders[1:]), tmp_path / "same") == ""
    (folders[2] / "chat_template.jinja").write_text("{{ other }}")
    text = said(caplog, recipe_of(folders[1:]), tmp_path / "out")
    assert f"{folders[2]}: the chat template is another than that of {folders[1]}" in text
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ one }}"


@pytest.mark.parametrize("spoilt", [0, 2])
def test_a_report_names_what_is_not_finite(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: int
) -> None:
    spoil(folders[spoilt], float("nan"))
    with caplog.at_level(logging.WARNING):
        branch_distances(folders[0], folders[1:])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{folders[spoilt]}: 1 tensor(s) hold NaN") and "model.norm.weight for one" in line


# ---- one model as it is -----------------------------------------------------------------------------------


def test_passthrough_copies_one_model(folders: list[Path], tmp_path: Path) -> None:
    assert main(["merge", str(folders[1]), "--method", "passthrough", "--out", str(tmp_path / "out")]) == 0
    one, other = tensors_of(folders[1]), tensors_of(tmp_path / "out")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match="passthrough copies one model, here are 2"):
        recipe_of(folders[:2], "passthrough")
    with pytest.raises(ConfigError, match="knows no base"):
        MergeRecipe(method="passthrough", base="b", models=(ModelInput(path="a"),))


def test_a_stored_output_embedding_is_not_lost(folders: list[Path], tmp_path: Path) -> None:
    """Megatron's format would keep the embedding only."""
    tied = []
    for number, folder in enumerate(folders[:2]):
        options: dict[str, Any] = {"tie_word_embeddings": True, "num_hidden_layers": 1}
        tied.append(write_folder(tmp_path / str(number), tensors_of(folder), **options))
    with pytest.raises(MismatchError, match=r"0: lm_head\.weight differs .* config\.json ties them"):
        run_merge(recipe_of(tied), tmp_path / "out", output_format="megatron")
    run_merge(recipe_of(tied), tmp_path / "out")


# ---- recipes and checkpoints that are none ----------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"models: \xff\xfe",
        b"a: " + b"[" * 20_000,
        b"models: &a [*a]",
        b"merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: &w [{value: *w}]}}]",
        b"merge_method: [ties]\nmodels: [{model: a}]",
        b"merge_method: linear\nmodels: [{model: [a]}]",
        b"merge_method: linear\nmodels: [{model: a, parameters: {weight: 1" + b"0" * 400 + b"}}]",
        b"? [a]\n: b",
        b"\x00",
        b"!!python/object/apply:os.system ['true']",
    ],
)
def test_a_recipe_that_is_none_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=str(path)):
        read_recipe(path)


def test_a_mean_inside_a_run_goes_on_after_a_kill(folders: list[Path], tmp_path: Path) -> None:
    """What a killed run left under the unfinished name is known as a merge's own."""
    merge_mean(folders, tmp_path / "merged", shard_bytes=60_000)
    shutil.copytree(tmp_path / "merged", tmp_path / "merged.partial")
    with pytest.raises(FileExistsError, match="no merge made it"):
        merge_mean(folders, tmp_path / "merged")
    (tmp_path / "merged.partial" / ".merge").mkdir()
    merge_mean(folders, tmp_path / "merged")
    assert not (tmp_path / "merged.partial").exists()
    assert not (tmp_path / "merged" / MANIFEST).exists()


def test_a_base_that_only_the_report_reads_is_not_overwritten(folders: list[Path], tmp_path: Path) -> None:
    """The mean knows no base, so the merge itself would not miss it."""
    before = contents(tmp_path / "models")
    branches = [str(folders[1]), str(folders[2])]
    done = CliRunner().invoke(
        merge_command, [*branches, "--base", str(folders[0]), "--out", str(folders[0]), "--overwrite"]
    )
    assert isinstance(done.exception, ConfigError) and "would destroy that" in str(done.exception)
    assert contents(tmp_path / "models") == before


def test_a_report_replaces_reports_only(folders: list[Path], tmp_path: Path) -> None:
    branches = [str(folders[1]), str(folders[2])]
    config = folders[1] / "config.json"
    before = config.read_bytes()
    words = [*branches, "--base", str(folders[0]), "--report"]
    done = CliRunner().invoke(merge_command, [*words, str(config.with_suffix(""))])
    assert isinstance(done.exception, ConfigError) and "is no report" in str(done.exception)
    assert config.read_bytes() == before
    for _ in range(2):
        assert CliRunner().invoke(merge_command, [*words, str(tmp_path / "moved")]).exit_code == 0


def test_weights_beyond_all_numbers_make_no_model_of_zeros(folders: list[Path], tmp_path: Path) -> None:
    for method, base in (("linear", None), ("task_arithmetic", str(folders[0]))):
        models = tuple(ModelInput(path=str(f), parameters={"weight": 1e308}) for f in folders[1:3])
        recipe = MergeRecipe(method=method, models=models, base=base, parameters={"normalize": True})
        with pytest.raises(ValueError, match="sum to more than a number can be"):
            run_merge(recipe, tmp_path / method)
        assert not (tmp_path / method).exists()


@pytest.mark.parametrize(
    ("pattern", "is_taken"),
    [
        (r"layers\.[0-3]\.", True),
        (r"layers\.\d+\.mlp\..*weight", True),
        (r"^(model|visual)\.(a|b)?x", True),
        (r"[(]a*[)]+", True),
        (r"\(a\)+", True),
        (r"(a+)+$", False),
        (r"(a|a)*b", False),
        (r"((a{1,30}){1,30}){1,30}b", False),
        (r"(?:a.){9}", False),
        (".*" * 5, False),
        ("a" * 2000, False),
    ],
)
def test_no_filter_searches_for_ever(pattern: str, is_taken: bool) -> None:
    if is_taken:
        check_setting("weight", [{"filter": f"re:{pattern}", "value": 1}], "r")
        return
    with pytest.raises(ConfigError, match="may search for ever"):
        check_setting("weight", [{"filter": f"re:{pattern}", "value": 1}], "r")
