"""``copd plan``."""

from __future__ import annotations

from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import reader_may_leave, say
from copd_megatron.cli.parameters import COUNT, OVERRIDES, PATH
from copd_megatron.config import Config, load_config, read_model_sizes
from copd_megatron.planner.lengths import Lengths, parse_lengths
from copd_megatron.planner.machine import read_machine, write_machine
from copd_megatron.planner.more_branches import one_more_branch
from copd_megatron.planner.plan import Inputs, make_plan
from copd_megatron.planner.search import search
from copd_megatron.planner.show import describe, describe_search, record
from copd_megatron.planner.workload import BranchLengths
from copd_megatron.untrusted.json_text import dumped

EXAMPLES = """
    copd plan configs/three_branch_qwen3_vl_4b.yaml                    24 H100: memory, seconds, GPU-hours
    copd plan configs/three_branch_qwen3_vl_4b.yaml --gpus 24 --search the best layouts, and why others lose
    copd plan configs/three_branch_qwen3_vl_235b_a22b.yaml --gpus 1024
    copd plan my.yaml --gpu h200 --response-tokens text=4000:16000 --media-tokens video=6000
    copd plan my.yaml --from runs/my                                   overheads of a run of yours
    copd plan --measure cpu.yaml                                       this CPU's figures, for --machines
"""


@click.command("plan", cls=Command, examples=EXAMPLES)
@click.argument("config", required=False)
@OVERRIDES
@click.option(
    "--gpu", default=None, help="h100, h200, b200, cpu or a machine of --machines. Default: by run.device."
)
@click.option(
    "--gpus", type=COUNT, help="Ranks of the job; with more or fewer than the layout has, searches."
)
@click.option("--search", "searches", is_flag=True, help="Find the best layouts.")
@click.option(
    "--prompt-tokens", "prompts", multiple=True, metavar="[BRANCH=]MEAN[:P99]", help="Length of prompts."
)
@click.option(
    "--response-tokens", "responses", multiple=True, metavar="[BRANCH=]MEAN[:P99]", help="Of responses."
)
@click.option(
    "--media-tokens",
    "media",
    multiple=True,
    metavar="[BRANCH=]MEAN",
    help="Of a prompt's tokens, those of media.",
)
@click.option("--machines", type=PATH, help="A file like copd_megatron/planner/machines.yaml.")
@click.option(
    "--from", "run_dir", type=PATH, metavar="RUN_DIR", help="Take overheads from a run's own timings."
)
@click.option("--measure", type=PATH, metavar="FILE", help="Measure this CPU and write its figures.")
@click.option(
    "--nodes-per-switch",
    type=COUNT,
    help="Nodes that hang on one switch, for the placement. Default: all of them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a record instead of tables.")
def command(
    config: str | None,
    overrides: tuple[str, ...],
    gpu: str | None,
    gpus: int | None,
    searches: bool,
    prompts: tuple[str, ...],
    responses: tuple[str, ...],
    media: tuple[str, ...],
    machines: Path | None,
    run_dir: Path | None,
    measure: Path | None,
    nodes_per_switch: int | None,
    as_json: bool,
) -> int:
    """Plan a run before paying for it.

    Prints memory of a rank by part, seconds of a step by part, bytes by link, GPU-hours of the schedule, the
    cost of one more branch and where ranks run. Needs no weights and no GPU: CONFIG's model may be a folder
    with a config.json, or the name of a published model. A mean length without a 99th percentile means that
    all have that length; without any, prompts and responses are a quarter of their limits, with the limit as
    99th percentile.
    """
    if measure is not None:
        from copd_megatron.planner.measure import measured_cpu

        write_machine(measured_cpu(read_machine("cpu", machines)), measure)
        say(f"wrote {measure}; use it with: copd plan CONFIG --gpu cpu --machines {measure}")
        return 0
    if config is None:
        raise click.UsageError("CONFIG is missing.", click.get_current_context())
    settings = load_config(config, overrides)
    machine = read_machine(gpu or ("cpu" if settings.run.device.value == "cpu" else "h100"), machines)
    inputs = Inputs(
        config=settings,
        shapes=read_model_sizes(settings),
        lengths=lengths_of(settings, prompts, responses, media),
        machine=machine,
    )
    if run_dir is not None:
        inputs = _calibrated(inputs, run_dir)
    return _print(inputs, gpus, nodes_per_switch, searches=searches, as_json=as_json)


def _print(
    inputs: Inputs, gpus: int | None, nodes_per_switch: int | None, *, searches: bool, as_json: bool
) -> int:
    plan = make_plan(inputs)
    more = one_more_branch(inputs, plan)
    found = None
    if searches or (gpus is not None and gpus != plan.ranks) or plan.problems:
        found = search(inputs, gpus or plan.ranks)
    if as_json:
        say(dumped(record(inputs, plan, more, found), indent=1))
        return 2 if plan.problems else 0
    with reader_may_leave():
        say(describe(inputs, plan, more))
        say(f"\n# Placement\n{_placement(inputs, nodes_per_switch)}")
        if found is not None:
            say("\n" + describe_search(found, gpus or plan.ranks))
    return 2 if plan.problems else 0


def _placement(inputs: Inputs, nodes_per_switch: int | None) -> str:
    """Which branch is on which nodes and switches."""
    from copd_megatron.config.graph import build_graph
    from copd_megatron.launch.placement import PlacementError, place
    from copd_megatron.launch.switches import arrange
    from copd_megatron.topology.layout import Layout

    try:
        layout = Layout.from_config(inputs.config)
        placed = place(layout, num_nodes=None, ranks_per_node=inputs.machine.ranks_per_node)
    except (PlacementError, ValueError) as error:
        return str(error)
    if nodes_per_switch is None:
        return placed.describe()
    hosts = [f"node{number}" for number in range(placed.num_nodes)]
    switch_of = {host: str(number // nodes_per_switch) for number, host in enumerate(hosts)}
    arranged = arrange(placed, layout, hosts, switch_of, build_graph(inputs.config).edges)
    return f"{placed.describe()}\n{arranged.describe()}"


def lengths_of(
    config: Config, prompts: tuple[str, ...], responses: tuple[str, ...], media: tuple[str, ...]
) -> dict[str, BranchLengths]:
    """Lengths by branch, from options of the form ``BRANCH=MEAN:P99`` or, for all branches, ``MEAN:P99``."""
    found = {}
    for name, branch in config.branches.items():
        limits = (branch.data.max_prompt_tokens, branch.rollout.max_new_tokens)
        texts = (_of_branch(prompts, name, config), _of_branch(responses, name, config))
        prompt, response = (_lengths(text, limit) for text, limit in zip(texts, limits, strict=True))
        shown = _of_branch(media, name, config)
        found[name] = BranchLengths(prompt=prompt, response=response, media_tokens=float(shown or 0))
    return found


def _lengths(text: str | None, limit: int) -> Lengths:
    return (
        Lengths(mean=max(limit / 4, 1), p99=limit, limit=limit)
        if text is None
        else parse_lengths(text, limit)
    )


def _of_branch(options: tuple[str, ...], name: str, config: Config) -> str | None:
    """What an option says of a branch: its own, else the one for all."""
    found = None
    for option in options:
        branch, equals, value = option.partition("=")
        if equals and branch not in config.branches:
            raise click.UsageError(f"{option}: no branch {branch!r}; there are {', '.join(config.branches)}.")
        if not equals:
            found = found or option
        elif branch == name:
            found = value
    return found


def _calibrated(inputs: Inputs, run_dir: Path) -> Inputs:
    """The machine with the figures that a run's own timings give."""
    from copd_megatron.report.planned import calibrated_by_run

    return calibrated_by_run(inputs, run_dir)
