"""A plan as text for people, and as a record for JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from copd_megatron.planner.memory import GIB, MemoryEstimate
from copd_megatron.planner.more_branches import OneMore
from copd_megatron.planner.plan import BranchPlan, Inputs, Plan
from copd_megatron.planner.search import Found

MEMORY_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "extra_models",
    "media",
    "weight_sync",
    "engine_weights",
    "kv_cache",
)


def describe(inputs: Inputs, plan: Plan, more: OneMore | None = None) -> str:
    """The plan in sections: assumptions, memory, seconds, links, the whole run, one more branch."""
    sections = [
        ("Assumptions", list(_assumptions(inputs))),
        ("Memory of a rank, GiB", _memory_table(plan.branches, inputs.machine.process_gib)),
    ]
    for phase in plan.phases:
        sections.append((f"Seconds of a step, {_PHASE[phase]}", list(_seconds_table(plan, phase))))
    sections.append(("Sent by a rank in a step", _links_table(plan)))
    sections.append(("The whole schedule", list(_whole(plan))))
    if more is not None:
        sections.append((f"One more branch like {more.copied}", list(_more(more))))
    if plan.problems:
        sections.append(("This cannot run", list(plan.problems)))
    return "\n\n".join(f"# {title}\n" + "\n".join(lines) for title, lines in sections)


_PHASE = {"rlvr": "Phase I", "opd": "Phase II"}


def _assumptions(inputs: Inputs) -> Iterator[str]:
    machine = inputs.machine
    yield (
        f"{machine.name}: {machine.memory_gib:g} GiB, {machine.tflops:g} TFLOP/s, "
        f"{machine.ranks_per_node} ranks a node"
    )
    for name, lengths in inputs.lengths.items():
        prompt, response = lengths.prompt, lengths.response
        media = f", {lengths.media_tokens:,.0f} of a prompt's are media" if lengths.media_tokens else ""
        yield (
            f"{name}: prompts of {prompt.average:,.0f} tokens (99 %: {prompt.quantiles(100)[98]:,.0f}), "
            f"responses of {response.average:,.0f} (99 %: {response.quantiles(100)[98]:,.0f}){media}"
        )


def _memory_table(branches: Sequence[BranchPlan], process_gib: float) -> list[str]:
    shown = [part for part in MEMORY_PARTS if any(getattr(b.memory, part) for b in branches)]
    header = [
        "branch",
        "ranks",
        *(part.replace("_", " ") for part in shown),
        "process",
        "needed",
        "in host memory",
    ]
    rows = [header]
    for b in branches:
        parts = [f"{getattr(b.memory, part) / GIB:.2f}" for part in shown]
        rows.append(
            [
                b.name,
                str(b.ranks),
                *parts,
                f"{process_gib:.2f}",
                f"{b.needed_bytes / GIB:.2f}",
                f"{b.memory.host / GIB:.2f}",
            ]
        )
    notes = [_turns(b.name, b.memory) for b in branches if b.memory.rollout_sleeps]
    return [*table(rows), *notes]


def _turns(name: str, memory: MemoryEstimate) -> str:
    return (
        f"{name}: the larger of two turns: {memory.training / GIB:.1f} while the actor works, "
        f"{memory.sampling / GIB:.1f} while vLLM does"
    )


def _seconds_table(plan: Plan, phase: str) -> Iterator[str]:
    part = plan.phases[phase]
    names = list(plan.branches[0].steps[phase].seconds.parts())
    rows = [["branch", *(name.replace("_", " ") for name in names), "waiting", "step"]]
    for b in plan.branches:
        seconds = b.steps[phase].seconds.parts()
        waiting = part.waiting[b.name]
        rows.append(
            [b.name, *(_number(seconds[n]) for n in names), _number(waiting), _number(part.step_seconds)]
        )
    yield from table(rows)
    taught = max(b.steps[phase].seconds.teaching for b in plan.branches)
    yield (
        f"{part.num_steps} steps; {part.sampled_tokens:,.0f} response tokens and "
        f"{_bytes(part.router_bytes)} over the router in a step; teaching takes "
        f"{taught / part.step_seconds:.1%} of it"
    )


def _links_table(plan: Plan) -> list[str]:
    phase = list(plan.phases)[-1]
    purposes = [link.purpose for link in plan.branches[0].steps[phase].links]
    rows = [["branch", *purposes]]
    for b in plan.branches:
        cells = []
        for link in b.steps[phase].links:
            where = "" if not link.num_bytes else " node" if link.inside_node else " cluster"
            cells.append(f"{_bytes(link.num_bytes)}{where}" if link.num_bytes else "-")
        rows.append([b.name, *cells])
    return [f"({_PHASE[phase]})", *table(rows)]


def _whole(plan: Plan) -> Iterator[str]:
    steps = sum(p.num_steps for p in plan.phases.values())
    yield (
        f"{steps} steps on {plan.ranks} ranks: {plan.seconds / 3600:,.1f} hours, {plan.gpu_hours:,.0f} "
        f"{'GPU' if plan.machine != 'cpu' else 'core'}-hours, {plan.sampled_tokens:,.0f} response tokens "
        "(without start, evaluation and checkpoints)"
    )


def _more(more: OneMore) -> Iterator[str]:
    yield f"{more.ranks:+d} ranks, {more.edges:+d} edges, {more.gpu_hours:+,.0f} GPU-hours"
    for phase, seconds in more.step_seconds.items():
        carried = _bytes(more.router_bytes[phase])
        yield f"a step of {_PHASE[phase]}: {seconds:+.3g} s, {carried} more over the router"


def describe_search(found: Found, ranks: int) -> str:
    """The best layouts, those that lose and those that cannot run."""
    lines = [f"# Best layouts on at most {ranks} ranks ({found.num_tried:,} tried)"]
    if found.plan is None or found.best is None:
        lines.append("none fits")
    else:
        lines += [
            f"{name}: {choice.text} ({choice.plan.ranks} ranks)" for name, choice in found.choices.items()
        ]
        recompute = found.best.config.training.recompute.value
        lines.append(
            f"training.recompute={recompute}: {found.plan.seconds / 3600:,.1f} hours, "
            f"{found.plan.gpu_hours:,.0f} GPU-hours"
        )
        lines += [f"but: {problem}" for problem in found.plan.problems]
        lines += ["", "# The next ones, each with one branch changed"]
        lines += [f"{one.text}: {one.reason}" for one in found.others] or ["there are none"]
    if found.refused:
        lines += ["", "# What cannot run, for instance"]
        lines += [f"{text}: {reason}" for text, reason in found.refused[:10]]
    return "\n".join(lines)


def record(inputs: Inputs, plan: Plan, more: OneMore | None, found: Found | None) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "machine": asdict(inputs.machine),
        "ranks": plan.ranks,
        "branches": {b.name: _branch_record(b) for b in plan.branches},
        "phases": {name: asdict(phase) for name, phase in plan.phases.items()},
        "hours": plan.seconds / 3600,
        "gpu_hours": plan.gpu_hours,
        "sampled_tokens": plan.sampled_tokens,
        "problems": list(plan.problems),
        "one_more_branch": None if more is None else asdict(more),
        "search": None if found is None else _search_record(found),
    }


def _branch_record(branch: BranchPlan) -> dict[str, Any]:
    return {
        "ranks": branch.ranks,
        "memory_bytes": {part: getattr(branch.memory, part) for part in MEMORY_PARTS},
        "needed_bytes": branch.needed_bytes,
        "host_bytes": branch.memory.host,
        "refusal": branch.refusal,
        "seconds": {phase: step.seconds.parts() for phase, step in branch.steps.items()},
        "links": {
            phase: {link.purpose: link.num_bytes for link in step.links}
            for phase, step in branch.steps.items()
        },
    }


def _search_record(found: Found) -> dict[str, Any]:
    return {
        "tried": found.num_tried,
        "best": {name: choice.text for name, choice in found.choices.items()},
        "seconds": None if found.plan is None else found.plan.seconds,
        "others": [asdict(one) for one in found.others],
        "refused": [list(one) for one in found.refused],
    }


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def _bytes(count: float) -> str:
    units: Mapping[str, float] = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
    for unit, size in units.items():
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
