"""Every recipe of the papers is a configuration: what it describes, and what it does on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.config import load_config, validate
from copd_megatron.config.graph import build_graph
from copd_megatron.config.schema import Config, Margin, TeacherMode
from tests.support.checkpoint_runs import BRANCHES, prepare
from tests.support.warm_runs import train_warm

FOLDER = Path(__file__).resolve().parents[1] / "configs/recipes"
RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))

EDGES = {
    "expert": [],
    "expert_running_sums": [],
    "mixed": [],
    "static_opd": ["addition<-running_sums"],
    "static_opd_running_sums": ["running_sums<-addition"],
    "mopd": ["student<-addition", "student<-running_sums"],
    "copd_one_way": ["addition<-running_sums"],
    "copd_no_merge": ["addition<-running_sums", "running_sums<-addition"],
    "copd_reliable_teachers": ["addition<-running_sums", "running_sums<-addition"],
    "copd_topk": ["addition<-running_sums", "running_sums<-addition"],
    "copd_all_to_all": [
        *("text<-image", "text<-video", "image<-text", "image<-video", "video<-text", "video<-image"),
    ],
    "copd_four_branches": [
        *("text<-image", "text<-video", "text<-generalist"),
        *("image<-text", "video<-text", "generalist<-text"),
    ],
    "uni_opd": ["addition<-running_sums"],
    "uni_opd_multi_teacher": ["student<-addition", "student<-running_sums"],
    "uni_opd_cross_modal": ["image<-text"],
    "opcod": ["addition<-addition", "running_sums<-running_sums"],
    "sdpo": ["addition<-addition"],
    "qwen3_vl_4b/mixed": [],
    "qwen3_vl_4b/static_opd": ["text<-image"],
    "qwen3_vl_4b/mopd": ["student<-text", "student<-image"],
    "qwen3_vl_4b/uni_opd_multi_teacher": ["student<-text", "student<-image"],
    "qwen3_vl_4b/strong_to_weak": ["text<-image"],
    "qwen3_vl_4b/opcod": ["text<-text", "image<-image"],
}


def _load(name: str, *settings: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", settings)


def test_every_recipe_is_listed() -> None:
    assert sorted(EDGES) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_graph_and_a_schedule(name: str) -> None:
    config = _load(name)
    validate(config, None, None)
    assert [edge.name for edge in build_graph(config).edges] == EDGES[name]
    assert config.run.name.startswith(Path(name).name.split("_")[0]), (
        "runs of recipes have folders of their own"
    )


@pytest.mark.parametrize("name", [name for name in RECIPES if "opd" in Path(name).name.split("_")[:2]])
def test_distillation_alone_has_no_native_rows_and_no_rewards_phase(name: str) -> None:
    config = _load(name)
    pure = "cross_modal" not in name
    assert (config.native.weight == 0 and config.schedule.rlvr_steps == 0) is pure
    students = {edge.student for edge in build_graph(config).edges}
    assert all(branch.frozen or branch_name in students for branch_name, branch in config.branches.items())


def test_uni_opd_calibrates_and_opcod_averages_its_teacher() -> None:
    for name in ("uni_opd", "uni_opd_multi_teacher", "qwen3_vl_4b/uni_opd_multi_teacher"):
        calibration = _load(name).opd.calibration
        assert (calibration.margin, calibration.margin_target) == (Margin.shift, 0.4)
        assert (calibration.balance, calibration.max_gap) == (1.0, 10.0)
    for name in ("opcod", "sdpo", "qwen3_vl_4b/opcod"):
        assert _load(name).opd.teacher_mode is TeacherMode.ema


# --- on real ranks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    prepare(root)
    return root


_SMALL = [
    *("model.max_sequence_tokens=192", "training.micro_batch_tokens=700", "evaluation.max_prompts=4"),
    *("logging.console=false", "opd.num_prompts_per_step=3", "opd.behaviour.num_states=16"),
]


def _run(root: Path, name: str, *settings: str) -> list[dict[str, float]]:
    """A few steps of a recipe on the tests' two domains; its metrics."""
    config = _load(name)
    data = dict(zip(("addition", "running_sums"), BRANCHES, strict=True))
    overrides = [f"model.path={root / 'base'}", *_SMALL, *settings]
    for branch, section in config.branches.items():
        overrides += [
            f"branches.{branch}.rollout.max_new_tokens=8",
            f"branches.{branch}.rollout.cpu_kv_cache_gib=0.05",
            f"branches.{branch}.num_prompts_per_step=4",
            f"branches.{branch}.num_generations_per_prompt=4",
            f"branches.{branch}.data.max_prompt_tokens=160",
            f"branches.{branch}.parallel.tensor_model_parallel_size=1",
            f"branches.{branch}.reward.verifiers=[numeric,reasoning_gym]",
        ]
        if section.model_path:
            overrides.append(f"branches.{branch}.model_path={root / 'base'}")
        for pool in section.data.pools:
            shards = root / "data" / f"{data[pool]}-train-*.tar"
            overrides.append(f"branches.{branch}.data.pools.{pool}.train=[{shards}]")
            overrides.append(f"branches.{branch}.data.pools.{pool}.validation=[]")
        if branch in data:
            overrides.append(f"branches.{branch}.data.train=[{root / 'data' / data[branch]}-train-*.tar]")
            overrides.append(f"branches.{branch}.data.validation=[]")
    own_name = [s.removeprefix("run.name=") for s in settings if s.startswith("run.name=")]
    run_dir = root / "runs" / (own_name[0] if own_name else name)
    run_dir.parent.mkdir(exist_ok=True)
    run = train_warm(FOLDER / f"{name}.yaml", f"run.dir={run_dir}", *overrides)
    assert run.status == 0, run.output[-4000:]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_peers_and_privileged_teachers(material: Path) -> None:
    """OPCoD, and in the same run a cross edge that is gated, calibrated and compares distributions: what each
    adds is there, and nothing trains on native rows."""
    edges = [
        "{student: addition, teacher: addition, context: own_correct, peer: running_sums}",
        "{student: running_sums, teacher: running_sums, context: own_correct, objective: full}",
        "{student: addition, teacher: running_sums, objective: sampled_token}",
    ]
    steps = _run(
        material,
        "opcod",
        f"opd.edges=[{', '.join(edges)}]",
        *("opd.feedback.require_concept=false", "opd.feedback.gate_pass_rate=0"),
        *("opd.feedback.max_new_tokens=6", "opd.distribution.top_k=20", "schedule.opd_steps=2"),
        *("opd.gate.scope=prompt", "opd.gate.margin=-1", "opd.calibration.balance=1"),
        *("opd.calibration.max_gap=8", "loss.balance=share", "opd.num_prompts_per_step=4"),
    )
    assert len(steps) == 2
    for step in steps:
        assert "addition/train/reward" not in step, "no native prompts are sampled"
        assert step["copd/gate_open/addition<-addition"] == 1.0, "every pass rate reaches 0"
        assert step["copd/gate_open/addition<-running_sums"] > 0
        assert 0 <= step["copd/feedback_kept/addition<-addition"] <= 1
        assert step["copd/router_bytes/addition<-running_sums"] > 0
        assert "copd/router_bytes/addition<-addition" not in step, "nothing of it crosses"
        shares = {k: v for k, v in step.items() if k.startswith("addition/train/advantage_share/")}
        assert set(shares) == {
            f"addition/train/advantage_share/cross/{t}" for t in ("addition", "running_sums")
        }
    told = [step["copd/privileged_fraction/addition<-addition"] for step in steps]
    assert max(told) > 0, "somebody had more to read"
    assert any(step["addition/train/divergence"] > 0 for step in steps)
    gaps = [step.get("copd/teacher_gap/addition<-addition", 0.0) for step in steps]
    assert max(abs(gap) for gap in gaps) > 1e-3, "the teacher read something else than the student"


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize(
    "name",
    ["static_opd", "mopd", "mixed", "copd_one_way", "copd_reliable_teachers", "copd_topk", "uni_opd", "sdpo"],
)
def test_a_recipe_runs_for_some_steps(material: Path, name: str) -> None:
    config = _load(name)
    settings = ["schedule.cycles=1"]
    settings += [f"schedule.rlvr_steps={min(1, config.schedule.rlvr_steps)}"]
    settings += [f"schedule.opd_steps={min(2, config.schedule.opd_steps)}"]
    steps = _run(material, name, *settings)
    expected: dict[str, Any] = {
        "static_opd": lambda s: "addition/train/reward" not in s and "running_sums/train/loss" not in s,
        "mopd": lambda s: (
            {k for k in s if k.startswith("student/train/advantage_share/")}
            == {f"student/train/advantage_share/cross/{t}" for t in ("addition", "running_sums")}
        ),
        "mixed": lambda s: "mixed/train/reward/addition" in s and "mixed/train/reward/running_sums" in s,
        "copd_one_way": lambda s: "running_sums/train/advantage_share/cross/addition" not in s,
        "copd_reliable_teachers": lambda s: 0 <= s["copd/gate_open/addition<-running_sums"] <= 1,
        "copd_topk": lambda s: s["addition/train/divergence"] >= 0,
        "uni_opd": lambda s: 0 <= s["copd/masked_fraction/addition<-running_sums"] <= 1,
        "sdpo": lambda s: 0 <= s["copd/privileged_fraction/addition<-addition"] <= 1,
    }
    assert expected[name](steps[-1]), steps[-1]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["topk", "full"])
def test_a_teacher_equal_to_its_student_has_no_divergence(material: Path, objective: str) -> None:
    """Through vLLM, Megatron and the router, from one base: rounding at most."""
    settings = [
        *("schedule.cycles=1", "schedule.rlvr_steps=0", "schedule.opd_steps=1", "native.weight=0"),
        *(f"opd.objective={objective}", f"run.name=equal_{objective}", "opd.distribution.top_k=8"),
    ]
    (first,) = _run(material, "copd_topk", *settings)
    for branch in ("addition", "running_sums"):
        assert abs(first[f"{branch}/train/divergence"]) < 1e-5
        assert first[f"{branch}/train/grad_norm"] < 1e-2
