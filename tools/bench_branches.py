#!/usr/bin/env python
"""What one more branch costs: real exchanges of K = 2 .. 16 branches over Gloo, beside the formulas.

    python tools/bench_branches.py                 hub and spoke, and all to all
    python tools/bench_branches.py --branches 2 4 8 --rows 64 --tokens 1024 --repeats 5

Every branch is a process with the real world, watch and router, and no model: its score function returns
zeros.
Per exchange, of E edges with R rows of T tokens, half of them responses, one lane each:

    messages   4 E                        header and payload, out and back
    bytes      E R (4 T + 4 T / 2)        ``planner/traffic.router_bytes``; measured ones have headers too
    hub        1/2 of them in hub and spoke, 1/K in all to all

Seconds are the slowest rank's, median [least, largest] of the repeats, after one exchange that connects. The
last column is computed: the share of a step of Phase II that the busiest teacher scores for others, for
Qwen3-VL-4B on 8 H100 a branch (``planner/``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import _tree
import numpy as np
import torch
from _numbers import count

from copd_megatron.config import Config, load_config, read_model_sizes
from copd_megatron.config.graph import Edge, Graph, build_graph
from copd_megatron.config.schema import BranchConfig, OPDConfig, Topology
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.opd.router import Router
from copd_megatron.planner.lengths import Lengths
from copd_megatron.planner.machine import read_machine
from copd_megatron.planner.more_branches import with_copy
from copd_megatron.planner.plan import Inputs, make_plan
from copd_megatron.planner.show import table
from copd_megatron.planner.traffic import edge_count, router_bytes
from copd_megatron.planner.workload import BranchLengths
from copd_megatron.records import Ask
from copd_megatron.topology.store import serve_store
from copd_megatron.topology.world import init_world

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement."""

    topology: Topology
    branches: int
    rows: int
    tokens: int
    repeats: int

    def graph(self) -> Graph:
        """Its edges, of ``rows`` rows each."""
        branch = BranchConfig(num_prompts_per_step=self.rows, num_generations_per_prompt=1)
        names = [f"b{i}" for i in range(self.branches)]
        return build_graph(
            Config(branches=dict.fromkeys(names, branch), opd=OPDConfig(topology=self.topology))
        )


def rank_main(setting: Setting, rank: int, port: int, results: SimpleQueue[Any]) -> None:
    """One branch of one rank."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(setting.branches), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    torch.set_num_threads(1)
    graph = setting.graph()
    ranks = {f"b{i}": [i] for i in range(setting.branches)}
    with init_world(ranks, device="cpu", timeout_seconds=TIMEOUT_SECONDS, run_id="bench") as world:
        router = Router(world, graph)
        outgoing = {edge: rows_of(setting, edge) for edge in graph.into(world.branch)}
        seconds, processor = [], []
        for _ in range(setting.repeats + 1):
            world.barrier("bench")
            begin, used = time.monotonic(), time.process_time()
            router.exchange(outgoing, zeros)
            seconds.append(time.monotonic() - begin)
            processor.append(time.process_time() - used)
        sent = sum(t.sent_bytes for t in router.traffic.values())
        results.put((rank, sent, seconds[1:], processor[1:]))


def rows_of(setting: Setting, edge: Edge) -> list[ScoreRequest]:
    """Rows of random ids, half of them responses."""
    rng = np.random.default_rng(sum(edge.name.encode()))
    half = setting.tokens // 2
    return [
        ScoreRequest(
            row_id=number,
            token_ids=rng.integers(0, 150_000, setting.tokens, dtype=np.int32),
            prompt_length=setting.tokens - half,
            weight_version=0,
            ask=Ask(tokens=True),
        )
        for number in range(setting.rows)
    ]


def zeros(edge: Edge, rows: list[ScoreRequest]) -> list[TeacherScore]:
    """What a teacher without a model says."""
    return [
        TeacherScore(
            row_id=r.row_id, weight_version=0, logprobs=np.zeros(r.response_length, dtype=np.float32)
        )
        for r in rows
    ]


def measure(setting: Setting) -> dict[str, Any]:
    """Runs one setting on real processes, forked from this one."""
    from datetime import timedelta

    store = serve_store("127.0.0.1", 0, timedelta(seconds=TIMEOUT_SECONDS))
    context = multiprocessing.get_context("fork")
    results: SimpleQueue[Any] = context.SimpleQueue()
    ranks = [
        context.Process(target=rank_main, args=(setting, rank, store.port, results), daemon=True)
        for rank in range(setting.branches)
    ]
    for process in ranks:
        process.start()
    found = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    steps = list(zip(*(seconds for _, _, seconds, _ in found), strict=True))
    work = list(zip(*(processor for _, _, _, processor in found), strict=True))
    return {
        "sent": sum(sent for _, sent, _, _ in found),
        "hub_sent": next(sent for rank, sent, _, _ in found if rank == 0),
        "seconds": [max(step) for step in steps],
        "processor": [sum(step) for step in work],
    }


def teaching_share(topology: Topology, branches: int) -> float:
    """Of a step of Phase II of Qwen3-VL-4B on 8 H100 a branch, by the planner."""
    path = Path(_tree.__file__).resolve().parents[1] / "configs/three_branch_qwen3_vl_4b.yaml"
    config = load_config(path, [f"opd.topology={topology.value}"])
    fixed = {n: Lengths(mean=n, p99=n, limit=n) for n in (1000, 4000)}
    lengths = BranchLengths(prompt=fixed[1000], response=fixed[4000])
    for name in list(config.branches)[branches:]:
        del config.branches[name]
    inputs = Inputs(
        config=config,
        shapes=read_model_sizes(config),
        lengths=dict.fromkeys(config.branches, lengths),
        machine=read_machine("h100"),
    )
    while len(inputs.config.branches) < branches:
        grown = with_copy(inputs, list(inputs.config.branches)[-1])
        inputs = replace(inputs, config=grown.config, shapes=grown.shapes, lengths=grown.lengths)
    plan = make_plan(inputs)
    taught = max(b.steps["opd"].seconds.teaching for b in plan.branches)
    return taught / plan.phases["opd"].step_seconds


def row_of(setting: Setting, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    edges = setting.graph().edges
    assert len(edges) == edge_count(setting.topology, setting.branches)
    formula = router_bytes(edges, sequence_tokens=setting.tokens, response_tokens=setting.tokens // 2)
    seconds, processor = found["seconds"], found["processor"]
    rate = found["sent"] / 1e6 / statistics.median(seconds)
    return [
        setting.topology.value, str(setting.branches), str(len(edges)), str(4 * len(edges)),
        f"{found['sent'] / 1e6:.2f}", f"{formula / 1e6:.2f}", f"{found['sent'] / formula:.4f}",
        f"{found['hub_sent'] / found['sent']:.2f}",
        f"{statistics.median(seconds):.3f} [{min(seconds):.3f}, {max(seconds):.3f}]",
        f"{statistics.median(processor):.3f}", f"{1e3 * statistics.median(processor) / len(edges):.1f}",
        f"{rate:.0f}",
        f"{teaching_share(setting.topology, setting.branches):.1%}",
    ]  # fmt: skip


HEADER = [
    "topology", "K", "edges", "messages", "MB sent", "MB by formula", "ratio", "hub sends", "seconds",
    "processor s", "ms an edge", "MB/s", "teaching share",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--branches", type=count, nargs="+", default=[2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--rows", type=count, default=64, help="of an edge")
    parser.add_argument("--tokens", type=count, default=2048, help="of a row")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    rows, records = [HEADER], []
    for topology in (Topology.hub_and_spoke, Topology.all_to_all):
        for branches in arguments.branches:
            setting = Setting(
                topology=topology,
                branches=branches,
                rows=arguments.rows,
                tokens=arguments.tokens,
                repeats=arguments.repeats,
            )
            found = measure(setting)
            records.append({"topology": topology.value, "branches": branches, **found})
            rows.append(row_of(setting, found))
            print("\t".join(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
