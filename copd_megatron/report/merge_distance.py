"""How far each branch moved from the base, and how alike their movements are: per layer, from the files.

With delta_k = theta_k - theta_base: the relative movement of a layer is ||delta_k|| / ||theta_base||, and the
cosine of two branches is delta_j . delta_k / (||delta_j|| ||delta_k||); sums over all tensors of the layer,
in float64. Branches that pull in opposite directions (cosine well below 0) are what TIES is for; near 0,
their changes add without harm.
"""

from __future__ import annotations

import html
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from copd_megatron.errors import DataError
from copd_megatron.formats.open import open_source
from copd_megatron.formats.tensors import TensorSource, identities, refuse_changed
from copd_megatron.hf.tensors import TensorSpec, block_range
from copd_megatron.merge.check import check_mergeable
from copd_megatron.merge.recipe import layer_label
from copd_megatron.merge.scratch import scratch
from copd_megatron.report.names import figure_text
from copd_megatron.untrusted.json_text import load_file, made
from copd_megatron.untrusted.visible import markdown_cell, one_line
from copd_megatron.untrusted.whole_file import replacing, write_whole

logger = logging.getLogger(__name__)

TOTAL = "all"
_LEGEND_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True)
class LayerDistance:
    """One layer's numbers."""

    layer: str
    num_elements: int
    base_norm: float
    """||theta_base||."""
    moved: tuple[float, ...]
    """||delta_k|| / ||theta_base||, per branch; NaN where the base is zero."""
    cosines: tuple[float, ...]
    """Of each pair of branches, in the order of ``combinations``; NaN where one did not move."""


@dataclass(frozen=True, kw_only=True)
class DistanceReport:
    """Per layer in model order, the whole model last."""

    base: str
    """The model that movements are measured from."""
    branches: tuple[str, ...]
    layers: tuple[LayerDistance, ...]

    @property
    def pairs(self) -> list[str]:
        return [f"{a}·{b}" for a, b in combinations(self.branches, 2)]

    def rows(self) -> list[list[str]]:
        """Header and rows, as shown."""
        header = ["layer", *(f"|{b}|" for b in self.branches), *(f"cos {pair}" for pair in self.pairs)]
        return [header] + [
            [layer.layer, *(_cell(x, ".3e") for x in layer.moved), *(_cell(x, "+.3f") for x in layer.cosines)]
            for layer in self.layers
        ]

    @property
    def legend(self) -> str:
        """What the columns are."""
        return (
            f"|x|: how far x moved from {self.base}, relative to its size; cos a·b: whether a and b moved "
            "the same way; -: there is no such number, since one did not move or holds NaN"
        )

    def to_text(self) -> str:
        """Aligned columns under a legend."""
        rows = [[one_line(cell) for cell in row] for row in self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([one_line(self.legend, _LEGEND_CHARACTERS), "", *lines])

    def to_markdown(self) -> str:
        """A table under a legend."""
        rows = [[markdown_cell(cell) for cell in row] for row in self.rows()]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
        legend = html.escape(one_line(self.legend, _LEGEND_CHARACTERS), quote=False)
        return "\n".join([legend, "", lines[0], rule, *lines[1:]])

    def to_json(self) -> str:
        """One object per layer; numbers that do not exist are null."""
        layers = [
            {
                "layer": layer.layer,
                "num_elements": layer.num_elements,
                "base_norm": _or_none(layer.base_norm),
                "moved": dict(zip(self.branches, map(_or_none, layer.moved), strict=True)),
                "cosine": dict(zip(self.pairs, map(_or_none, layer.cosines), strict=True)),
            }
            for layer in self.layers
        ]
        return json.dumps(
            {"base": self.base, "branches": self.branches, "layers": layers}, indent=2, allow_nan=False
        )

    def plot(self, path: str | Path) -> None:
        """Movement and cosines over the layers, as a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        layers = [layer for layer in self.layers if layer.layer != TOTAL]
        figure = Figure(figsize=(max(7.0, 0.28 * len(layers)), 7.0), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True)
        places = range(len(layers))
        for k, branch in enumerate(self.branches):
            upper.plot(
                places,
                [layer.moved[k] for layer in layers],
                marker="o",
                markersize=3,
                label=figure_text(branch),
            )
        upper.set_ylabel("moved from base: ‖δ‖ / ‖θ‖")
        upper.set_ylim(bottom=0)
        for k, pair in enumerate(self.pairs):
            lower.plot(
                places,
                [layer.cosines[k] for layer in layers],
                marker="o",
                markersize=3,
                label=figure_text(pair),
            )
        lower.set_ylabel("cosine of task vectors")
        lower.axhline(0, color="grey", linewidth=0.8)
        lower.set_ylim(-1.05, 1.05)
        lower.set_xticks(
            list(places), [figure_text(layer.layer) for layer in layers], rotation=90, fontsize=7
        )
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        with replacing(path) as file:
            figure.savefig(file, dpi=120, format="png")

    def write(self, stem: str | Path) -> list[Path]:
        """Writes ``<stem>.md``, ``.json`` and ``.png``; returns their paths."""
        stem = Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".md", ".json", ".png")]
        write_whole(paths[0], self.to_markdown() + "\n")
        write_whole(paths[1], self.to_json() + "\n")
        self.plot(paths[2])
        return paths


def read_distances(path: Path) -> DistanceReport:
    """What ``to_json`` wrote.

    Raises:
        DataError: the file holds something else.
    """
    try:
        stored = made(_Stored, load_file(path, inside=path.parent))
        report = DistanceReport(
            base=stored.base,
            branches=stored.branches,
            layers=tuple(
                LayerDistance(
                    layer=layer.layer,
                    num_elements=layer.num_elements,
                    base_norm=_or_nan(layer.base_norm),
                    moved=tuple(map(_or_nan, layer.moved.values())),
                    cosines=tuple(map(_or_nan, layer.cosine.values())),
                )
                for layer in stored.layers
            ),
        )
        sizes = (len(report.branches), len(report.pairs))
        if any((len(layer.moved), len(layer.cosines)) != sizes for layer in report.layers):
            raise ValueError("a layer has not one number per branch and per pair")
    except ValueError as error:
        raise DataError(f"{path} holds no distances of branches ({error}); remove it") from error
    return report


@dataclass(frozen=True, kw_only=True)
class _StoredLayer:
    layer: str
    num_elements: int
    base_norm: float | None
    moved: Mapping[str, float | None]
    """By branch."""
    cosine: Mapping[str, float | None]
    """By pair."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """As ``DistanceReport.to_json`` writes it."""

    base: str
    branches: tuple[str, ...]
    layers: tuple[_StoredLayer, ...]


def branch_distances(
    base: str | Path,
    branches: Sequence[str | Path],
    *,
    labels: Sequence[str] | None = None,
    threads: int = 1,
    allow: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> DistanceReport:
    """Reads all models once, block by block.

    Args:
        labels: what the branches are called; default the folders' names, made distinct.
        progress: told of tensors done and tensors in all.

    Raises:
        FileNotFoundError, MismatchError: a model is not there or of another architecture.
    """
    sources = [open_source(path) for path in (base, *branches)]
    opened = identities(sources)
    check_mergeable(sources, allow=allow)
    specs = [spec for spec in map(sources[0].spec, sources[0].names()) if spec.dtype.is_floating_point]
    grams: dict[str, npt.NDArray[np.float64]] = {}
    sizes: dict[str, int] = {}
    broken: dict[int, list[str]] = {}
    """Tensors that are not finite, by the number of their source."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = pool.map(lambda spec: _gram(sources, spec), specs)
            for number, (spec, gram) in enumerate(zip(specs, found, strict=True), start=1):
                for index in np.flatnonzero(~np.isfinite(np.diag(gram))):
                    broken.setdefault(int(index), []).append(spec.name)
                    if index == 0:
                        break  # movements from it are none either
                for label in (layer_label(spec.name), TOTAL):
                    grams[label] = grams.get(label, 0.0) + gram
                    sizes[label] = sizes.get(label, 0) + spec.num_elements
                if progress is not None:
                    progress(number, len(specs))
    finally:
        torch.set_num_threads(before)
    refuse_changed(sources, opened)
    for index, names in sorted(broken.items()):
        logger.warning(
            "%s: %d tensor(s) hold NaN, infinities or numbers too large to be squared, %s for one: there are "
            "no distances where they count",
            sources[index].label,
            len(names),
            names[0],
        )
    order = sorted(grams, key=_model_order)
    return DistanceReport(
        base=sources[0].label,
        branches=tuple(labels or _labels(branches)),
        layers=tuple(_layer(label, sizes[label], grams[label]) for label in order),
    )


def _gram(sources: Sequence[TensorSource], spec: TensorSpec) -> npt.NDArray[np.float64]:
    """Inner products of (theta_base, delta_0, delta_1, ...) over one tensor; [1 + K, 1 + K]."""
    gram = np.zeros((len(sources), len(sources)))
    for block in range(spec.num_blocks):
        start, stop = block_range(spec, block)
        rows = []
        for index, source in enumerate(sources):
            read = scratch.get(f"input{index}", stop - start, source.spec(spec.name).dtype)
            source.read_into(spec.name, start, read)
            rows.append(scratch.cast(f"wide{index}", read, torch.float64))
            if index:
                rows[index].sub_(rows[0])
        for i, j in combinations(range(len(rows)), 2):
            gram[i, j] += torch.dot(rows[i], rows[j]).item()
        for i, row in enumerate(rows):
            gram[i, i] += torch.dot(row, row).item()
    return gram


def _layer(label: str, num_elements: int, gram: npt.NDArray[np.float64]) -> LayerDistance:
    norms = np.sqrt(np.diag(gram))
    count = len(norms)
    return LayerDistance(
        layer=label,
        num_elements=num_elements,
        base_norm=float(norms[0]),
        moved=tuple(_ratio(float(n), float(norms[0])) for n in norms[1:]),
        cosines=tuple(
            _ratio(float(gram[i, j]), float(norms[i] * norms[j])) for i, j in combinations(range(1, count), 2)
        ),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _cell(value: float, form: str) -> str:
    """A number in a table; ``-`` where there is none."""
    return "-" if math.isnan(value) else format(value, form)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _model_order(label: str) -> tuple[Any, ...]:
    """Embeddings, layers by number, what comes after them, the total."""
    stem, _, number = label.rpartition(".")
    if label == TOTAL:
        return (3, "", 0)
    if number.isdigit():
        return (1, stem, int(number))
    return (0 if "embed" in label else 2, label, 0)


def _labels(branches: Sequence[str | Path]) -> list[str]:
    names = [Path(branch).resolve().name for branch in branches]
    return names if len(set(names)) == len(names) else [str(branch) for branch in branches]
