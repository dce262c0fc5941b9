"""Our merges against real mergekit's, on the same folders: it is installed into an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from copd_megatron.merge import methods, sparsify
from copd_megatron.merge.engine import run_merge
from copd_megatron.merge.recipe import layer_depths, read_recipe
from tests.support.merge_folders import make_family, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".cache" / "mergekit-venv"
MERGEKIT = "mergekit==0.1.5"


def _uv() -> str | None:
    candidates = [shutil.which("uv"), str(Path(sys.executable).parent / "uv")]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    found = sorted((Path.home() / ".pyenv" / "versions").glob("*/bin/uv"))
    return str(found[-1]) if found else None


_SERVER = """
import json, sys
from mergekit.scripts.run_yaml import main
for line in sys.stdin:
    try:
        main(json.loads(line), standalone_mode=False)
        answer = None
    except Exception as error:
        answer = repr(error)
    print("answer " + json.dumps(answer), flush=True)
"""


class Mergekit:
    """A process that runs ``mergekit-yaml`` command lines one after the other: its imports take long."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(VENV / "bin" / "python"), "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def run(self, recipe: Path, out: Path, *, seed: int) -> None:
        """``mergekit-yaml recipe out``; fails the test when mergekit does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        options = ["--quiet", "--no-write-model-card", "--random-seed", str(seed)]
        self._process.stdin.write(json.dumps([str(recipe), str(out), *options]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                assert answer is None, f"mergekit: {answer}"
                return
        raise AssertionError(f"mergekit ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def mergekit() -> Iterator[Mergekit]:
    """mergekit in its environment; installed on first use and kept."""
    if not (VENV / "bin" / "mergekit-yaml").is_file():
        _install()
    server = Mergekit()
    yield server
    server.close()


def _install() -> None:
    uv = _uv()
    if uv is None:
        pytest.skip("mergekit's environment needs uv, which is not here")
    for step in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(VENV)],
        [uv, "pip", "install", "--quiet", "--python", str(VENV / "bin" / "python"), MERGEKIT],
    ):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            pytest.skip(f"{MERGEKIT} cannot be installed here: {done.stderr.strip()[-300:]}")


Merge = Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]


@pytest.fixture
def both(mergekit: Mergekit, tmp_path: Path) -> Merge:
    """Merges by one YAML file with ours and with theirs; returns (ours, theirs)."""

    def merge(recipe: dict[str, Any], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        mergekit.run(path, tmp_path / "theirs", seed=seed)
        run_merge(read_recipe(path), tmp_path / "ours", shard_bytes=100_000, overwrite=True)
        ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
            n: (t.shape, t.dtype) for n, t in theirs.items()
        }
        return ours, theirs

    return merge


def recipe_of(
    folders: list[Path], method: str, per_model: list[dict[str, Any]], **top: Any
) -> dict[str, Any]:
    entries = [
        {"model": str(folder), "parameters": parameters} if parameters else {"model": str(folder)}
        for folder, parameters in zip(folders[1:], per_model, strict=True)
    ]
    base = {} if method == "linear" else {"base_model": str(folders[0])}
    return {"merge_method": method, **base, "models": entries, **top}


def assert_equal(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    *,
    units: float,
    excused: dict[str, Tensor] | None = None,
) -> None:
    """Equal to ``units`` units in the last place of each element, those excused left out."""
    for name, tensor in ours.items():
        relative = units * torch.finfo(tensor.dtype).eps
        compared = ~excused[name] if excused else torch.ones_like(tensor, dtype=torch.bool)
        torch.testing.assert_close(
            tensor[compared].double(),
            theirs[name][compared].double(),
            rtol=relative,
            atol=relative * 0.05,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def at_threshold(folders: list[Path], recipe: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Elements whose magnitude equals the trimming threshold in some branch, with others: which of them are
    kept is a matter of the sort (mergekit's is not stable)."""
    tensors, resolved = [tensors_of(folder) for folder in folders], read_recipe(recipe)
    depths = layer_depths(list(tensors[0]))
    found = {}
    for name, base in tensors[0].items():
        found[name] = torch.zeros(base.shape, dtype=torch.bool)
        densities = resolved.resolve(name, depths[name]).densities
        for branch, density in zip(tensors[1:], densities, strict=True):
            delta = (branch[name].to(dtype) - base.to(dtype)).float()
            tied = delta.abs() == _threshold(delta, density)
            if density < 1 and tied.sum() > 1:
                found[name] |= tied
    return found


def _threshold(delta: Tensor, density: float) -> Tensor:
    count = max(1, int(density * delta.numel()))
    return delta.abs().flatten().kthvalue(delta.numel() - count + 1).values


THREE = [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.9}]
DENSE = [{"weight": 0.5, "density": 0.4}, {"weight": 0.3, "density": 0.55}, {"weight": 0.9, "density": 0.8}]

CASES: list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]] = [
    ("mean", "linear", [{"weight": 1.0}] * 3, {}),
    ("weighted", "linear", THREE, {}),
    ("sum", "linear", THREE, {"parameters": {"normalize": False}}),
    ("task_arithmetic", "task_arithmetic", THREE, {}),
    (
        "task_arithmetic_normalised",
        "task_arithmetic",
        THREE,
        {"parameters": {"normalize": True, "lambda": 0.6}},
    ),
    ("ties", "ties", DENSE, {}),
    ("ties_sum", "ties", DENSE, {"parameters": {"normalize": False, "lambda": 1.3}}),
    ("ties_rescale", "ties", DENSE, {"parameters": {"rescale": True, "int8_mask": True}}),
    (
        "ties_negative",
        "ties",
        [{"weight": 1.0, "density": 0.5}, {"weight": -0.4, "density": 0.5}, {"weight": 0.7}],
        {},
    ),
    ("slerp", "slerp", [{}], {"parameters": {"t": 0.3}}),
    (
        "slerp_by_layer",
        "slerp",
        [{}],
        {
            "parameters": {
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 1]},
                    {"filter": "mlp", "value": [1, 0]},
                    {"value": 0.5},
                ]
            }
        },
    ),
    (
        "filters",
        "ties",
        [
            {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.4}], "density": 0.7},
            {"density": [{"filter": "q_proj", "value": 0.3}]},
            {},
        ],
        {"parameters": {"weight": 0.6, "density": [{"filter": "*", "value": 0.9}], "normalize": True}},
    ),
]


@pytest.mark.parametrize(("method", "models", "top"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("types", ["float32", "bfloat16 in float32"])
def test_equal_to_the_precision_of_the_type(
    both: Merge, tmp_path: Path, method: str, models: list[dict[str, Any]], top: dict[str, Any], types: str
) -> None:
    """In float32 throughout, and bfloat16 checkpoints merged in float32 (the careful way to do it)."""
    narrow = types != "float32"
    folders = make_family(tmp_path / "m", len(models), dtype=torch.bfloat16 if narrow else torch.float32)
    recipe = recipe_of(folders, method, models, dtype="float32", **top)
    ours, theirs = both(recipe | ({"out_dtype": "bfloat16"} if narrow else {}))
    # float32: a handful of roundings in another order; bfloat16: one rounding, of values that differ by those
    excused = at_threshold(folders, tmp_path / "recipe.yaml", torch.float32) if method == "ties" else None
    assert_equal(ours, theirs, units=1 if narrow else 8, excused=excused)
    if excused:
        total = sum(t.numel() for t in ours.values())
        assert sum(int(e.sum()) for e in excused.values()) < (0.05 if narrow else 1e-4) * total


def test_trimming_keeps_as_many_where_magnitudes_tie(both: Merge, tmp_path: Path) -> None:
    """In bfloat16 hundreds share the threshold's magnitude: which ones is free, how many is not."""
    folders = make_family(tmp_path / "m", 1, dtype=torch.bfloat16)
    models = [{"weight": 1.0, "density": 0.4}]
    results = both(recipe_of(folders, "ties", models))
    base, branch = (tensors_of(folder) for folder in folders)
    for name, value in base.items():
        ours, theirs = (result[name] != value for result in results)
        moved = int(((branch[name].float() - value.float()) != 0).sum())
        assert int(ours.sum()) == int(theirs.sum()) == min(moved, max(1, int(0.4 * value.numel())))


@pytest.mark.parametrize(("method", "models"), [("linear", THREE), ("slerp", [{}])], ids=["linear", "slerp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equal_in_sixteen_bits_where_mergekit_computes_in_float32(
    both: Merge, tmp_path: Path, dtype: torch.dtype, method: str, models: list[dict[str, Any]]
) -> None:
    folders = make_family(tmp_path / "m", len(models), dtype=dtype)
    top = {"parameters": {"t": 0.3}} if method == "slerp" else {}
    ours, theirs = both(recipe_of(folders, method, models, **top))
    assert_equal(ours, theirs, units=1)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_close_in_bfloat16_where_mergekit_rounds_at_every_step(
    both: Merge, tmp_path: Path, method: str
) -> None:
    """mergekit keeps task vectors in bfloat16: its result is some roundings off the exact one, ours is one.

    In TIES, where weighted task vectors cancel, its rounding decides the sign: those elements are excused
    beside those at the threshold.
    """
    folders = make_family(tmp_path / "m", 3, dtype=torch.bfloat16)
    models = THREE if method == "task_arithmetic" else DENSE
    ours, theirs = both(recipe_of(folders, method, models))
    exact = _in_float64(folders, models)
    excused = _undecided(folders, models, tmp_path / "recipe.yaml") if method == "ties" else {}
    compared = total = 0
    for name, tensor in ours.items():
        base, *branches = (tensors_of(folder)[name].double() for folder in folders)
        largest = torch.stack([(branch - base).abs() for branch in branches]).amax(0)
        allowed = 4 * 2**-8 * torch.maximum(base.abs(), 1.7 * largest)
        difference = (tensor.double() - theirs[name].double()).abs()
        counts = ~excused[name] if excused else torch.ones_like(difference, dtype=torch.bool)
        assert not (difference > allowed)[counts].any(), name
        compared, total = compared + int(counts.sum()), total + counts.numel()
        if method == "task_arithmetic":
            mine, other = ((x[name].double() - exact[name]).abs().sum() for x in (ours, theirs))
            assert mine <= other
    assert compared > 0.9 * total


def _in_float64(folders: list[Path], models: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Task arithmetic, exactly."""
    base, *branches = ({n: t.double() for n, t in tensors_of(f).items()} for f in folders)
    return {
        n: b + sum(m["weight"] * (x[n] - b) for m, x in zip(models, branches, strict=True))
        for n, b in base.items()
    }


def _undecided(folders: list[Path], models: list[dict[str, Any]], recipe: Path) -> dict[str, Tensor]:
    """Elements at a trimming threshold, or whose weighted task vectors (nearly) cancel."""
    found = at_threshold(folders, recipe, torch.bfloat16)
    tensors = [tensors_of(folder) for folder in folders]
    for name, base in tensors[0].items():
        terms = []
        for branch, model in zip(tensors[1:], models, strict=True):
            delta = (branch[name] - base).float()
            kept = delta.abs() >= _threshold(delta, model["density"])
            terms.append(torch.where(kept, delta, 0.0) * model["weight"])
        stacked = torch.stack(terms)
        found[name] |= (stacked.sum(0).abs() <= 2**-7 * stacked.abs().sum(0)) & (stacked.abs().sum(0) > 0)
    return found


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_is_equal_under_equal_masks(
    both: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rescale: bool
) -> None:
    """mergekit draws its masks from torch's global generator, tensor after tensor by name and model after
    model; ours come from streams of their own. Given mergekit's masks, the results are the same."""
    folders = make_family(tmp_path / "m", 3, spread=0.5)
    masks: dict[tuple[str, int], Tensor] = {}
    torch.manual_seed(5)
    for name, value in sorted(tensors_of(folders[0]).items()):
        for k, model in enumerate(DENSE):
            masks[name, k] = torch.bernoulli(torch.full(value.shape, model["density"])).flatten()

    class TheirMask(sparsify.RandomMask):
        def __init__(self, density: float, *, name: str, model: int, **options: Any) -> None:
            super().__init__(density, name=name, model=model, **options)
            self._mask = masks[name, model]

        def mask(self, block: int, num_elements: int) -> Tensor:
            assert block == 0 and num_elements == self._mask.numel()
            return self._mask

    monkeypatch.setattr(methods, "RandomMask", TheirMask)
    recipe = recipe_of(
        folders, method, DENSE, parameters={"rescale": rescale, "lambda": 0.9}, dtype="float32"
    )
    ours, theirs = both(recipe, seed=5)
    assert_equal(ours, theirs, units=8)


def test_dare_is_alike_in_distribution(both: Merge, tmp_path: Path) -> None:
    """With masks of each one's own: the same share kept, the same scale, the same norm."""
    folders = make_family(tmp_path / "m", 1, spread=0.5, vocab_size=4000)
    recipe = recipe_of(folders, "dare_linear", [{"weight": 1.0, "density": 0.3}], dtype="float32")
    results = both(recipe)
    name = "model.embed_tokens.weight"
    base, branch = (tensors_of(f)[name].double() for f in folders)
    delta, count = branch - base, base.numel()
    shares, scales = [], []
    for merged in results:
        moved = merged[name].double() - base
        kept = moved.abs() > 1e-9
        shares.append(kept.double().mean().item())
        scales.append((moved[kept] / delta[kept]).median().item())
        assert moved.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)
    bound = 5 * (0.3 * 0.7 / count) ** 0.5
    assert all(abs(share - 0.3) < bound for share in shares)
    assert scales[0] == pytest.approx(scales[1], rel=0.02)


def test_configuration_and_tokenizer_are_the_same(both: Merge, tmp_path: Path) -> None:
    folders = make_family(tmp_path / "m", 2)
    both(recipe_of(folders, "ties", DENSE[:2], dtype="float32", out_dtype="bfloat16"))
    ours, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert ours["dtype"] == theirs["dtype"] == "bfloat16"
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "architectures", "rms_norm_eps"):
        assert ours[key] == theirs[key]
    tokenizers = [(tmp_path / who / "tokenizer.json").read_bytes() for who in ("ours", "theirs")]
    assert tokenizers[0] == tokenizers[1]


def test_gradients_are_placed_alike() -> None:
    """mergekit's depth of a layer is layer / (layers - 1), 0 for what stands before and after."""
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)),
        "lm_head.weight",
    ]
    assert list(layer_depths(names).values()) == [0.0, 0.0, 0.5, 1.0, 0.0]
