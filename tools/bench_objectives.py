#!/usr/bin/env python3
"""Time the objectives of distillation against sampled_token, and count their bytes against the formula.

    python tools/bench_objectives.py .cache/tiny_text
    python tools/bench_objectives.py .cache/tiny_text --rows 256 --response 48 --top-k 16 --json

On one process, in turn, ``--repeats`` times: the teacher's scoring pass with what the objective asks, the
student's own where it needs one, and the update of the same rows (forward, backward, optimizer). The teacher
has the student's weights. Bytes are those of the messages that the router would send, both ways, without
their tables and headers. Ratios are to sampled_token in the same run, with their smallest and largest over
repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _numbers import count, count_or_none

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

PHASES = ("own", "teacher", "update")


@dataclass
class Measured:
    """One objective's figures."""

    name: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    num_bytes: int = 0
    formula_bytes: int = 0

    def step(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of a text model")
    parser.add_argument("--rows", type=count, default=128)
    parser.add_argument("--prompt", type=count_or_none, default=24, help="tokens of a prompt")
    parser.add_argument("--response", type=count, default=48, help="tokens of a response")
    parser.add_argument("--top-k", type=count, default=16)
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser.parse_args(arguments)


def objectives(top_k: int) -> dict[str, dict[str, Any]]:
    """What is measured: a name, and settings of ``opd``."""
    from copd_megatron.config.schema import DistributionConfig, Divergence, Support

    def topk(support: Support, **more: Any) -> dict[str, Any]:
        return {
            "objective": "topk",
            "distribution": DistributionConfig(top_k=top_k, support=support, **more),
        }

    return {
        "sampled_token": {"objective": "sampled_token"},
        "topk teacher": topk(Support.teacher),
        "topk student": topk(Support.student),
        "topk union": topk(Support.union),
        "topk union, jsd, entropy": topk(Support.union, divergence=Divergence.jsd, entropy_threshold=0.5),
        "full": {"objective": "full"},
    }


def measure(options: argparse.Namespace) -> list[Measured]:
    from copd_megatron.topology.single import single_process

    with single_process():
        actor, rollouts = _actor(options), _rollouts(options)
        built = {name: _objective(settings) for name, settings in objectives(options.top_k).items()}
        measured = {name: Measured(name) for name in built}
        for repeat in range(options.repeats + 1):  # the first warms up
            for name, objective in built.items():
                seconds = _step(actor, rollouts, objective, measured[name])
                for phase, value in seconds.items() if repeat else ():
                    measured[name].seconds[phase].append(value)
    return list(measured.values())


def _actor(options: argparse.Namespace) -> Any:
    import torch

    from copd_megatron.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
    from copd_megatron.policy.actor import MegatronActor

    return MegatronActor(
        model_path=options.model,
        parallel=ParallelConfig(),
        training=TrainingConfig(micro_batch_tokens=8192, max_weight_lag=10**6),
        optimizer=OptimizerConfig(lr=1e-6),
        dtype=torch.float32,
        max_tokens=options.prompt + options.response,
        temperature=1.0,
        seed=1,
        total_steps=1000,
    )


def _rollouts(options: argparse.Namespace) -> list[Any]:
    """Random tokens: time does not depend on what they say."""
    from copd_megatron.hf.model_config import read_model_shape
    from copd_megatron.records import Prompt, Rollout

    rng = np.random.default_rng(0)
    vocab = read_model_shape(options.model).vocab_size
    rollouts = []
    for i in range(options.rows):
        ids = rng.integers(0, vocab, options.prompt + options.response).astype(np.int32)
        prompt = Prompt(
            prompt_id=f"bench/{i}", domain="bench", token_ids=ids[: options.prompt], answer="", verifier=""
        )
        rollouts.append(
            Rollout(
                prompt=prompt,
                sample_index=0,
                token_ids=ids,
                text="",
                truncated=False,
                weight_version=0,
                rollout_logprobs=np.zeros(options.response, np.float32),
                seed=0,
                reward=0.0,
            )
        )
    return rollouts


def _objective(settings: dict[str, Any]) -> Any:
    from copd_megatron.config.graph import Edge
    from copd_megatron.config.schema import BranchConfig, Config, OPDConfig
    from copd_megatron.objectives.base import Context
    from copd_megatron.plugins import OBJECTIVES

    config = Config(branches={"a": BranchConfig(), "b": BranchConfig()}, opd=OPDConfig(**settings))
    edge = Edge(
        student="a", teacher="b", prompts="b", beta=1.0, num_prompts=1, num_generations=1,
        objective=settings["objective"],
    )  # fmt: skip
    factory: Any = OBJECTIVES.load(settings["objective"], "opd.objective")
    return factory.of(Context(config=config, branch="a", edge=edge))


def _step(actor: Any, rollouts: list[Any], objective: Any, into: Measured) -> dict[str, float]:
    """Scores and trains once; seconds by phase."""
    from copd_megatron.objectives.base import Material

    begin = time.perf_counter()
    own = actor.log_probs(rollouts, top_k=objective.asks_own.top_k)
    scored = time.perf_counter()
    asks = objective.asks
    support = [said.top.ids for said in own] if asks.support else None
    positions = [asks.of_row(r.response_length).positions for r in rollouts]
    theirs = actor.log_probs(rollouts, positions, top_k=asks.top_k, support=support)
    taught = time.perf_counter()
    rows = objective.rows(
        Material(
            rollouts=rollouts,
            component="cross:b",
            old_logprobs=[s.logprobs for s in own],
            teacher_logprobs=[s.logprobs for s in theirs],
            own_top=[s.top for s in own] if objective.asks_own.top_k else None,
            teacher_top=[s.top for s in theirs] if asks.top_k else None,
            teacher_on_support=[s.support_logprobs for s in theirs] if asks.support else None,
            teacher_distributions=[s.state_logprobs for s in theirs] if asks.everywhere else None,
            teacher_entropy=[s.entropy for s in theirs] if asks.entropy else None,
        )
    )
    actor.forward_backward(rows, objective.token_loss())
    actor.optimizer_step()
    ended = time.perf_counter()
    if not into.num_bytes:
        _count(rollouts, own, theirs, asks, into)
    return {"own": scored - begin, "teacher": taught - scored, "update": ended - taught}


def _count(rollouts: list[Any], own: list[Any], theirs: list[Any], asks: Any, into: Measured) -> None:
    """Bytes of the messages, without tables and headers, and what the planner says."""
    from copd_megatron.opd.records import ScoreRequest, TeacherScore
    from copd_megatron.opd.wire import pack_requests, pack_scores
    from copd_megatron.planner.traffic import router_bytes

    count = range(len(rollouts))
    requests = [
        ScoreRequest(
            row_id=i, token_ids=r.token_ids, prompt_length=r.prompt_length, weight_version=0,
            ask=asks.of_row(r.response_length), support_ids=own[i].top.ids if asks.support else None,
        )
        for i, r in enumerate(rollouts)
    ]  # fmt: skip
    scores = [
        TeacherScore(
            row_id=i, weight_version=0, logprobs=said.logprobs, distributions=said.state_logprobs,
            top=said.top, support_logprobs=said.support_logprobs,
            entropy=said.entropy if asks.entropy else None,
        )
        for i, said in enumerate(theirs)
    ]  # fmt: skip
    sent = pack_requests(requests, count, exchange=1, edge=0, lane=0).payload.nbytes
    answered = pack_scores(scores, count, exchange=1, edge=0, lane=0, crc=0).payload.nbytes
    into.num_bytes = sent + answered - len(rollouts) * (12 + 11) * 8
    edge = replace(_edge(), num_prompts=len(rollouts), num_generations=1)
    into.formula_bytes = router_bytes(
        [edge],
        sequence_tokens=len(rollouts[0].token_ids),
        response_tokens=rollouts[0].response_length,
        vocab_size=theirs[0].state_logprobs.shape[1],
        ask=asks,
        support_k=own[0].top.ids.shape[1] if asks.support else 0,
    )


def _edge() -> Any:
    from copd_megatron.config.graph import Edge

    return Edge(student="a", teacher="b", prompts="b", beta=1.0, num_prompts=1, num_generations=1)


def table(measured: list[Measured], num_tokens: int) -> str:
    """The figures as text."""
    first = measured[0]
    titles = f"{'objective':26} {'own':>7} {'teacher':>8} {'update':>7} {'step, of sampled_token':>26}"
    lines = [f"{titles}  bytes/token"]
    for one in measured:
        ratios = sorted(a / b for a, b in zip(one.step(), first.step(), strict=True))
        middle = {phase: statistics.median(values) for phase, values in one.seconds.items()}
        lines.append(
            f"{one.name:26} {middle['own']:7.3f} {middle['teacher']:8.3f} {middle['update']:7.3f} "
            f"{statistics.median(ratios):10.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            f"  {one.num_bytes / num_tokens:9.1f} (formula {one.formula_bytes / num_tokens:.1f})"
        )
    return "\n".join(lines)


def main() -> int:
    options = parse_arguments()
    measured = measure(options)
    if options.json:
        print(json.dumps([vars(one) for one in measured], indent=2))
    else:
        print(table(measured, options.rows * options.response))
    return 0


if __name__ == "__main__":
    sys.exit(main())
