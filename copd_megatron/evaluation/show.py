"""A summary of an evaluation as text, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from copd_megatron.evaluation.statistics import LEVEL, Estimate
from copd_megatron.evaluation.summary import Figures, Summary
from copd_megatron.untrusted.visible import markdown_cell, one_line


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a title, ready to be laid out. The first column holds names, the others figures.

    Names may come from samples and folders: each cell is shown on one line, cut where it is long.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_text(self) -> str:
        """Aligned columns."""
        header, *rows = [[one_line(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        rule = ["-" * width for width in widths]
        lines = [_line(row, widths) for row in (header, rule, *rows)]
        return "\n".join([one_line(self.title), "", *lines])

    def to_markdown(self) -> str:
        """A Markdown table under its title."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [[markdown_cell(cell) for cell in row] for row in (self.header, rule, *self.rows)]
        title = markdown_cell(self.title)
        return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(summary: Summary) -> list[Table]:
    """What there is to say: accuracies and, where they say something else, rewards, pass@k, maj@k, groups,
    differences."""
    return [*_main(summary), *_attempts(summary), *_groups(summary), *_differences(summary)]


def to_text(summary: Summary) -> str:
    """All tables for a terminal."""
    return "\n\n".join(table.to_text() for table in tables(summary))


def to_markdown(summary: Summary) -> str:
    """All tables in Markdown."""
    return "\n\n".join(table.to_markdown() for table in tables(summary))


def to_json(summary: Summary) -> str:
    """Everything, in fractions; null where there is no figure."""
    return json.dumps(_plain(asdict(summary)), indent=2, allow_nan=False)


def percent(estimate: Estimate, *, signed: bool = False) -> str:
    """``62.5 [48.1, 75.0]``; ``-`` where there is no figure."""
    form = "+.1f" if signed else ".1f"
    return _bracketed(*(format(100 * x, form) for x in (estimate.value, estimate.low, estimate.high)))


def _plain_number(estimate: Estimate, *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return _bracketed(*(format(x, form) for x in (estimate.value, estimate.low, estimate.high)))


def _bracketed(value: str, low: str, high: str) -> str:
    return "-" if "nan" in value else f"{value} [{low}, {high}]"


def _main(summary: Summary) -> Iterator[Table]:
    level, n = f"{100 * LEVEL:g}", _responses_per_prompt(summary)
    many = len(summary.domains) > 1
    yield Table(
        title=f"accuracy (% of responses with full marks{f', mean@{n}' if n > 1 else ''}), "
        f"{level} % intervals",
        header=["model", *(_counted(summary, d) for d in summary.domains), *(["mean"] if many else [])],
        rows=[
            [
                model,
                *(percent(row[d].accuracy) if d in row else "-" for d in summary.domains),
                *([percent(summary.means[model])] if many else []),
            ]
            for model, row in summary.models.items()
        ],
    )
    graded = [d for d in summary.domains if any(_partial(row.get(d)) for row in summary.models.values())]
    if graded:
        yield Table(
            title=f"mean reward, {level} % intervals",
            header=["model", *graded],
            rows=[
                [model, *(_plain_number(row[d].mean_reward) if d in row else "-" for d in graded)]
                for model, row in summary.models.items()
            ],
        )
    yield Table(
        title="responses: mean tokens, % truncated",
        header=["model", *summary.domains],
        rows=[
            [model, *(_lengths(row[d]) if d in row else "-" for d in summary.domains)]
            for model, row in summary.models.items()
        ],
    )


def _attempts(summary: Summary) -> Iterator[Table]:
    for name, field in (("pass@k", "pass_at"), ("maj@k", "majority_at")):
        for domain in summary.domains:
            found = {
                model: getattr(row[domain], field) for model, row in summary.models.items() if domain in row
            }
            ks = sorted({k for values in found.values() for k in values})
            if ks in ([], [1]):
                continue
            yield Table(
                title=f"{domain}: {name} (%)",
                header=["model", *(name.replace("k", str(k)) for k in ks)],
                rows=[
                    [model, *(percent(values[k]) if k in values else "-" for k in ks)]
                    for model, values in found.items()
                ],
            )


def _groups(summary: Summary) -> Iterator[Table]:
    for key, models in summary.by.items():
        values = sorted({value for row in models.values() for value in row})
        if values:
            yield Table(
                title=f"accuracy (%) by {key}",
                header=[key, *models],
                rows=[
                    [
                        value,
                        *(percent(row[value].accuracy) if value in row else "-" for row in models.values()),
                    ]
                    for value in values
                ],
            )


def _differences(summary: Summary) -> Iterator[Table]:
    if not summary.differences:
        return
    yield Table(
        title="differences on the same prompts (* the interval excludes 0)",
        header=["models", "prompts of", "n", "accuracy (points)", "mean reward"],
        rows=[
            [
                f"{d.model} - {d.against}",
                d.group,
                str(d.num_prompts),
                percent(d.accuracy, signed=True) + _star(d.accuracy),
                _plain_number(d.mean_reward, signed=True) + _star(d.mean_reward),
            ]
            for d in summary.differences
        ],
    )


def _star(estimate: Estimate) -> str:
    return " *" if estimate.excludes_zero else "  "


def _counted(summary: Summary, domain: str) -> str:
    counts = {row[domain].num_prompts for row in summary.models.values() if domain in row}
    return f"{domain} (n={max(counts, default=0)})"


def _responses_per_prompt(summary: Summary) -> int:
    figures = [f for row in summary.models.values() for f in row.values() if f.num_prompts]
    return max((round(f.num_responses / f.num_prompts) for f in figures), default=1)


def _partial(figures: Figures | None) -> bool:
    """Whether mean reward and accuracy differ."""
    return figures is not None and not math.isclose(
        figures.mean_reward.value, figures.accuracy.value, abs_tol=1e-12
    )


def _lengths(figures: Figures) -> str:
    return f"{figures.mean_tokens:.0f}, {100 * figures.truncated:.1f}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()


def _plain(value: Any) -> Any:
    """The same for JSON, which has text keys and no NaN."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
