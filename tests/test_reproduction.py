"""The comparison of recipes: its tasks, arms, runner, intervals and verdicts."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import click
import numpy as np
import pytest
from PIL import Image

from copd_megatron.cli.main import copd
from copd_megatron.config import validate
from copd_megatron.errors import ConfigError
from copd_megatron.evaluation.statistics import Estimate
from copd_megatron.recipes.experiments.base import Task
from copd_megatron.report.history import RunHistory
from copd_megatron.reproduction.arms import ARMS, COMPARISONS, INDEPENDENT
from copd_megatron.reproduction.budget import budget_of, trained_tokens
from copd_megatron.reproduction.claims import CLAIMS, FAILS, HOLDS, OPEN, Claim, decide
from copd_megatron.reproduction.collect import _behaviour_figures
from copd_megatron.reproduction.compare import SeedFolder, arms_of, measuring_jobs, training_jobs
from copd_megatron.reproduction.criteria import criteria
from copd_megatron.reproduction.forked import Program
from copd_megatron.reproduction.material import make_base
from copd_megatron.reproduction.runner import Cost, Job, TaskFailed, run_jobs, what_is_set
from copd_megatron.reproduction.scores import difference, estimate, over_seeds
from copd_megatron.reproduction.setting import CHOSEN, SETTINGS
from copd_megatron.tiny.tasks import table_media
from copd_megatron.tiny.tasks.canvas import blank, draw_digit
from copd_megatron.tiny.tasks.tables import (
    IMAGE,
    TEXT,
    VIDEO,
    Chain,
    TableDomain,
    TableWorld,
    distinct_chains,
    respond,
    response_length,
)

ROOT = Path(__file__).resolve().parents[1]


def a_world(seed: int = 1, **changes: object) -> TableWorld:
    domains = (
        TableDomain(name="alpha", tag="A", own="x", length=3),
        TableDomain(name="beta", tag="B", own="y", length=4),
    )
    return TableWorld(domains=domains, seed=seed, **changes)  # type: ignore[arg-type]


# -- tasks


def test_every_operation_permutes_the_symbols_for_each_right_operand() -> None:
    for table in a_world(num_symbols=7).tables.values():
        assert len(table) == 7
        assert all(sorted(row) == list(range(7)) for row in table)


def test_shared_tables_are_one_and_conflicting_ones_differ() -> None:
    world = a_world()
    assert set(world.tables) == {"s", "cA", "cB", "x", "y"}
    assert world.tables["cA"] != world.tables["cB"]


def test_the_base_believes_exactly_the_wrong_share_wrongly() -> None:
    world = a_world(num_symbols=8, wrong_share=0.25)
    for key, table in world.tables.items():
        wrong = sum(
            believed != true
            for rows in zip(table, world.beliefs[key], strict=True)
            for true, believed in zip(*rows, strict=True)
        )
        assert wrong == 16


def test_a_wrong_belief_leaves_the_truth_a_chance() -> None:
    world, rng = a_world(num_symbols=8, error_sureness=0.6, doubt=0.3), random.Random(0)
    right, left = next(
        (r, v) for r in range(8) for v in range(8) if world.beliefs["s"][r][v] != world.tables["s"][r][v]
    )
    said = [world.says("s", right, left, rng) for _ in range(4000)]
    assert said.count(world.beliefs["s"][right][left]) / 4000 == pytest.approx(0.6 + 0.1 / 8, abs=0.03)
    assert said.count(world.tables["s"][right][left]) / 4000 == pytest.approx(0.3 + 0.1 / 8, abs=0.03)


def dots_of(canvas: np.ndarray) -> str:
    """The digit that a picture shows, by its dots."""
    dark = canvas.min(axis=2) < 200
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    box = dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    for digit in "0123456789":
        plain = blank(table_media.SIZE, table_media.SIZE)
        draw_digit(plain, digit, "black", 0, 0, table_media.SCALE)
        shape = plain.min(axis=2) < 200
        shape = shape[shape.any(axis=1)][:, shape.any(axis=0)]
        if shape.shape == box.shape and (shape == box).all():
            return digit
    raise AssertionError("no digit")


@pytest.mark.parametrize("start", range(6))
def test_a_medium_shows_the_number_to_start_from(start: int) -> None:
    plain = TableDomain(name="b", tag="B", own="x", length=2)
    rng, steps = random.Random(start), (("s", 1), ("x", 2))

    def chain(medium: str) -> Chain:
        return Chain(domain=dataclasses.replace(plain, medium=medium), start=start, steps=steps)

    assert chain(TEXT).prompt == f"B{start}s1x2" == chain(TEXT).identity
    assert table_media.medium_of(chain(TEXT), 6, rng) == {}
    for medium in (IMAGE, VIDEO):
        assert chain(medium).prompt == "Bs1x2"
        assert chain(medium).identity == chain(TEXT).identity
    picture = table_media.medium_of(chain(IMAGE), 6, rng)["png"]
    assert dots_of(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))) == str(start)
    with av.open(io.BytesIO(table_media.medium_of(chain(VIDEO), 6, rng)["mp4"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    shown = [dots_of(frame) for frame in frames]
    assert shown[2:] == [str(start)] * 2
    assert shown[0] == shown[1] != str(start)


def test_a_base_with_vision_learns_from_text_images_and_videos(tmp_path: Path) -> None:
    """The loss falls, and the folder holds what a vision-language model needs."""
    material = SETTINGS["tables_media"].material(1)
    short = dataclasses.replace(material.warm_up, num_steps=8, batch_size=8)
    losses: list[float] = []
    make_base(
        tmp_path / "base",
        dataclasses.replace(material, warm_up=short),
        progress=lambda step, total, loss: losses.append(loss),
    )
    assert len(losses) == 8 and losses[-1] < losses[0]
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert (tmp_path / "base" / "processor_config.json").is_file()


def test_values_follow_the_tables_of_the_domain() -> None:
    world = a_world()
    domain = world.domains[1]
    chain = Chain(domain=domain, start=3, steps=(("s", 1), ("c", 2), ("y", 0), ("s", 5)))
    tables, value = world.tables, 3
    for key, right in (("s", 1), ("cB", 2), ("y", 0), ("s", 5)):
        value = tables[key][right][value]
    assert chain.values(world)[-1] == value
    assert chain.prompt == "B3s1c2y0s5"
    assert respond(chain, [4, 1, 6, 8]) == "<think>416</think>8"
    verbose = Chain(domain=dataclasses.replace(domain, verbose=True), start=3, steps=chain.steps)
    assert respond(verbose, [4, 1, 6, 8]) == "<think>s1=4c2=1y0=6</think>8"
    assert response_length(domain) == 7 and response_length(verbose.domain) == 16


def test_prompts_are_distinct_and_the_same_for_a_seed() -> None:
    world = a_world()
    once, again = (distinct_chains(world, world.domains[0], 500) for _ in range(2))
    assert len({chain.prompt for chain in once}) == 500
    assert [c.prompt for c in once] == [c.prompt for c in again]
    assert [c.prompt for c in once] != [c.prompt for c in distinct_chains(a_world(2), world.domains[0], 500)]


def test_more_prompts_than_there_are_is_an_error() -> None:
    world = a_world(num_symbols=2)
    with pytest.raises(ValueError, match="has 432 prompts"):
        distinct_chains(world, world.domains[0], 433)


# -- arms


def a_folder(tmp_path: Path, seed: int = 1) -> SeedFolder:
    return SeedFolder(setting=SETTINGS[CHOSEN], seed=seed, root=tmp_path)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_every_arm_is_a_valid_configuration(tmp_path: Path, comparison: str) -> None:
    folder = a_folder(tmp_path)
    for arm in COMPARISONS[comparison]:
        made = folder.made(comparison, arm)
        assert arm.name in made.models or arm.name == "distance"
        for task in made.tasks:
            if task.trains:
                validate(task.config, world_size=None, model=None)
                assert task.config.run.dir == str(folder.runs(comparison) / task.name)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_tasks_of_one_name_are_one_task_and_come_after_what_they_need(
    tmp_path: Path, comparison: str
) -> None:
    folder = a_folder(tmp_path)
    known: dict[str, Task] = {}
    for arm in COMPARISONS[comparison]:
        for task in folder.made(comparison, arm).tasks:
            assert known.setdefault(task.name, task) == task
            assert set(task.after) <= set(known)


def test_every_job_is_a_command_that_there_is(tmp_path: Path) -> None:
    """The command line takes each job's words, options included."""
    folder = a_folder(tmp_path)
    seen = set()
    for job in training_jobs(folder, "two", ARMS):
        words = list(job.program.arguments)
        command: click.Command = copd
        while isinstance(command, click.Group):
            name = words.pop(0)
            found = command.get_command(click.Context(command), name)
            assert found is not None, f"there is no command {name}"
            command = found
            seen.add(name)
        command.make_context(name, words)
    assert {"train", "merge", "to-hf"} <= seen


def test_equal_budgets_are_equal(tmp_path: Path) -> None:
    """Experts, CoPD and its variants have 50 steps a branch, mixed training 100 batches, static distillation
    as many steps in sequence as CoPD has in its two phases."""
    folder = a_folder(tmp_path)
    tasks = {t.name: t.config for arm in ARMS for t in folder.made("two", arm).tasks if t.trains}

    def steps(name: str) -> tuple[int, int]:
        schedule = tasks[name].schedule
        return schedule.cycles * schedule.rlvr_steps, schedule.cycles * schedule.opd_steps

    assert steps(INDEPENDENT) == (50, 0)
    assert steps("copd") == (30, 20)
    assert steps("static_alpha") == (0, 20)
    assert steps("mopd") == (0, 20)
    assert steps("mixed") == (100, 0)
    assert steps("mixed_wider") == (50, 0)
    assert tasks["mixed_wider"].branches["mixed"].num_prompts_per_step == 64
    for name in tasks:
        if name.startswith("copd_ratio"):
            assert sum(steps(name)) == 50
    native, cross = steps("copd_short")
    assert native + 2 * cross == pytest.approx(50, abs=4)  # batches, as many as an expert has


def test_arms_that_are_not_the_main_ones_have_fewer_seeds() -> None:
    assert "opcod" in {arm.name for arm in arms_of("two", 3)}
    assert {arm.name for arm in arms_of("two", 5)} == {arm.name for arm in ARMS if arm.main}
    with pytest.raises(ConfigError, match=r"two has no arm cpod; it has base, experts_mean"):
        arms_of("two", 1, ["cpod"])


def test_measuring_names_every_model_once(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    greedy, sampled = measuring_jobs(folder, "two", arms_of("two", 1, ["base", "copd"]))
    assert [word.partition("=")[0] for word in greedy.program.arguments[2:]] == [
        "base",
        "copd",
        "copd.alpha",
        "copd.beta",
    ]
    assert greedy.name != sampled.name


# -- runner


def a_job(
    tmp_path: Path,
    name: str,
    does: str,
    *after: str,
    words: Sequence[str] = (),
    digest: str = "d",
    **fields: int,
) -> Job:
    arguments = (does, str(tmp_path), *words)
    program = Program(module="tests.support.small_jobs", arguments=arguments, ranks=fields.get("ranks"))
    cores = fields.get("cores", 1)
    return Job(name=name, folder=tmp_path / "jobs", program=program, after=after, cores=cores, digest=digest)


def test_jobs_run_after_what_they_need_and_only_once(tmp_path: Path) -> None:
    jobs = [
        a_job(tmp_path, "c", "append", "b", words="c"),
        a_job(tmp_path, "b", "append", "a", words="b"),
        a_job(tmp_path, "a", "append", words="a"),
    ]
    said: list[str] = []
    prepared: list[bool] = []
    costs = run_jobs(jobs, cores=2, say=said.append, prepare=lambda: prepared.append(True))
    assert (tmp_path / "order").read_text() == "abc"
    assert all(cost.seconds >= 0 for cost in costs.values())
    assert "[3/3]" in said[-1] and "all done" in said[-1]
    run_jobs(jobs, cores=2, say=said.append, prepare=lambda: prepared.append(True))
    assert (tmp_path / "order").read_text() == "abc"
    assert prepared == [True]  # nothing to start, nothing to prepare


def test_no_more_ranks_run_at_once_than_there_are_cores(tmp_path: Path) -> None:
    run_jobs([a_job(tmp_path, name, "alone", cores=2) for name in "abc"], cores=2, say=print)


def test_a_failed_job_is_named_with_its_log_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    failing = a_job(tmp_path, "bad", "needs_ok")
    with pytest.raises(TaskFailed, match=r"bad failed; its log: .*bad\.log"):
        run_jobs([failing], cores=1, say=print)
    (tmp_path / "ok").touch()
    assert run_jobs([failing], cores=1, say=print)


def test_what_a_job_raises_stands_in_its_log(tmp_path: Path) -> None:
    job = a_job(tmp_path, "bad", "raises")
    with pytest.raises(TaskFailed):
        run_jobs([job], cores=1, say=print)
    assert "ValueError: of no use" in job.log.read_text()


def test_the_ranks_of_a_job_end_when_one_fails(tmp_path: Path) -> None:
    begun = time.monotonic()
    job = a_job(tmp_path, "job", "ranks", ranks=2)
    with pytest.raises(TaskFailed):
        run_jobs([job], cores=2, say=print)
    assert time.monotonic() - begun < 50
    assert "a rank ended with 1; the others are ended" in job.log.read_text()


def test_the_ranks_of_a_job_are_out_of_reach_of_other_machines(tmp_path: Path) -> None:
    assert run_jobs([a_job(tmp_path, "job", "out_of_reach", ranks=2)], cores=2, say=print)


def test_a_job_that_was_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    run_jobs([a_job(tmp_path, "a", "nothing")], cores=1, say=print)
    with pytest.raises(ConfigError, match="a was run with other settings"):
        run_jobs([a_job(tmp_path, "a", "nothing", digest="other")], cores=1, say=print)


def test_settings_at_their_defaults_do_not_make_another_task(tmp_path: Path) -> None:
    """Else every version that has a new setting would do all work again."""
    config = a_folder(tmp_path).config("two")
    before = json.loads(what_is_set(config))
    assert "max_teacher_lag" not in before["opd"] and "evaluation" in before
    assert before["optimizer"]["lr"] == config.optimizer.lr and before["branches"]["alpha"]["data"]["train"]
    config.opd.max_teacher_lag = 1
    after = json.loads(what_is_set(config))
    assert after["opd"].pop("max_teacher_lag") == 1
    assert after == before


def test_a_need_that_nothing_makes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="a needs b, which nothing makes"):
        run_jobs([a_job(tmp_path, "a", "nothing", "b")], cores=1, say=print)


def _run_until_told(folder: Path, how: int) -> None:
    """Sends the signal to a command with a running job; the job has to end."""
    script = folder / "run.py"
    script.write_text(
        "import sys, signal, pathlib\n"
        "from copd_megatron.reproduction.forked import Program\n"
        "from copd_megatron.reproduction.runner import Job, run_jobs\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "program = Program(module='tests.support.small_jobs', arguments=('sleeps', '.'))\n"
        "job = Job(name='a', folder=pathlib.Path('jobs'), program=program, digest='d')\n"
        "run_jobs([job], cores=1, say=print)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script)], cwd=folder, env=environment)
    child = folder / "child"
    deadline = time.monotonic() + 120
    while not child.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(child.read_text())
    process.send_signal(how)
    assert process.wait(60) == (143 if how == signal.SIGTERM else -how)
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (folder / "jobs" / "a.json").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_runs_ends_with_the_command(tmp_path: Path, how: int) -> None:
    _run_until_told(tmp_path, how)


# -- figures


def rewards(*values: float) -> np.ndarray:
    return np.asarray(values, np.float64)


def test_an_interval_over_seeds_is_at_least_students_t() -> None:
    found = over_seeds([0.5, 0.6, 0.7])
    half = 4.303 * 0.1 / 3**0.5
    assert found.value == pytest.approx(0.6)
    assert (found.low, found.high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))


def test_an_interval_is_at_least_the_one_over_prompts() -> None:
    """Seeds that agree by chance do not make a certain figure of few prompts."""
    seeds = [{"alpha": rewards(*([1.0] * 5 + [0.0] * 5))} for _ in range(3)]
    found = estimate(seeds)
    assert found.value == 0.5
    assert found.high - found.low > 0.2


def test_one_seed_has_an_interval_over_its_prompts_only() -> None:
    found = estimate([{"alpha": rewards(1, 0, 1, 1), "beta": rewards(0, 0, 0, 0)}])
    assert found.value == pytest.approx(0.375)
    assert 0.1 < found.low < 0.375 < found.high < 0.6


def test_a_difference_is_paired_by_seed_and_prompt() -> None:
    rng = np.random.default_rng(0)
    hard = {seed: {"alpha": rng.integers(2, size=200).astype(float)} for seed in range(4)}
    better = {
        seed: {"alpha": np.clip(v["alpha"] + (rng.random(200) < 0.1), 0, 1)} for seed, v in hard.items()
    }
    paired = difference(better, hard)
    assert paired.low > 0
    assert difference(better, {0: hard[0]}).value == pytest.approx(
        float(np.mean(better[0]["alpha"] - hard[0]["alpha"]))
    )


@pytest.mark.parametrize(
    ("low", "high", "above", "verdict"),
    [
        (0.01, 0.2, True, HOLDS),
        (-0.2, -0.01, True, FAILS),
        (-0.1, 0.1, True, OPEN),
        (-0.2, -0.01, False, HOLDS),
        (0.01, 0.2, False, FAILS),
    ],
)
def test_a_claim_holds_only_where_the_whole_interval_says_so(
    low: float, high: float, above: bool, verdict: str
) -> None:
    claim = Claim(text="", figure="", above=above)
    assert decide(claim, Estimate(value=(low + high) / 2, low=low, high=high)) == verdict


def test_the_criteria_read_experts_and_mixed_training_alone() -> None:
    def flat(alpha: float, beta: float) -> Mapping[str, np.ndarray]:
        return {"alpha": rewards(alpha), "beta": rewards(beta)}

    good = {
        "base": flat(0.3, 0.2),
        "expert.alpha": flat(0.7, 0.25),
        "expert.beta": flat(0.35, 0.6),
        "mixed_longer": flat(0.6, 0.7),
    }
    found = criteria(["alpha", "beta"], [good], {"alpha": 6, "beta": 7})
    assert [c.met for c in found] == [True] * 5
    bad = {**good, "expert.alpha": flat(0.7, 0.5), "mixed_longer": flat(0.9, 0.9), "base": flat(0.3, 0.05)}
    assert [c.met for c in criteria(["alpha", "beta"], [bad], {"alpha": 6, "beta": 6})] == [
        *(False, True, False, False, True),
    ]


def test_a_budget_counts_what_was_taken_of_the_experts(tmp_path: Path) -> None:
    """A distillation has cross rows alone, whose lengths stand under the edge."""
    folder = a_folder(tmp_path)
    runs = folder.runs("two")
    for task, lengths, steps in (
        (INDEPENDENT, {"alpha": "alpha/train", "beta": "beta/train"}, 50),
        ("static_alpha", {"alpha": "alpha/cross/beta"}, 20),
        ("static_beta", {"beta": "beta/cross/alpha"}, 20),
    ):
        (runs / task).mkdir(parents=True)
        row = {f"{name}/train/num_rows": 10.0 for name in lengths}
        row |= {f"{place}/response_length": 2.0 for place in lengths.values()}
        lines = [json.dumps({"step": step, "phase": "rlvr", **row}) for step in range(1, steps + 1)]
        (runs / task / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    arm = next(arm for arm in ARMS if arm.name == "static")
    tasks = folder.made("two", arm).tasks
    costs = {t.name: Cost(seconds=1.0, core_seconds=10.0, digest="") for t in tasks}
    costs[INDEPENDENT] = Cost(seconds=1.0, core_seconds=50.0, digest="")
    found = budget_of(tasks, runs, costs)
    assert found.steps == 2 * 30 + 2 * 20
    assert found.tokens == 20 * found.steps
    assert found.core_seconds == pytest.approx(5 * 10 + 30)


def test_native_and_cross_rows_have_lengths_of_their_own() -> None:
    nan = math.nan
    history = RunHistory(
        name="run",
        steps=(1, 2, 3),
        phases=("rlvr", "opd", "opd"),
        series={
            "a/train/num_rows": (256.0, 512.0, 256.0),
            "a/train/response_length": (7.0, 7.0, nan),
            "a/cross/b/response_length": (nan, 16.0, 10.0),
        },
    )
    assert trained_tokens(history, "a", 256) == 256 * (7 + 7 + 16 + 10)
    assert trained_tokens(history, "a", 256, last=1) == 256 * 7


@pytest.mark.parametrize(("num_seeds", "is_told"), [(2, False), (3, True)])
def test_fewer_than_three_seeds_decide_nothing_of_how_alike_branches_are(
    num_seeds: int, is_told: bool
) -> None:
    def curves(value: float) -> dict[str, Any]:
        return {"a-b": {str(seed): [[1, value], [2, value]] for seed in range(num_seeds)}}

    figures = _behaviour_figures(
        {
            "copd": {"overlap": curves(0.95), "symmetric_kl": curves(0.1)},
            INDEPENDENT: {"overlap": curves(0.5), "symmetric_kl": curves(1.0)},
        }
    )
    found = [decide(claim, figures[claim.figure]) for claim in CLAIMS if claim.figure in figures]
    assert found == [HOLDS if is_told else OPEN] * 2


# -- the whole way


@pytest.mark.slow
def test_a_comparison_from_base_to_page(tmp_path: Path) -> None:
    """Real runs of a few steps: base, experts, mixed training and CoPD, measured, collected and drawn."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "reproduce.py"),
        "quick",
        "--setting",
        "smoke",
        "--seeds",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=580
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    page = (tmp_path / "page" / "README.md").read_text()
    assert "CoPD beats the mean of independent experts" in page
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    two = results["comparisons"]["two"]
    assert two["models"]["copd"]["seeds"] == [1]
    assert two["budgets"]["copd"]["steps"] == two["budgets"]["experts_mean"]["steps"] == 36
    assert 0 < two["behaviour"]["copd"]["overlap"]["alpha-beta"]["1"][0][1] <= 1
    assert (tmp_path / "page" / "figures" / "likeness.svg").stat().st_size > 1000
