"""The plan of a run: lengths, sampling, links, seconds, machines, one more branch, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.cli.main import main
from copd_megatron.config import Config, ConfigError, load_config, read_model_sizes
from copd_megatron.config.schema import Topology
from copd_megatron.model.known import KNOWN, known_shape
from copd_megatron.planner.calibrate import Observation, calibrated
from copd_megatron.planner.compute import bubble, forward_flops, sums
from copd_megatron.planner.lengths import Lengths, parse_lengths
from copd_megatron.planner.machine import Machine, read_machine, with_figures, write_machine
from copd_megatron.planner.memory import GIB
from copd_megatron.planner.more_branches import one_more_branch, with_copy
from copd_megatron.planner.plan import Inputs, branch_plan, make_plan
from copd_megatron.planner.sampling import Engine, sampling_seconds
from copd_megatron.planner.traffic import edge_count
from copd_megatron.planner.workload import BranchLengths, Rows
from tests.support.commands import ROOT
from tests.support.shapes import MIXTURE, SHAPE

CONFIGS = ROOT / "configs"
H100 = read_machine("h100")


def fixed(tokens: float) -> Lengths:
    return Lengths(mean=tokens, p99=tokens, limit=tokens)


def inputs_of(
    name: str, *overrides: str, machine: Machine = H100, prompt: float = 1000, response: float = 2000
) -> Inputs:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    lengths = BranchLengths(prompt=fixed(prompt), response=fixed(response))
    return Inputs(
        config=config,
        shapes=read_model_sizes(config),
        lengths=dict.fromkeys(config.branches, lengths),
        machine=machine,
    )


FOUR = "three_branch_qwen3_vl_4b"
THIRTY = "three_branch_qwen3_vl_30b_a3b"
LARGEST = "three_branch_qwen3_vl_235b_a22b"


# --- lengths ----------------------------------------------------------------------------------------------


@given(st.floats(2, 5000), st.floats(1, 5), st.integers(1, 400))
def test_lengths_ascend_within_their_limit_and_have_the_mean(mean: float, ratio: float, count: int) -> None:
    lengths = Lengths(mean=mean, p99=mean * ratio, limit=mean * 1000)
    values = lengths.quantiles(count)
    assert list(values) == sorted(values) and all(1 <= value <= lengths.limit for value in values)
    many = lengths.quantiles(4000)
    if mean > 50:  # shorter ones are cut at one token
        assert math.fsum(many) / 4000 == pytest.approx(mean, rel=0.1)
        assert many[3960] == pytest.approx(mean * ratio, rel=0.1)
    assert lengths.square >= lengths.average**2 * (1 - 1e-9)


def test_a_limit_cuts_the_tail() -> None:
    cut = Lengths(mean=1000, p99=8000, limit=2000)
    assert cut.average < 1000 and max(cut.quantiles(100)) == 2000


@pytest.mark.parametrize("text", ["x", "0", "5:4", "300", "100:nan"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        parse_lengths(text, 200)


# --- sampling ---------------------------------------------------------------------------------------------

ENGINE = Engine(shape=SHAPE, ranks=1, bytes_per_weight=2, bytes_per_number=2, slots=8, prefix_caching=True)


def rows(count: float, response: Lengths, group: int = 4) -> Rows:
    return Rows(count=count, group=group, lengths=BranchLengths(prompt=fixed(10), response=response))


def test_one_wave_takes_as_long_as_its_longest_response() -> None:
    """With overheads of an iteration alone: responses of 4 tokens in one wave, 3 waves of it."""
    machine = with_figures(H100, {"tflops": 1e9, "memory_gb": 1e12, "token_seconds": 0.0})
    wave = sampling_seconds([rows(8, fixed(4))], ENGINE, 1, machine, fp8=False)
    assert wave == pytest.approx(4 * SHAPE.num_layers * machine.decode_seconds, rel=1e-6)
    three = sampling_seconds([rows(24, fixed(4))], ENGINE, 1, machine, fp8=False)
    assert three == pytest.approx(3 * wave)
    assert sampling_seconds([rows(24, fixed(4))], ENGINE, 3, machine, fp8=False) == pytest.approx(wave)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.floats(2, 400), st.floats(1, 8), st.integers(1, 64))
def test_sampling_takes_no_less_with_more_rows_longer_tails_or_fewer_places(
    count: int, mean: float, ratio: float, slots: int
) -> None:
    engine = replace(ENGINE, slots=slots)
    response = Lengths(mean=mean, p99=mean * ratio, limit=1e6)
    base = sampling_seconds([rows(count, response)], engine, 1, H100, fp8=False)
    assert sampling_seconds([rows(count * 2, response)], engine, 1, H100, fp8=False) >= base * 0.99
    assert (
        sampling_seconds([rows(count, response)], replace(engine, slots=2 * slots), 1, H100, fp8=False)
        <= base * 1.01
    )
    # no iteration is free
    longest = response.quantiles(count)[-1]
    assert base >= longest * SHAPE.num_layers * H100.decode_seconds


def test_a_batch_of_a_mixture_reads_more_of_its_experts() -> None:
    engine = replace(ENGINE, shape=MIXTURE)
    one, many = engine.weight_bytes(1), engine.weight_bytes(1000)
    layers = MIXTURE.num_layers * MIXTURE.layer_parameters
    assert many == pytest.approx(2 * (layers + MIXTURE.embedding_parameters), rel=1e-3)
    assert one == pytest.approx(
        2 * (MIXTURE.num_layers * MIXTURE.active_layer_parameters + MIXTURE.embedding_parameters), rel=0.02
    )


# --- flops, pipelines, links --------------------------------------------------------------------------------


def test_flops_are_two_for_every_weight_a_token_meets() -> None:
    found = sums([rows(3, fixed(20))])
    flops = forward_flops(SHAPE, found, on_gpu=True)
    expected = 2 * SHAPE.num_layers * SHAPE.layer_parameters * 90 + 2 * SHAPE.embedding_parameters * 60
    expected += 2 * SHAPE.num_layers * SHAPE.num_attention_heads * SHAPE.head_dim * 3 * 30**2
    assert flops == pytest.approx(expected)


def test_a_shared_prompt_goes_through_the_layers_once() -> None:
    """Prompts of 10 tokens, responses of 20, groups of 4; in two random halves a prompt is in 1.875."""
    eight = [rows(8, fixed(20))]
    assert sums(eight).passed_tokens == sums(eight).tokens == 8 * 30
    assert sums(eight, share_prompts=True).passed_tokens == 2 * 10 + 8 * 20
    assert sums(eight, share_prompts=True, parts=2).passed_tokens == pytest.approx(2 * 1.875 * 10 + 8 * 20)
    assert sums(eight, share_prompts=True).squares == sums(eight).squares, "attention sees rows whole"


def test_a_pipeline_idles_as_its_stages_fill() -> None:
    branch = inputs_of(FOUR, "branch_defaults.parallel.pipeline_model_parallel_size=4").config.branches[
        "text"
    ]
    assert bubble(branch, 8) == pytest.approx(3 / 8)
    branch.parallel.virtual_pipeline_model_parallel_size = 3
    assert bubble(branch, 8) == pytest.approx(3 / 24)


def test_what_a_rank_sends_follows_the_formulas() -> None:
    inputs = inputs_of(FOUR)
    plan = branch_plan(inputs, "image")
    step = plan.steps["opd"]
    sent = {link.purpose: link for link in step.links}
    shape, rows_ = inputs.shapes["image"], step.rows
    trained, forward = rows_.trained.tokens / 2, (rows_.scored.tokens + rows_.taught.tokens) / 2
    tensor = 4 * shape.num_layers * 2 * shape.hidden_size * (3 * trained + forward) * 3 / 4
    assert sent["tensor"].num_bytes == pytest.approx(tensor) and sent["tensor"].inside_node
    assert sent["data"].num_bytes == pytest.approx(6 * plan.memory.weights / 2 / 2)
    assert sent["weights"].num_bytes == pytest.approx(2 * shape.num_parameters * 7 / 8)
    assert sent["expert"].num_bytes == sent["pipeline"].num_bytes == sent["context"].num_bytes == 0
    crossing = sum(4 * part.tokens + 4 * part.response_tokens for part in (rows_.asked, rows_.taught))
    assert sent["router"].num_bytes == pytest.approx(crossing / 8) and not sent["router"].inside_node


# --- whole plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ranks"), [(FOUR, 24), (THIRTY, 48), (LARGEST, 1024)])
def test_the_shipped_configurations_can_be_planned_without_weights(name: str, ranks: int) -> None:
    plan = make_plan(inputs_of(name))
    assert plan.ranks == ranks
    assert not plan.problems, plan.problems
    for phase in plan.phases.values():
        assert phase.step_seconds > 0 and min(phase.waiting.values()) > -1e-9
    assert plan.gpu_hours == pytest.approx(plan.seconds * ranks / 3600)
    assert plan.sampled_tokens == pytest.approx(2000 * 2048 * (60 * 3 + 40 * (3 + 4)))


def test_a_step_of_phase_two_waits_for_the_hub_which_learns_and_teaches_most() -> None:
    plan = make_plan(inputs_of(FOUR))
    parts = {b.name: b.steps["opd"].seconds for b in plan.branches}
    assert parts["text"].teaching > 1.9 * parts["image"].teaching
    assert parts["text"].update > 1.4 * parts["image"].update
    assert plan.phases["opd"].waiting["image"] > plan.phases["opd"].waiting["text"]


def test_with_a_lag_a_step_takes_what_the_slowest_branch_needs() -> None:
    plans = {}  # image samples longest, in small batches; text learns longest
    for lag in (0, 1):
        few = "branches.image.rollout.max_num_seqs=24"
        plans[lag] = make_plan(inputs_of(FOUR, f"opd.max_teacher_lag={lag}", few))
    phase = plans[1].phases["opd"]
    assert phase.step_seconds == max(b.steps["opd"].seconds.total for b in plans[1].branches)
    assert min(phase.waiting.values()) == 0
    assert phase.step_seconds < plans[0].phases["opd"].step_seconds


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(list(Topology)[:3]), st.integers(1, 5))
def test_router_bytes_grow_with_the_edges(topology: Topology, copies: int) -> None:
    inputs = inputs_of(FOUR, f"opd.topology={topology.value}", "opd.behaviour.num_states=0")
    for _ in range(copies):
        inputs = with_copy(inputs, "video")
        inputs.config.branches[f"video{len(inputs.config.branches)}"] = inputs.config.branches.pop(
            "video_copy"
        )
        inputs = replace(
            inputs,
            shapes=dict.fromkeys(inputs.config.branches, inputs.shapes["text"]),
            lengths=dict.fromkeys(inputs.config.branches, inputs.lengths["text"]),
        )
    if topology is Topology.custom:
        return
    plan = make_plan(inputs)
    edges = edge_count(topology, len(inputs.config.branches))
    assert plan.phases["opd"].router_bytes == pytest.approx(edges * 2048 * (4 * 3000 + 4 * 2000))


def test_one_more_branch_adds_two_edges_to_a_hub() -> None:
    inputs = inputs_of(FOUR)
    plan = make_plan(inputs)
    more = one_more_branch(inputs, plan)
    assert more is not None and (more.ranks, more.edges, more.copied) == (8, 2, "video")
    assert more.router_bytes["opd"] == pytest.approx(plan.phases["opd"].router_bytes / 2, rel=0.01)
    assert more.step_seconds["opd"] > 0 and more.gpu_hours > 0


def test_a_frozen_branch_is_charged_for_scoring_alone() -> None:
    plan = make_plan(inputs_of(FOUR, "branches.video.frozen=true"))
    video = next(b for b in plan.branches if b.name == "video")
    assert video.memory.gradients == video.memory.optimizer == video.memory.rollout == 0
    seconds = video.steps["opd"].seconds
    assert seconds.teaching > 0 and seconds.generation == seconds.update == seconds.weight_sync == 0


def test_what_does_not_fit_is_refused_with_what_takes_the_memory() -> None:
    small = with_figures(H100, {"memory_gib": 24.0})
    plan = make_plan(inputs_of(FOUR, machine=small))
    assert any("GiB on a rank that has 24.0: above all" in problem for problem in plan.problems)
    tight = make_plan(inputs_of(LARGEST, "branch_defaults.rollout.gpu_memory_utilization=0.7"))
    assert any("leave" in problem and "keys and values" in problem for problem in tight.problems)
    wrong = make_plan(inputs_of(FOUR, "branch_defaults.parallel.tensor_model_parallel_size=3"))
    assert any("does not divide the model's attention heads" in problem for problem in wrong.problems)


# --- machines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "cpu"])
def test_machines_survive_their_file(name: str, tmp_path: Path) -> None:
    machine = read_machine(name)
    write_machine(machine, tmp_path / "m.yaml")
    assert read_machine(name, tmp_path / "m.yaml") == machine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100: {like: h1}", "there is no such machine"),
        ("h100: {tflops: 1}", "missing ones"),
        ("a: 1", "no machine 'h100'"),
        ("[", "cannot be read"),
    ],
)
def test_a_wrong_machine_file_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_machine("h100", tmp_path / "m.yaml")


def test_figures_must_be_numbers(tmp_path: Path) -> None:
    write_machine(H100, tmp_path / "m.yaml")
    for value in ("0", "-1", "many", ".nan", "true"):
        text = (tmp_path / "m.yaml").read_text().replace("tflops: 989", f"tflops: {value}")
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ConfigError, match="tflops is"):
            read_machine("h100", tmp_path / "wrong.yaml")


def test_calibration_finds_the_machine_that_took_so_long() -> None:
    """Seconds of another machine's plans lead back to what that machine plans elsewhere."""
    other = with_figures(
        H100, {"update_share": 0.2, "score_share": 0.3, "sync_seconds": 2.0, "step_seconds": 4.0}
    )
    seen = []
    for prompt, response in ((500, 1500), (2000, 8000)):
        inputs = inputs_of(FOUR, machine=other, prompt=prompt, response=response)
        for phase, step in branch_plan(inputs, "image").steps.items():
            seconds = step.seconds.parts()
            seen.append(Observation(inputs=inputs, branch="image", phase=phase, seconds=seconds))
    found = calibrated(H100, seen)
    check = inputs_of(FOUR, machine=other, prompt=1000, response=4000)
    expected = branch_plan(check, "text").steps["opd"].seconds.parts()
    planned = branch_plan(replace(check, machine=found), "text").steps["opd"].seconds.parts()
    for part in ("update", "scoring", "teaching", "weight_sync", "other", "generation"):
        assert planned[part] == pytest.approx(expected[part], rel=0.05), part


# --- models without weights ---------------------------------------------------------------------------------


def test_known_sizes_have_the_parameters_of_their_names() -> None:
    for name, billions in (
        ("qwen3-8b", 8.2),
        ("qwen3-32b", 32.8),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235),
    ):
        assert KNOWN[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.01), name
    active = KNOWN["qwen3-235b-a22b"]
    met = active.num_layers * active.active_layer_parameters + 2 * active.embedding_parameters
    assert met / 1e9 == pytest.approx(22, rel=0.03)
    assert known_shape("/models/Qwen3-VL-4B-Instruct-FP8") is KNOWN["qwen3-vl-4b"]
    assert known_shape("/models/mine") is None


def test_an_unknown_model_without_a_folder_is_refused(tmp_path: Path) -> None:
    config = Config(branches=load_config(CONFIGS / f"{FOUR}.yaml").branches)
    config.model.path = str(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"no such folder, and no model whose sizes are known"):
        read_model_sizes(config)


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_records(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        str(CONFIGS / f"{FOUR}.yaml"),
        "--prompt-tokens",
        "1000",
        "--response-tokens",
        "text=2000:9000",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    for title in (
        "Memory of a rank",
        "Seconds of a step, Phase II",
        "The whole schedule",
        "One more branch",
        "Placement",
    ):
        assert f"# {title}" in text
    assert "text on 1 node" in text
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 24 and found["branches"]["text"]["needed_bytes"] < 79.1 * GIB
    assert (
        found["branches"]["text"]["seconds"]["opd"]["generation"]
        > found["branches"]["image"]["seconds"]["opd"]["generation"]
    )


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / f"{FOUR}.yaml")
    assert main(["plan"]) == 2
    assert main(["plan", path, "--gpu", "a100"]) == 2
    assert "it has h100, h200, b200, cpu" in capsys.readouterr().err
    assert main(["plan", path, "--media-tokens", "audio=3"]) == 2
    assert "no branch 'audio'" in capsys.readouterr().err
    assert main(["plan", path, "model.path=mine"]) == 2
