"""``copd eval``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from copd_megatron.cli.group import Command
from copd_megatron.cli.output import refuse_other_record, say
from copd_megatron.cli.parameters import PATH, log_plainly
from copd_megatron.config import load_config
from copd_megatron.config.checks.switches import greedy_repeats
from copd_megatron.errors import ConfigError
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.launch.caches import usable_caches
from copd_megatron.untrusted.whole_file import write_whole

if TYPE_CHECKING:
    from copd_megatron.evaluation.verdicts import PromptVerdicts

TABLES = ("evaluation.json", "evaluation.md")
BENCHMARK = "benchmark"
"""Metadata that shards of ``copd data benchmark`` have."""
EXAMPLES = """
    copd eval configs/two_branch_tiny.yaml runs/two_branch_tiny/export/merged
    copd eval configs/two_branch_tiny.yaml .cache/tiny_text evaluation.max_prompts=50
    copd eval my.yaml base export/text export/merged evaluation.num_generations_per_prompt=8 \\
        evaluation.temperature=1 --by level --out evaluations/mine
    torchrun --nproc-per-node 8 -m copd_megatron.cli eval my.yaml export/merged
"""


@click.command("eval", cls=Command, examples=EXAMPLES)
@click.argument("config")
@click.argument("words", nargs=-1, required=True, metavar="MODEL... [KEY=VALUE]...")
@click.option("--out", type=PATH, help="Folder for verdicts and tables; default: RUN_DIR/eval.")
@click.option("--by", multiple=True, metavar="KEY", help="Also by this metadata key, or by verifier.")
@click.option("--overwrite", is_flag=True, help="Measure anew what --out holds already.")
def command(
    config: str, words: tuple[str, ...], out: Path | None, by: tuple[str, ...], overwrite: bool
) -> int:
    """Measure models on validation sets.

    CONFIG is a YAML file, whose validation sets, verifiers and sampling settings are used; a MODEL is a
    Hugging Face folder, such as an exported branch or a merged model, or a branch's folder in a checkpoint.
    Several models answer the same prompts, and every other one is compared with the first. They may differ
    in shape and tokenizer; each kind has an engine of its own, one after the other.

    Prints tables with 95 % intervals and writes them to --out as evaluation.json and evaluation.md; for
    prompts of the paper's benchmarks (copd data benchmark) also the paper's table, with the figures that it
    reports. Verdicts are written as they come: the same command goes on where it was stopped. Under torchrun
    or srun all ranks take part.
    """
    models = [word for word in words if "=" not in word or Path(word).is_dir()]
    settings = load_config(config, [word for word in words if word not in models])
    for problem in greedy_repeats(settings):
        raise ConfigError(problem)
    if not models:
        raise click.UsageError("name at least one MODEL.", click.get_current_context())
    for model in models:  # refused here, before the engines take their time to import
        if not any(Path(model).glob(".metadata")) and not any(Path(model).glob("manifest.json")):
            read_model_shape(model, "model")
    folder = out or Path(settings.run.dir or f"runs/{settings.run.name}") / "eval"
    refuse_other_record(
        folder / TABLES[0], ("models", "means"), "result of copd eval", beside=[folder / TABLES[1]]
    )
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        log_plainly()
    usable_caches()

    from copd_megatron.evaluation.models import evaluate_models, open_models

    verdicts = evaluate_models(settings, open_models(models), folder, anew=overwrite)
    if first:
        write_tables(verdicts, folder, by)
    return 0


def write_tables(verdicts: Mapping[str, Sequence[PromptVerdicts]], folder: Path, by: Sequence[str]) -> None:
    """Prints the tables and writes them to the folder.

    Raises ConfigError: no prompt has a metadata key of ``by``.
    """
    from copd_megatron.evaluation.paper import paper_tables, published
    from copd_megatron.evaluation.run import score_of
    from copd_megatron.evaluation.show import to_json, to_markdown, to_text
    from copd_megatron.evaluation.summary import summarise
    from copd_megatron.evaluation.table import render_table

    has_benchmarks = any(BENCHMARK in v.metadata for found in verdicts.values() for v in found)
    groups = dict.fromkeys([*by, *([BENCHMARK] if has_benchmarks else [])])
    summary = summarise(verdicts, by=tuple(groups))
    missing = [key for key in by if not any(summary.by[key].values())]
    if missing:
        raise ConfigError(f"--by {missing[0]}: no validation prompt has this metadata")
    rows = {
        model: {
            domain: score_of([r for v in found if v.domain == domain for r in v.graded])
            for domain in summary.domains
        }
        for model, found in verdicts.items()
    }
    counts = {d: max(f[d].num_prompts for f in summary.models.values()) for d in summary.domains}
    shares = {
        model: {name: figures.accuracy.value for name, figures in found.items()}
        for model, found in summary.by.get(BENCHMARK, {}).items()
    }
    papers = paper_tables(published(), shares)
    texts = [render_table(rows, summary.domains, num_prompts=counts), to_text(summary)]
    say("\n\n".join([*texts, *(table.to_text() for table in papers)]) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TABLES[0], to_json(summary) + "\n")
    markdown = [to_markdown(summary), *(table.to_markdown() for table in papers)]
    write_whole(folder / TABLES[1], "\n\n".join(markdown) + "\n")
    say(f"written: {folder / TABLES[1]}, {folder / TABLES[0]}")
