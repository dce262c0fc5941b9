"""The evaluation table: one row per model (base, branches, merged), one column per domain."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

MEAN_COLUMN = "mean"
_MISSING = "-"

Accuracies = Mapping[str, Mapping[str, float]]
"""model -> domain -> accuracy in [0, 1], models in row order."""


def render_table(
    rows: Accuracies,
    columns: Sequence[str],
    *,
    style: Literal["text", "markdown"] = "text",
    num_prompts: Mapping[str, int] | None = None,
) -> str:
    """Accuracy in per cent, with the plain mean over the domains as the last column.

    Args:
        rows: model -> domain -> accuracy in [0, 1]. A domain that a model lacks, or NaN, shows as ``-``. So
            does the mean of such a row, because it could not be compared with the others.
        columns: domains, in order.
        style: aligned text or a Markdown table.
        num_prompts: validation prompts per domain, shown in the header.

    Raises:
        ValueError: an accuracy is outside [0, 1], or a row has a domain that is not a column.
    """
    _check(rows, columns)
    counts = num_prompts or {}
    header = [
        "model",
        *(f"{name} (n={counts[name]})" if name in counts else name for name in columns),
        MEAN_COLUMN,
    ]
    body = [
        [model, *(_percent(accuracies.get(name)) for name in columns), _percent(_mean(accuracies, columns))]
        for model, accuracies in rows.items()
    ]
    if style == "markdown":
        header = [cell.replace("|", "\\|") for cell in header]
        body = [[cell.replace("|", "\\|") for cell in line] for line in body]
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
) -> list[Path]:
    """Writes ``<name>.txt``, ``<name>.md`` and ``<name>.json`` and returns their paths.

    The JSON holds fractions, not per cent: ``{"domains": [...], "num_prompts": {...}, "accuracy": {model:
    {domain: 0.41, "mean": 0.37}}}``, with ``null`` for a missing value.

    Raises:
        ValueError: as ``render_table``.
        OSError: a file cannot be written.
    """
    folder = Path(directory)
    texts = {
        "txt": render_table(rows, columns, num_prompts=num_prompts),
        "md": render_table(rows, columns, style="markdown", num_prompts=num_prompts),
        "json": json.dumps(
            {
                "domains": list(columns),
                "num_prompts": dict(num_prompts or {}),
                "accuracy": {
                    model: {
                        **{domain: _known(accuracies.get(domain)) for domain in columns},
                        MEAN_COLUMN: _mean(accuracies, columns),
                    }
                    for model, accuracies in rows.items()
                },
            },
            indent=2,
            allow_nan=False,
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for extension, text in texts.items():
        path = folder / f"{name}.{extension}"
        path.write_text(text + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def _check(rows: Accuracies, columns: Sequence[str]) -> None:
    if MEAN_COLUMN in columns:
        raise ValueError(f"a domain cannot be named {MEAN_COLUMN!r}, like the last column of the table")
    for model, accuracies in rows.items():
        extra = [domain for domain in accuracies if domain not in columns]
        if extra:
            raise ValueError(
                f"row {model!r} has domains {extra}, which are not among the columns {list(columns)}"
            )
        for domain, accuracy in accuracies.items():
            if not (math.isnan(accuracy) or 0.0 <= accuracy <= 1.0):
                raise ValueError(
                    f"accuracy of {model!r} on {domain!r} is {accuracy}; it must be a fraction in [0, 1]"
                )


def _known(accuracy: float | None) -> float | None:
    return None if accuracy is None or math.isnan(accuracy) else accuracy


def _mean(accuracies: Mapping[str, float], columns: Sequence[str]) -> float | None:
    known = [_known(accuracies.get(name)) for name in columns]
    values = [value for value in known if value is not None]
    return math.fsum(values) / len(values) if values and len(values) == len(known) else None


def _percent(accuracy: float | None) -> str:
    known = _known(accuracy)
    return _MISSING if known is None else f"{100 * known:.1f}"
