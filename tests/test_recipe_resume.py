"""Recipes with a memory of their own go on as if they had not stopped, and at other layouts alike.

Uni-OPD draws at random what it leaves out; OPCoD draws solutions, asks peers and averages its teacher's
weights; ``loss.balance=drift`` remembers the first step. Whole runs: minutes on two cores.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from copd_megatron.checkpoint.compare import NOT_COMPARED, compare_runs, metrics_of
from copd_megatron.checkpoint.manifest import step_folder
from tests.support.checkpoint_runs import log_of, prepare, train, write_config
from tests.support.models import warm_up

pytestmark = pytest.mark.slow

UNI_OPD = [
    *("opd.calibration.margin=shift", "opd.calibration.margin_target=0.4", "opd.calibration.balance=1"),
    *("opd.calibration.max_gap=8", "loss.balance=drift", "opd.teacher_mode=live", "native.weight=0.5"),
]
OPCOD = [
    "opd.topology=custom",
    "opd.edges=[{student: alpha, teacher: alpha, context: own_correct, peer: beta},"
    "{student: beta, teacher: beta, context: own_correct, peer: alpha}]",
    *("opd.objective=topk", "opd.distribution.support=student", "opd.distribution.divergence=jsd"),
    *("opd.teacher_mode=ema", "opd.feedback.require_concept=false", "opd.feedback.gate_pass_rate=0"),
    *("opd.feedback.max_new_tokens=6", "opd.num_prompts_per_step=4"),
]
RECIPES = {"uni_opd": UNI_OPD, "opcod": OPCOD}
COMMON = ["schedule.cycles=1", "schedule.rlvr_steps=1", "schedule.opd_steps=3", "evaluation.every_steps=0"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe_resume")
    prepare(root)
    shutil.copytree(root / "base", root / "other")
    warm_up(root / "other", [("What is six plus one?", "7")], steps=20)
    return root


def _run(config: Path, run_dir: Path, settings: list[str]) -> None:
    assert train(config, run_dir, [*COMMON, *settings]) == 0, log_of(run_dir).read_text()[-4000:]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_on_to_the_same_numbers(material: Path, name: str) -> None:
    config = write_config(material, {"alpha": {}, "beta": {}})
    whole, halved = material / f"{name}_whole", material / f"{name}_halved"
    _run(config, whole, RECIPES[name])
    (halved / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(whole, 2), step_folder(halved, 2))
    shutil.copyfile(whole / "metrics.jsonl", halved / "metrics.jsonl")
    _run(config, halved, RECIPES[name])
    assert f"resumed from {step_folder(halved, 2)}" in log_of(halved).read_text()
    assert compare_runs(whole, halved) == []


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "data_parallel_size"])
def test_a_recipe_does_not_depend_on_the_layout(material: Path, name: str, layout: str) -> None:
    """One step of distillation between two models; sampling is repeated token by token at both layouts."""
    settings = [*RECIPES[name], "schedule.rlvr_steps=0", "schedule.opd_steps=1", "loss.kl_coefficient=0"]
    settings += [f"branches.beta.model_path={material / 'other'}"]  # of equal models nothing would be learned
    settings += ["native.weight=0", "optimizer.lr_warmup_steps=0"]
    # Adam's first step makes a whole step of gradients that are rounding: nothing after it can be compared
    settings += ["training.num_mini_batches=1"]
    one = material / f"{name}_{layout}_one"
    two = material / f"{name}_{layout}_two"
    _run(write_config(material, {"alpha": {}, "beta": {}}), one, settings)
    _run(write_config(material, {"alpha": {layout: 2}, "beta": {}}), two, settings)
    (expected,), (found,) = metrics_of(one), metrics_of(two)
    numbers = [name for name, value in expected.items() if isinstance(value, int | float)]
    names = [n for n in numbers if not any(part in f"/{n}" for part in NOT_COMPARED) and "bytes" not in n]
    assert len(names) > 20
    assert expected["alpha/train/grad_norm"] > 0.1
    assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-4, abs=1e-5)
