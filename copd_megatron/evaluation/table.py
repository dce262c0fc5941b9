"""The evaluation table: one row per model (base, branches, merged), one column per domain.

A domain whose grades are all 0 or 1 has an accuracy. One with partial credit, or with rewards on another
scale, has two columns: the mean reward, and the share of responses with a reward of at least 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from copd_megatron.config.domains import MEAN_COLUMN
from copd_megatron.untrusted.visible import markdown_cell, one_line
from copd_megatron.untrusted.whole_file import write_whole

_MISSING = "-"


class Graded(TypedDict):
    """What a model scored on a domain where not every grade is 0 or 1."""

    mean_reward: float
    full_marks: float
    """Share of responses with a reward of at least 1."""


Score = float | Graded
"""What a model scored on a domain: its accuracy, where every grade is 0 or 1. Plain JSON values."""

Accuracies = Mapping[str, Mapping[str, Score]]
"""model -> domain -> score, models in row order."""


def mean_reward(score: Score) -> float:
    """Mean over all responses; where every grade is 0 or 1, the accuracy."""
    return score["mean_reward"] if isinstance(score, dict) else score


def full_marks(score: Score) -> float:
    """Share of responses with a reward of at least 1."""
    return score["full_marks"] if isinstance(score, dict) else score


def graded_domains(rows: Accuracies) -> list[str]:
    """Domains on which some model got a grade other than 0 and 1, in order."""
    return list(
        dict.fromkeys(
            domain for scores in rows.values() for domain, score in scores.items() if isinstance(score, dict)
        )
    )


def table_title(rows: Accuracies) -> str:
    """What the figures of the table are."""
    return "validation accuracy (%)" + (", mean reward where graded" if graded_domains(rows) else "")


def render_table(
    rows: Accuracies,
    columns: Sequence[str],
    *,
    style: Literal["text", "markdown"] = "text",
    num_prompts: Mapping[str, int] | None = None,
) -> str:
    """Accuracy in per cent, with the plain mean over the domains as the last column.

    A graded domain has its mean reward, on the verifier's own scale, and the share of full marks in per cent.

    Args:
        rows: model -> domain -> score. A domain that a model lacks, or NaN, is shown as ``-``, and so is the
            mean of such a row: it could not be compared with the others. The same holds for the mean where
            rewards lie outside [0, 1].
        columns: domains, in order.
        style: aligned text or a Markdown table.
        num_prompts: validation prompts per domain, shown in the header.

    Raises:
        ValueError: an accuracy lies outside [0, 1], or a row has a domain that is not among the columns.
    """
    _check(rows, columns)
    counts, graded = num_prompts or {}, graded_domains(rows)
    header = ["model"]
    for name in columns:
        header.append(f"{name} (n={counts[name]})" if name in counts else name)
        if name in graded:
            header[-1] += " reward"
            header.append(f"{name} full marks")
    header.append(MEAN_COLUMN)
    body = [[model, *_cells(scores, columns, graded)] for model, scores in rows.items()]
    shown = markdown_cell if style == "markdown" else one_line
    header, *body = [[shown(cell) for cell in line] for line in [header, *body]]
    widths = [max(len(line[index]) for line in [header, *body]) for index in range(len(header))]
    aligned = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in [header, *body]
    ]
    if style == "markdown":
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])
    text_rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in [aligned[0], text_rule, *aligned[1:]])


def save_table(
    directory: str | os.PathLike[str],
    rows: Accuracies,
    columns: Sequence[str],
    *,
    name: str = "evaluation",
    num_prompts: Mapping[str, int] | None = None,
    step: int | None = None,
) -> list[Path]:
    """Writes ``<name>.txt``, ``<name>.md`` and ``<name>.json`` and returns their paths.

    The JSON holds fractions, not per cent: ``{"domains": [...], "num_prompts": {...}, "step": 400,
    "accuracy": {model: {domain: 0.41, "mean": 0.37}}}``, ``null`` where a figure is missing. Graded domains
    have no accuracy but ``"mean_reward"`` and ``"full_marks"``, of the same shape.

    Args:
        step: training steps of the models in the table; None: nobody knows.

    Raises:
        ValueError: as ``render_table``.
        OSError: a file cannot be written.
    """
    folder = Path(directory)
    texts = {
        "txt": render_table(rows, columns, num_prompts=num_prompts),
        "md": render_table(rows, columns, style="markdown", num_prompts=num_prompts),
        "json": json.dumps(_record(rows, columns, num_prompts or {}, step), indent=2, allow_nan=False),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for extension, text in texts.items():
        path = folder / f"{name}.{extension}"
        write_whole(path, text + "\n")
        paths.append(path)
    return paths


def _record(
    rows: Accuracies, columns: Sequence[str], num_prompts: Mapping[str, int], step: int | None
) -> dict[str, Any]:
    graded = graded_domains(rows)
    record: dict[str, Any] = {
        "domains": list(columns),
        "num_prompts": dict(num_prompts),
        "step": step,
        "accuracy": {
            model: {
                **{name: None if name in graded else _known(mean_reward, scores, name) for name in columns},
                MEAN_COLUMN: _mean(scores, columns),
            }
            for model, scores in rows.items()
        },
    }
    for kind in (mean_reward, full_marks) if graded else ():
        record[kind.__name__] = {
            model: {name: _known(kind, scores, name) for name in graded} for model, scores in rows.items()
        }
    return record


def _cells(scores: Mapping[str, Score], columns: Sequence[str], graded: Sequence[str]) -> Iterator[str]:
    for name in columns:
        if name in graded:
            reward = _known(mean_reward, scores, name)
            yield _MISSING if reward is None else f"{reward:.3f}"
            yield _percent(_known(full_marks, scores, name))
        else:
            yield _percent(_known(mean_reward, scores, name))
    yield _percent(_mean(scores, columns))


def _check(rows: Accuracies, columns: Sequence[str]) -> None:
    if MEAN_COLUMN in columns:
        raise ValueError(f"a domain cannot be named {MEAN_COLUMN!r}: the table's last column has that name")
    for model, scores in rows.items():
        extra = [domain for domain in scores if domain not in columns]
        if extra:
            raise ValueError(
                f"row {model!r} has domains {extra}, which are not among the columns {list(columns)}"
            )
        for domain, score in scores.items():
            share = full_marks(score)
            if not (math.isnan(share) or 0.0 <= share <= 1.0):
                raise ValueError(
                    f"accuracy of {model!r} on {domain!r} is {share}; it must be a fraction in [0, 1]"
                )


def _known(kind: Callable[[Score], float], scores: Mapping[str, Score], domain: str) -> float | None:
    score = scores.get(domain)
    value = math.nan if score is None else kind(score)
    return None if math.isnan(value) else value


def _mean(scores: Mapping[str, Score], columns: Sequence[str]) -> float | None:
    values = [_known(mean_reward, scores, name) for name in columns]
    shares = [value for value in values if value is not None and 0.0 <= value <= 1.0]
    return math.fsum(shares) / len(shares) if shares and len(shares) == len(values) else None


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f}"
