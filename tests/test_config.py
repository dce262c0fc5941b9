"""Reading settings: precedence, names, types, and the checks that span fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config import (
    Aggregation,
    ConfigError,
    Device,
    EdgeConfig,
    MismatchCorrection,
    ModelShape,
    TeacherMode,
    Topology,
    load_config,
    save_resolved,
    to_yaml,
    validate,
)
from tests.support.run_config import YAML, load, write
from tests.support.shapes import MIXTURE, SHAPE, TOWER

# --- reading -----------------------------------------------------------------------------------------------


def test_branch_defaults_fill_what_a_branch_leaves_out(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert list(config.branches) == ["text", "image"]
    text, image = config.branches["text"], config.branches["image"]
    assert (text.num_prompts_per_step, image.num_prompts_per_step) == (16, 8)
    assert (text.parallel.world_size, image.parallel.world_size) == (2, 4)
    assert text.num_generations_per_prompt == 8
    assert text.data.train == ["text.tar"]


def test_branches_share_no_mutable_parts(tmp_path: Path) -> None:
    config = load(tmp_path)
    config.branches["text"].data.train.append("more.tar")
    assert config.branches["image"].data.train == ["image.tar"]
    assert config.branches["text"].parallel is not config.branches["image"].parallel


def test_overrides_replace_scalars_lists_and_enums(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "branches.text.parallel.tensor_model_parallel_size=4",
        "branches.text.data.train=[a.tar, b.tar]",
        "opd.topology=all_to_all",
        "run.dir=null",
        "optimizer.lr=1e-4",
        "run.device=cpu",
        "model.path=/models/a=b",
        "evaluation.at_start=false",
    )
    assert config.branches["text"].parallel.tensor_model_parallel_size == 4
    assert config.branches["text"].data.train == ["a.tar", "b.tar"]
    assert config.opd.topology is Topology.all_to_all
    assert config.run.dir is None
    assert config.optimizer.lr == pytest.approx(1e-4)
    assert config.run.device is Device.cpu
    assert config.model.path == "/models/a=b"
    assert config.evaluation.at_start is False


def test_an_override_of_branch_defaults_yields_to_the_branch_itself(tmp_path: Path) -> None:
    config = load(tmp_path, "branch_defaults.num_prompts_per_step=4")
    assert config.branches["text"].num_prompts_per_step == 4
    assert config.branches["image"].num_prompts_per_step == 8


@pytest.mark.parametrize("key", ["opd.edges.0.beta", "opd.edges[0].beta"])
def test_overrides_reach_list_items(tmp_path: Path, key: str) -> None:
    config = load(tmp_path, "opd.edges=[{student: text, teacher: image}]", f"{key}=0.25")
    assert config.opd.edges == [EdgeConfig(student="text", teacher="image", beta=0.25)]


def test_a_mapping_override_merges(tmp_path: Path) -> None:
    config = load(tmp_path, "branches.text.parallel={data_parallel_size: 3}")
    assert config.branches["text"].parallel.data_parallel_size == 3
    assert config.branches["text"].parallel.tensor_model_parallel_size == 2


def test_later_overrides_win_and_interpolation_is_resolved(tmp_path: Path) -> None:
    config = load(tmp_path, "run.seed=3", "run.seed=4", "schedule.cycles=${run.seed}")
    assert (config.run.seed, config.schedule.cycles) == (4, 4)


def test_empty_sections_mean_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: {path: base}\nrun:\nbranches:\n  text:\n"), [])
    assert config.run.seed == 1
    assert config.branches["text"].num_generations_per_prompt == 8


def test_defaults_from_is_overlaid_and_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", YAML, "base.yaml")
    child = write(
        tmp_path, "defaults_from: shared/base.yaml\nschedule: {cycles: 9}\nbranches: {text: {frozen: true}}\n"
    )
    config = load_config(child, [])
    assert config.schedule.cycles == 9
    assert config.branches["text"].frozen
    assert config.branches["text"].data.train == ["text.tar"]


def test_defaults_from_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "defaults_from: b.yaml\n", "a.yaml")
    write(tmp_path, "defaults_from: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="goes in a circle"):
        load_config(tmp_path / "a.yaml", [])


def test_resolved_yaml_reads_back_to_an_equal_config(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "opd.edges=[{student: text, teacher: image, beta: 0.5}]",
        "loss.dual_clip=3",
        "opd.teacher_mode=phase_snapshot",
    )
    saved = save_resolved(config, tmp_path / "out" / "resolved.yaml")
    assert load_config(saved, []) == config
    assert "teacher_mode: phase_snapshot" in saved.read_text()
    assert "branch_defaults" not in to_yaml(config)


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(min_value=1e-12, max_value=1.0),
    seed=st.integers(min_value=0, max_value=2**53),
    # What a shell passes as one argument; YAML's own quotes keep any text a text.
    name=st.text(
        st.characters(codec="ascii", categories=("L", "N", "P", "S"), exclude_characters="$"), min_size=1
    ),
)
def test_values_survive_override_and_yaml(
    tmp_path_factory: pytest.TempPathFactory, lr: float, seed: int, name: str
) -> None:
    folder = tmp_path_factory.mktemp("config")
    quoted = "'" + name.replace("'", "''") + "'"
    config = load(folder, f"optimizer.lr={lr!r}", f"run.seed={seed}", f"model.system_prompt={quoted}")
    assert (config.optimizer.lr, config.run.seed, config.model.system_prompt) == (lr, seed, name)
    assert load_config(save_resolved(config, folder / "again.yaml"), []) == config


# --- names and types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("opd.bta=1", ["unknown key 'opd.bta'", "did you mean 'opd.beta'"]),
        ("branches.txt.frozen=true", ["unknown key 'branches.txt'", "did you mean 'branches.text'"]),
        (
            "branches.text.paralel.data_parallel_size=2",
            ["unknown key 'branches.text.paralel'", "did you mean 'branches.text.parallel'"],
        ),
        ("branch_defaults.num_promts_per_step=2", ["did you mean 'branch_defaults.num_prompts_per_step'"]),
        ("opd.edges=[{studnt: text}]", ["unknown key 'opd.edges[0].studnt'", "'opd.edges[0].student'"]),
        ("zzz=1", ["unknown key 'zzz'", "keys here:", "schedule"]),
        ("defaults_from=other.yaml", ["unknown key 'defaults_from'"]),
        ("opd.topology=ring", ["opd.topology", "'ring'", "none, hub_and_spoke, all_to_all, custom"]),
        ("schedule.cycles=many", ["schedule.cycles: 'many' is not a whole number"]),
        ("schedule.cycles=1.5", ["schedule.cycles: 1.5 is not a whole number"]),
        ("schedule.cycles=null", ["schedule.cycles: null is not a whole number"]),
        ("optimizer.lr=fast", ["optimizer.lr: 'fast' is not a number"]),
        ("loss.dual_clip=x", ["loss.dual_clip: 'x' is not a number or null"]),
        ("run.overwrite=perhaps", ["run.overwrite: 'perhaps' is not true or false"]),
        ("run.name=null", ["run.name: null is not a string", "quote it"]),
        ("branches.text.data.train=a.tar", ["branches.text.data.train: 'a.tar' is not a list"]),
        ("schedule=3", ["schedule: 3 is not a mapping"]),
        ("schedule.cycles.x=3", ["schedule.cycles is a whole number, it has no key 'x'"]),
        ("opd.edges[0].beta=1", ["opd.edges[0] does not exist", "0 item"]),
        ("opd.edges.first.beta=1", ["opd.edges is a list", "'first'"]),
        ("branches.text.data.train=[a", ["branches.text.data.train=[a", "not valid YAML"]),
        ("schedule.cycles", ["expected key=value"]),
        ("=1", ["expected key=value"]),
        ("a..b=1", ["not a dotted key"]),
        ("run.seed=${schedule.cycels}", ["schedule.cycels"]),
    ],
)
def test_a_bad_override_says_what_and_what_instead(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, override)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {path: base, pth: 2}", ["run.yaml", "unknown key 'model.pth'", "did you mean 'model.path'"]),
        ("scedule: {cycles: 2}", ["unknown key 'scedule'", "did you mean 'schedule'"]),
        ("model: {path: base}\nloss: {aggregation: mean}", ["loss.aggregation: 'mean' is not one of"]),
        ("branch_defaults: {frozn: true}", ["'branch_defaults.frozn'", "'branch_defaults.frozen'"]),
        ("run:\n  seed: 1\n   name: x\n", ["run.yaml, line 3", "not valid YAML"]),
        ("run: {seed: 1}\nrun: {seed: 2}\n", ["line 2", "duplicate key run"]),
        ("- a\n- b\n", ["expected a mapping"]),
        ("branches: {1: 2}", ["branches.1: 2 is not a mapping"]),
        ("run: {seed: 1}", ["model.path", "not set"]),
        ("defaults_from: gone.yaml", ["defaults_from: gone.yaml", "does not exist"]),
    ],
)
def test_a_bad_file_says_where_and_what(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), [])
    for part in parts:
        assert part in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        load_config(tmp_path / "gone.yaml", [])


def test_a_bad_key_in_a_parent_file_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, "schedule: {cycels: 2}\n", "parent.yaml")
    with pytest.raises(ConfigError, match=r"parent\.yaml: unknown key 'schedule\.cycels'"):
        load_config(write(tmp_path, "defaults_from: parent.yaml\n"), [])


# --- checks that span fields -------------------------------------------------------------------------------


def test_a_sound_config_passes(tmp_path: Path) -> None:
    validate(load(tmp_path), 6, SHAPE)
    validate(load(tmp_path), None, None)


def test_a_world_that_does_not_fit_says_how_many_processes_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        validate(load(tmp_path), 4, None)
    message = str(error.value)
    assert "2 (text) + 4 (image) = 6 ranks, the job has 4" in message
    assert "--nproc-per-node=6" in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["branches.text.rollout.tensor_parallel_size=3"],
            ["branches.text.rollout.tensor_parallel_size: 3", "2 ranks", "tensor 2 x pipeline 1", "[1, 2]"],
        ),
        (["branches.text.parallel.tensor_model_parallel_size=8"], ["query groups", "4", "[1, 2, 4]"]),
        (["branches.text.parallel.tensor_model_parallel_size=3"], ["attention heads, 8", "[1, 2, 4, 8]"]),
        (["branches.text.parallel.pipeline_model_parallel_size=3"], ["3 does not divide", "4 layers"]),
        (
            ["branches.text.parallel.context_parallel_size=2", "training.sequence_packing=false"],
            ["sequence_packing: false", "context_parallel_size 2"],
        ),
        (
            ["branches.text.parallel.context_parallel_size=2", "training.share_prompts=true"],
            ["share_prompts: true", "context_parallel_size 2", "null or false"],
        ),
        (
            ["training.sequence_packing=false", "training.share_prompts=true"],
            ["share_prompts: true needs packed"],
        ),
        (
            ["branches.text.parallel.expert_model_parallel_size=3"],
            ["expert_model_parallel_size: 3", "divide"],
        ),
        (
            [
                "branches.text.parallel.tensor_model_parallel_size=1",
                "branches.text.parallel.sequence_parallel=true",
            ],
            ["sequence_parallel: true", "context_parallel_size for long"],
        ),
        (
            ["branches.text.parallel.virtual_pipeline_model_parallel_size=2"],
            ["virtual_pipeline_model_parallel_size: 2", "pipeline_model_parallel_size is 1"],
        ),
        (["branches.text.parallel.data_parallel_size=0"], ["data_parallel_size: 0 must be at least 1"]),
        (["opd.hub=vidoe"], ["opd.hub", "vidoe"]),
        (
            ["opd.topology=custom", "opd.edges=[{student: text, teacher: imag}]"],
            ["opd.edges[0].teacher", "imag", "image"],
        ),
        (["opd.topology=custom", "opd.edges=[{student: text, teacher: text}]"], ["opd.edges[0]", "'text'"]),
        (
            [
                "branches.text.frozen=true",
                "opd.topology=custom",
                "opd.edges=[{student: text, teacher: image}]",
            ],
            ["opd.edges[0].student", "'text'", "frozen"],
        ),
        (["opd.topology=none"], ["opd.topology none", "schedule.opd_steps: 10", "schedule.opd_steps=0"]),
        (["opd.topology=custom"], ["opd.topology custom", "no edge"]),
        (["branch_defaults.frozen=true"], ["every branch is frozen"]),
        (["schedule.rlvr_steps=0", "schedule.opd_steps=0"], ["nothing to train"]),
        (["schedule.cycles=0"], ["schedule.cycles: 0 must be at least 1"]),
        (["loss.ratio_clip_min=1.2"], ["loss.ratio_clip_min: 1.2 must be above 0 and below 1 (default 0.2)"]),
        (["loss.ratio_clip_max=0"], ["loss.ratio_clip_max: 0", "above 0"]),
        (["loss.dual_clip=1"], ["loss.dual_clip: 1", "above 1"]),
        (["loss.constant_divisor=100"], ["loss.constant_divisor: 100", "loss.aggregation=constant"]),
        (
            ["loss.mismatch_correction=icepop", "loss.mismatch_bounds=[1.5, 2]"],
            ["loss.mismatch_bounds: [1.5, 2", "above 1"],
        ),
        (
            ["branches.text.rollout.max_new_tokens=1200"],
            ["1024 + 1200 = 2224", "model.max_sequence_tokens 2048"],
        ),
        (["training.micro_batch_tokens=100"], ["training.micro_batch_tokens: 100", "at least 2048"]),
        (["training.num_mini_batches=5"], ["training.num_mini_batches: 5", "16 x 8 = 128"]),
        (["branches.text.num_generations_per_prompt=1"], ["num_generations_per_prompt: 1", "at least 2"]),
        (["branches.text.data.train=[]"], ["branches.text.data.train: empty"]),
        (["branches.text.reward.verifiers=[]"], ["branches.text.reward.verifiers: empty"]),
        (["branches.text.rollout.top_p=1.5"], ["branches.text.rollout.top_p: 1.5", "above 0 and at most 1"]),
        (["branches.text.rollout.top_k=0"], ["branches.text.rollout.top_k: 0", "-1"]),
        (["optimizer.lr=0"], ["optimizer.lr: 0", "above 0"]),
        (["optimizer.lr=.nan"], ["optimizer.lr: nan"]),
        (["optimizer.lr_schedule=cosine", "optimizer.min_lr=1"], ["optimizer.min_lr: 1.0 is above"]),
        (["optimizer.adam_beta2=1"], ["optimizer.adam_beta2: 1"]),
        (["model.dtype=float16"], ["model.dtype: 'float16'", "bfloat16"]),
        (["logging.level=loud"], ["logging.level: 'loud'", "INFO"]),
        (["logging.wandb.enabled=true", "logging.wandb.project=a/b"], ["logging.wandb.project: 'a/b'"]),
        (["logging.prometheus.textfile=/tmp/metrics.txt"], ["logging.prometheus.textfile", "ends in .prom"]),
        (["logging.prometheus.port=70000"], ["logging.prometheus.port: 70000", "between 1 and 65535"]),
        (
            ["profiling.torch_profiler=true", "profiling.step_start=3"],
            ["profiling.step_start: 3 .. profiling.step_end 2", "first not after the last"],
        ),
        (
            ["profiling.torch_profiler=true", "profiling.step_start=100000", "profiling.step_end=100000"],
            ["profiling.step_start: 100000 is beyond", "cycles x"],
        ),
        (["profiling.memory_snapshot=true", "run.device=cpu"], ["profiling.memory_snapshot", "run.device"]),
        (
            ["profiling.memory_snapshot=true", "profiling.ranks=[0,99]"],
            ["profiling.ranks: [99]", "[] means all"],
        ),
        (["advantage.overlong_buffer_tokens=5000"], ["advantage.overlong_buffer_tokens: 5000", "1024"]),
        (["branches={'a/b': {data: {train: [x]}}}"], ["branches.a/b", "letters, digits and underscores"]),
    ],
)
def test_an_impossible_combination_says_field_value_and_remedy(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        validate(load(tmp_path, *overrides), None, SHAPE)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.aggregation=constant", "loss.constant_divisor=100"],
        ["loss.mismatch_correction=icepop"],
        ["opd.topology=none", "schedule.opd_steps=0"],
        ["opd.topology=all_to_all", "opd.teacher_mode=every_n_steps", "opd.snapshot_every_steps=3"],
        ["branches.image.frozen=true"],
        [
            "branch_defaults.parallel.tensor_model_parallel_size=4",
            "branch_defaults.rollout.tensor_parallel_size=4",
        ],
        ["native.weight=0", "schedule.rlvr_steps=0", "branches.text.num_generations_per_prompt=1"],
        ["training.num_mini_batches=4", "optimizer.clip_grad=0"],
        ["profiling.step_start=0"],  # nothing is recorded
        [
            "logging.wandb={enabled: true, project: p, tags: [a, b]}",
            "logging.prometheus={textfile: /x/copd.prom, port: 9400}",
            "profiling={timeline: true, torch_profiler: true, step_start: 1, step_end: 3, ranks: []}",
        ],
    ],
)
def test_what_can_run_is_not_refused(tmp_path: Path, overrides: list[str]) -> None:
    validate(load(tmp_path, *overrides), None, SHAPE)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        validate(load(tmp_path, "optimizer.lr=0", "schedule.cycles=0"), 5, None)
    message = str(error.value)
    assert message.startswith("3 problems")
    for part in ("optimizer.lr", "schedule.cycles", "--nproc-per-node=6"):
        assert part in message


def test_a_single_branch_needs_no_distillation(tmp_path: Path) -> None:
    text = "model: {path: base}\nbranches: {text: {data: {train: [a]}}}\n"
    with pytest.raises(ConfigError, match="distillation needs a teacher"):
        validate(load_config(write(tmp_path, text), []), 1, None)
    validate(load_config(write(tmp_path, text), ["schedule.opd_steps=0"]), 1, None)


def test_no_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="branches: empty"):
        validate(load_config(write(tmp_path, "model: {path: base}"), []), 1, None)


def test_a_frozen_branch_whose_prompts_nobody_uses_needs_no_data(tmp_path: Path) -> None:
    edges = "opd.edges=[{student: image, teacher: text, prompts: image}]"
    overrides = ["branches.text.frozen=true", "branches.text.data.train=[]", "opd.topology=custom"]
    validate(load(tmp_path, *overrides, edges), None, None)
    with pytest.raises(ConfigError, match=r"branches\.text\.data\.train: empty"):
        validate(load(tmp_path, *overrides, "opd.edges=[{student: image, teacher: text}]"), None, None)


def test_branches_with_other_vocabularies_are_refused(tmp_path: Path) -> None:
    shapes = {"text": SHAPE, "image": replace(SHAPE, vocab_size=300)}
    with pytest.raises(ConfigError, match=r"300 tokens.*260"):
        validate(load(tmp_path), None, shapes)


@pytest.mark.parametrize(
    ("shape", "overrides", "parts"),
    [
        (SHAPE, ["branches.text.parallel.expert_model_parallel_size=2"], ["Qwen3ForCausalLM is dense"]),
        (
            MIXTURE,
            ["run.device=cpu", "branch_defaults.rollout.tensor_parallel_size=2"],
            ["blocks of 32, a rank's share of an expert is 16"],
        ),
        (
            replace(MIXTURE, expert_ffn_size=33),
            ["branch_defaults.rollout.tensor_parallel_size=2"],
            ["2 does not divide the 33 feed-forward rows of an expert", "[1, 3, 11, 33]"],
        ),
        (
            MIXTURE,
            ["branches.text.parallel.sequence_parallel=false"],
            ["tensor_model_parallel_size 2", "true"],
        ),
        (
            MIXTURE,
            [
                "branches.text.parallel.sequence_parallel=true",
                "branches.text.parallel.data_parallel_size=2",
                "branches.text.parallel.expert_model_parallel_size=4",
            ],
            ["4 does not divide the model's 6 experts", "[1, 2, 3, 6]"],
        ),
        (
            SHAPE,
            [
                "branches.text.parallel.pipeline_model_parallel_size=2",
                "branches.text.parallel.virtual_pipeline_model_parallel_size=3",
            ],
            ["2 stages x 3 chunks", "4 layers"],
        ),
        (SHAPE, ["precision.fp8=blockwise"], ["blocks of 128", "hidden size is 64"]),
        (SHAPE, ["precision.fp8=mxfp8", "precision.num_bf16_layers_at_start=4"], ["leave no FP8 layer"]),
        (SHAPE, ["precision.fp8=delayed", "precision.num_bf16_layers_at_end=1"], ["delayed", "tensorwise"]),
        (
            SHAPE,
            ["training.recompute=selective", "training.recompute_modules=[mlp,moe]"],
            ["moe is no part of branch text's Qwen3ForCausalLM", "core_attn, mlp"],
        ),
        (
            MIXTURE,
            ["run.device=cpu", "training.recompute=selective", "training.recompute_modules=[moe_act]"],
            ["only a GPU has", "use moe"],
        ),
        (
            MIXTURE,
            [
                "precision.fp8=delayed",
                "training.recompute=selective",
                "training.recompute_modules=[moe_act]",
            ],
            ["moe_act cannot be computed again under precision.fp8=delayed"],
        ),
        (
            SHAPE,
            ["precision.fp8=delayed", "branches.image.frozen=true"],
            ["the frozen branch image never makes", "use tensorwise"],
        ),
        (
            SHAPE,
            ["precision.fp8=tensorwise", "precision.fp8_parameters=true", "memory.offload_weights=true"],
            ["memory.offload_weights", "cannot be parked"],
        ),
        (
            replace(SHAPE, vision=TOWER),
            ["training.overlap_grad_reduce=true"],
            ["overlap_grad_reduce: true with the trained vision tower", "model.freeze_vision=true"],
        ),
        (
            SHAPE,
            ["training.recompute_modules=[attention]"],
            ["recompute_modules[0]: 'attention' must be one of core_attn"],
        ),
        (SHAPE, ["precision.fp8_parameters=true"], ["precision.fp8_parameters", "choose a recipe"]),
        (SHAPE, ["optimizer.moments_dtype=int8"], ["moments_dtype: 'int8'", "bfloat16"]),
        (SHAPE, ["optimizer.moments_dtype=bfloat16"], ["optimizer.precision_aware=true"]),
        (SHAPE, ["training.overlap_param_gather=true"], ["overlap_grad_reduce=true"]),
        (
            SHAPE,
            ["branch_defaults.rollout.over_sampling=0.2", "branch_defaults.rollout.partial_rollouts=true"],
            ["max_weight_lag 0", "above 0"],
        ),
    ],
)
def test_layouts_and_number_formats_are_checked_against_the_model(
    tmp_path: Path, shape: ModelShape, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        validate(load(tmp_path, *overrides), None, {"text": shape, "image": shape})
    for part in parts:
        assert part in str(error.value)


def test_enum_members_are_the_names_that_yaml_uses() -> None:
    for enum in (Topology, TeacherMode, Aggregation, MismatchCorrection, Device):
        assert all(member.name == member.value for member in enum)
