"""Merge recipes: YAML in mergekit's manner, plain flags, patterns, gradients, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from copd_megatron.cli import merge
from copd_megatron.cli.parameters import Size
from copd_megatron.config import ConfigError
from copd_megatron.merge.flags import recipe_from
from copd_megatron.merge.recipe import METHODS, MergeRecipe, layer_depths, layer_label, read_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs" / "merge").glob("*.yaml"))


def write(tmp_path: Path, **recipe: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def two(**parameters: Any) -> list[dict[str, Any]]:
    return [{"model": "a", "parameters": parameters}, {"model": "b", "parameters": parameters}]


def from_flags(*flags: str) -> MergeRecipe:
    context = merge.command.make_context("merge", [*flags, "--out", "x"])
    return recipe_from(merge.flags_of(context.params))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_reads(path: Path) -> None:
    recipe = read_recipe(path)
    found = recipe.resolve("model.layers.1.mlp.up_proj.weight", 0.5)
    assert len(found.weights) == len(recipe.models)


def test_there_are_shipped_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"mean", "ties", "per_layer"}


def test_the_first_fitting_filter_decides_and_a_model_goes_before_the_rest(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        merge_method="ties",
        base_model="base",
        models=[
            {
                "model": "a",
                "parameters": {
                    "weight": [
                        {"filter": "mlp", "value": 0.1},
                        {"filter": "*.q_proj.*", "value": 0.2},
                        {"filter": "re:layers\\.[23]\\.", "value": 0.3},
                        {"value": 0.4},
                    ],
                    "density": [{"filter": "norm", "value": 1.0}],
                },
            },
            {"model": "b"},
        ],
        parameters={"weight": "5e-1", "density": [{"filter": "*", "value": 0.6}], "lambda": 2},
    )
    recipe = read_recipe(path)

    def weights(name: str) -> tuple[float, ...]:
        return recipe.resolve(name, 0.0).weights

    assert weights("model.layers.2.mlp.up_proj.weight") == (0.1, 0.5)
    assert weights("model.layers.2.self_attn.q_proj.weight") == (0.2, 0.5)
    assert weights("model.layers.3.self_attn.k_proj.weight") == (0.3, 0.5)
    assert weights("model.layers.4.self_attn.k_proj.weight") == (0.4, 0.5)
    assert recipe.resolve("model.norm.weight", 0.0).densities == (1.0, 0.6)
    assert recipe.resolve("lm_head.weight", 0.0).densities == (0.6, 0.6)
    assert recipe.resolve("lm_head.weight", 0.0).shared == {
        "lambda": 2.0,
        "normalize": True,
        "rescale": False,
    }


def test_gradients_run_over_the_layers(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(
            tmp_path,
            merge_method="slerp",
            base_model="a",
            models=[{"model": "a"}, {"model": "b"}],
            parameters={"t": [0, 1, 0.5]},
        )
    )
    assert [recipe.resolve("x", depth).shared["t"] for depth in (0, 0.25, 0.5, 0.75, 1)] == [
        0,
        0.5,
        1,
        0.75,
        0.5,
    ]


def test_depths_and_labels() -> None:
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(5)),
        "model.visual.blocks.0.norm.weight",
        "lm_head.weight",
    ]
    assert list(layer_depths(names).values()) == [0, 0, 0.25, 0.5, 0.75, 1, 1, 0]
    labels = [layer_label(name) for name in names]
    assert labels[:3] == ["embed_tokens", "layers.0", "layers.1"]
    assert labels[-2:] == ["visual.blocks.0", "lm_head"]
    assert layer_label("model.language_model.layers.7.mlp.up_proj.weight") == "layers.7"


def test_the_base_may_stand_among_the_models(tmp_path: Path) -> None:
    """mergekit allows it; the base has no task vector of its own."""
    models = [{"model": "base"}, *two(weight=1.0)]
    recipe = read_recipe(write(tmp_path, merge_method="ties", base_model="base", models=models))
    assert [model.path for model in recipe.models] == ["a", "b"]
    assert recipe.inputs == ("base", "a", "b")


def test_linear_averages_a_base_only_when_it_is_listed(tmp_path: Path) -> None:
    models = [{"model": "base", "parameters": {"weight": 1.0}}, *two(weight=1.0)]
    recipe = read_recipe(write(tmp_path, merge_method="linear", base_model="base", models=models))
    assert recipe.inputs == ("base", "a", "b")
    with pytest.raises(ConfigError, match="list it under models"):
        read_recipe(write(tmp_path, merge_method="linear", base_model="base", models=two(weight=1.0)))


GOOD: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "models": two(weight=1.0)}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"merge_metod": "ties"}, r"unknown key 'merge_metod'; did you mean 'merge_method'\?"),
    ({"merge_method": "tees"}, r"unknown key 'merge_method\.tees'; did you mean 'merge_method\.ties'\?"),
    ({"merge_method": None}, "unknown key"),
    ({"slices": []}, "slices: not offered here"),
    ({"chat_template": "auto"}, "template of tokenizer_source"),
    ({"base_model": None}, "ties needs one"),
    ({"models": []}, "a list of entries"),
    ({"models": ["a"]}, "mapping with model and parameters"),
    ({"models": [{"modle": "a"}]}, r"did you mean 'models\[0\]\.model'"),
    ({"models": [{"parameters": {}}]}, r"models\[0\]\.model is missing"),
    ({"models": two(wieght=1.0)}, r"did you mean 'models\[0\]\.parameters\.weight'"),
    ({"models": two(weight=1.0, normalize=True)}, "move it to parameters"),
    ({"parameters": {"lamda": 1.0}}, r"did you mean 'parameters\.lambda'"),
    ({"parameters": {"t": 1.0}}, r"unknown key 'parameters\.t'"),
    ({"parameters": {"density": 1.5}}, "not in 0 .. 1"),
    ({"parameters": {"density": -0.1}}, "not in 0 .. 1"),
    ({"parameters": {"density": [0.5, 2]}}, "not in 0 .. 1"),
    ({"parameters": {"density": [{"filter": "mlp", "value": 7}]}}, r"density\[0\]\.value: .* not in 0 .. 1"),
    ({"parameters": {"density": "half"}}, "not a number"),
    ({"parameters": {"lambda": float("inf")}}, "finite"),
    ({"parameters": {"lambda": float("nan")}}, "finite"),
    ({"parameters": {"lambda": 10**400}}, "a number or date of 401 characters"),
    ({"models": two(weight=float("nan"))}, r"models\[0\]\.parameters\.weight: nan is not a finite"),
    ({"models": two(weight=[1, float("inf")])}, "finite"),
    ({"models": two(weight=True)}, "finite"),
    *(
        (
            {"merge_method": "slerp", "models": two()[:1], "parameters": {"t": t}},
            r"parameters\.t.* 0 \.\. 1, the way",
        )
        for t in (5, -0.1, 1.0001, [0.2, 1.5], [{"filter": "mlp", "value": 2}, {"value": 0.5}])
    ),
    ({"parameters": {"density": float("nan")}}, "finite"),
    ({"parameters": {"normalize": 1}}, "not true or false"),
    ({"parameters": {"density": []}}, "no number"),
    ({"parameters": {"density": [{"filter": "re:(", "value": 1}]}}, "not a regular expression"),
    ({"parameters": {"density": [{"fliter": "a", "value": 1}]}}, r"did you mean '\[0\]\.filter'"),
    ({"parameters": {"density": [{"filter": "a"}]}}, "value is missing"),
    ({"parameters": 3}, "a mapping is needed"),
    ({"dtype": "fp32"}, "none of float64, float32"),
    (
        {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}]},
        "one other model",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=lambda value: str(value)[:40])
def test_broken_recipes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_recipe(write(tmp_path, **{**GOOD, **change}))
    assert "recipe.yaml" in str(raised.value)


def test_a_good_recipe_is_not_refused(tmp_path: Path) -> None:
    read_recipe(write(tmp_path, **GOOD))


def test_what_is_not_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("models: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(path)
    path.write_text("- a")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        read_recipe(path)
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.yaml")


def test_a_parameter_without_a_value_is_named(tmp_path: Path) -> None:
    models = two(weight=[{"filter": "mlp", "value": 1.0}])
    recipe = read_recipe(write(tmp_path, merge_method="ties", base_model="base", models=models))
    with pytest.raises(ConfigError, match=r"needs a weight for lm_head\.weight"):
        recipe.resolve("lm_head.weight", 0.0)


def test_tokenizer_source_is_one_of_the_inputs(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, **GOOD, tokenizer_source="b")).companion_index() == 2
    assert read_recipe(write(tmp_path, **GOOD, tokenizer_source="union")).companion_index() == 0
    with pytest.raises(ConfigError, match="none of the inputs"):
        read_recipe(write(tmp_path, **GOOD, tokenizer_source="c")).companion_index()


# ---- flags ----------------------------------------------------------------------------------------------


def test_flags_without_a_method_give_the_uniform_mean() -> None:
    recipe = from_flags("a", "b", "c")
    assert recipe.method == "linear"
    found = recipe.resolve("x", 0.0)
    assert found.weights == (1.0, 1.0, 1.0)
    assert found.shared["normalize"] is True


def test_task_arithmetic_by_flags_is_the_mean_of_the_task_vectors() -> None:
    recipe = from_flags("a", "b", "--base", "z", "--method", "task_arithmetic")
    assert recipe.resolve("x", 0.0).weights == (0.5, 0.5)
    assert recipe.inputs == ("z", "a", "b")


def test_flags_with_patterns() -> None:
    recipe = from_flags(
        *("a", "b", "--base", "z", "--method", "ties"),
        *("--weights", "*.mlp.*=0.9,0.1", "--weights", "re:layers\\.0\\.=0.2,0.8", "--weights", "0.5,0.5"),
        *("--density", "embed=1", "--density", "0.3,0.4", "--lambda", "0.5", "--no-normalize"),
    )
    mlp = recipe.resolve("model.layers.0.mlp.up_proj.weight", 0.0)
    assert mlp.weights == (0.9, 0.1)
    assert mlp.densities == (0.3, 0.4)
    assert mlp.shared == {"lambda": 0.5, "normalize": False, "rescale": False}
    assert recipe.resolve("model.layers.0.input_layernorm.weight", 0.0).weights == (0.2, 0.8)
    assert recipe.resolve("model.embed_tokens.weight", 0.0).densities == (1.0, 1.0)


def test_slerp_by_flags() -> None:
    recipe = from_flags("a", "b", "--method", "slerp", "--t", "0.3")
    assert recipe.inputs == ("a", "b")
    assert recipe.resolve("x", 0.0).shared == {"t": 0.3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a", "b", "--method", "ties"), "needs --base"),
        (("a", "b", "--weights", "1"), "1 numbers for 2 models"),
        (("a", "b", "--weights", "x,y"), "is not a list of numbers"),
        (("a", "b", "--method", "weighted"), "needs --weights"),
        (("a", "b", "--t", "0.5"), r"unknown key 'parameters\.t'"),
        (("a", "b", "--density", "0.5"), r"unknown key 'models\[0\]\.parameters\.density'"),
        (("a", "b", "--method", "slerp", "--weights", "1,1"), "takes --t"),
        (("recipe.yaml", "--method", "ties"), "the recipe recipe.yaml says how to merge"),
        (("a", "b", "--seed", "3"), "--seed: linear draws nothing at random"),
        (("a", "b", "--base", "c", "--method", "ties", "--seed", "0"), "--seed: ties draws nothing"),
        (("a", "b", "--verify"), "--verify compares joint checkpoints .* and no input is one"),
        (("recipe.yaml", "--tokenizer-source", "a"), "--tokenizer-source: the recipe recipe.yaml says"),
        (("a", "b", "--weights", "nan,1"), r"models\[0\]\.parameters\.weight.* nan is not a finite number"),
        (("a", "b", "--weights", "1,1e999"), r"models\[1\]\.parameters\.weight.* inf is not a finite number"),
        (
            ("a", "b", "--base", "c", "--method", "ties", "--density", "5"),
            "5.0 is not in 0 .. 1",
        ),
    ],
)
def test_flags_that_cannot_be(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flags(*flags)


@pytest.mark.parametrize(
    ("text", "size"),
    [("100", 100), ("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5K", 1500), ("3 MiB", 3 * 2**20)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GB", "5X", "-1G", "0", "infG", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a size|is not above 0"):
        merge.command.make_context("merge", ["a", "--out", "x", "--shard-size", text])


def test_recipes_need_no_torch() -> None:
    code = "import sys, copd_megatron.cli.merge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_method_is_merged_by_the_engine() -> None:
    import torch

    from copd_megatron.hf.tensors import TensorSpec
    from copd_megatron.merge.methods import Settings, start

    for method in METHODS:
        start(method, TensorSpec("x", (2,), torch.float32), Settings(weights=(1.0,), densities=(0.5,)))
