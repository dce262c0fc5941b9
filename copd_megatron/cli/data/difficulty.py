"""``copd data difficulty``."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import say
from copd_megatron.cli.parameters import COUNT, OVERRIDES, PATH, TEMPERATURE, TOP_K, Finite, log_plainly
from copd_megatron.config import Config, ConfigError, load_config
from copd_megatron.config.domains import Domain, domains_by_name
from copd_megatron.data.pass_rates import PassRates
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.launch.caches import usable_caches

EXAMPLES = """
    copd data difficulty my.yaml --domain text --out data/text-pass-rates.jsonl
    copd data difficulty my.yaml --domain text --out part.jsonl --limit 500 --model runs/a/export/text
    torchrun --nproc-per-node 8 -m copd_megatron.cli data difficulty my.yaml --domain text --out text.jsonl

Then train with branches.text.data.pass_rates=data/text-pass-rates.jsonl and, for example,
branches.text.data.difficulty.balance=u_shape.
"""


@click.command("difficulty", cls=Command, examples=EXAMPLES)
@click.argument("config")
@OVERRIDES
@click.option("--domain", help="A branch, or one of its pools; default: the only one there is.")
@click.option("--out", type=PATH, required=True, help="The index, JSON lines; goes on if it is begun.")
@click.option("--model", help="Hugging Face folder; default: what the branch starts from.")
@click.option("--num-samples", type=COUNT, default=8, show_default=True, help="Responses to each prompt.")
@click.option(
    "--temperature", type=TEMPERATURE, default=1.0, show_default=True, help="Of sampling; 0: greedy."
)
@click.option(
    "--top-p",
    type=Finite(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Sample from the most probable tokens that together hold this probability.",
)
@click.option(
    "--top-k",
    type=TOP_K,
    default=50,
    show_default=True,
    help="Sample from this many most probable tokens; -1: from all.",
)
@click.option(
    "--at-once",
    "num_at_once",
    type=COUNT,
    default=256,
    show_default=True,
    help="Prompts between two writes; an interruption costs no more.",
)
@click.option("--limit", type=COUNT, help="Stop after this many prompts.")
def command(
    config: str,
    overrides: tuple[str, ...],
    domain: str | None,
    out: Path,
    model: str | None,
    num_samples: int,
    temperature: float,
    top_p: float,
    top_k: int,
    num_at_once: int,
    limit: int | None,
) -> int:
    """Measure how often a model solves each training prompt.

    CONFIG is a YAML file, whose shards, verifiers and longest response are used. Training reads the index to
    repeat prompts of medium difficulty and to leave out others (data.pass_rates, data.difficulty).
    Interrupted, the same command goes on where it stopped. Under torchrun or srun all ranks sample.
    """
    log_plainly()
    usable_caches()
    settings = load_config(config, overrides)
    chosen = _domain(settings, domain)
    folder = model or settings.branches[chosen.branch].model_path or settings.model.path
    read_model_shape(folder, "model")  # refused here, before the engines take their time to import

    from copd_megatron.evaluation.difficulty import Scoring, score_difficulty

    scoring = Scoring(
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_at_once=num_at_once,
        limit=limit,
    )
    index = score_difficulty(settings, chosen, folder, out, scoring)
    if int(os.environ.get("RANK", "0")) == 0:
        say(_summary(index))
    return 0


def _domain(config: Config, name: str | None) -> Domain:
    domains = {key: domain for key, domain in domains_by_name(config).items() if domain.train}
    if name is None and len(domains) == 1:
        (name,) = domains
    if name not in domains:
        known = ", ".join(domains) or "none"
        what = "missing" if name is None else f"{name!r} has no training shards"
        raise ConfigError(f"data difficulty: --domain is {what}; domains with training shards: {known}")
    return domains[name]


def _summary(index: PassRates) -> str:
    """Prompts by their number of correct responses."""
    counts = Counter(index.num_correct.values())
    lines = [f"{index.path}: {len(index.num_correct)} prompts by correct responses"]
    lines += [f"  {c:>3} of {index.num_samples}: {counts[c]:>7}" for c in range(index.num_samples + 1)]
    if counts[None]:
        lines.append(f"  could not be used: {counts[None]}")
    return "\n".join(lines)
