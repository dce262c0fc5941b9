"""One run, or several, as one HTML page: self-contained, without scripts, and without a single request.

Only ``page.html.j2`` knows HTML; it escapes everything but the figures, which come from ``drawing.py``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from copd_megatron.config import load_config
from copd_megatron.config.domains import MEAN_COLUMN
from copd_megatron.errors import ConfigError, DataError
from copd_megatron.evaluation.statistics import Estimate
from copd_megatron.launch.provenance import read_starts
from copd_megatron.report.drawing import draw_panel, draw_scores
from copd_megatron.report.history import RunHistory, read_run
from copd_megatron.report.panels import panels, phase_spans
from copd_megatron.report.planned import plan_beside_measured
from copd_megatron.report.scores import ScoreTable, score_table
from copd_megatron.report.thumbnails import Thumbnails
from copd_megatron.samples.files import read_samples
from copd_megatron.samples.record import Kind, Sample
from copd_megatron.untrusted.regular_file import read_regular
from copd_megatron.untrusted.visible import visible
from copd_megatron.untrusted.whole_file import write_whole

BEGIN: Final = b"<!doctype html>"
"""Of a page."""
_SHADES = 5
"""Strengths of a token's colour."""
_STRONGEST = 2.5
"""|log-ratio| in nats of the strongest one."""
_MAX_SHOWN_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Token:
    """A stretch of a response, ready to be shown."""

    text: str
    shade: str
    """``p1`` to ``p5`` if the teacher finds it likelier, ``n1`` to ``n5`` if less likely, or empty."""
    note: str


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """A sample as the page has it."""

    sample: Sample
    tokens: Sequence[Token]
    pictures: Sequence[str]
    gap: float | None
    """Mean log-ratio of the teacher to the student."""


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What a page contains."""

    num_samples: int = 24
    refresh_seconds: int | None = None
    """The browser reads the page again so often; None: never."""


def write_page(run_dirs: Sequence[str | Path], out: Path, options: PageOptions | None = None) -> Path:
    """Writes the page of these runs to ``out`` and returns it.

    Raises:
        FileNotFoundError, ValueError: as ``read_run``.
        OSError: it cannot be written.
    """
    text = page([Path(run_dir) for run_dir in run_dirs], options or PageOptions())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.encode("utf-8", "replace"))
    return out


def refuse_twice(run_dirs: Sequence[Path]) -> None:
    """Raises DataError: a run is named twice, by whatever path. Its mean would be of fewer than it says."""
    seen: dict[Path, Path] = {}
    for run_dir in run_dirs:
        known = seen.setdefault(run_dir.resolve(), run_dir)
        if known is not run_dir:
            raise DataError(f"{run_dir} and {known} are one run, which would count twice. Name it once.")


def page(run_dirs: Sequence[Path], options: PageOptions) -> str:
    """The page of one run, or of several as means with bands."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    refuse_twice(run_dirs)
    runs = [read_run(run_dir) for run_dir in run_dirs]
    colors: dict[str, str] = {}
    spans = phase_spans(runs[0])
    figures = [(p, draw_panel(p, spans, colors)) for p in panels(runs) if not p.stacked]
    phases: dict[str, str] = {}  # of a step; the same for every branch
    times = [(p, draw_panel(p, spans, phases)) for p in panels(runs) if p.stacked]
    scores = score_table(runs)
    environment = Environment(
        loader=PackageLoader("copd_megatron.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "visible": visible}
    return environment.get_template("page.html.j2").render(
        title=" · ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=runs,
        facts=[_facts(run) for run in runs],
        figures=figures,
        times=times,
        scores=scores,
        unmeasured=[run.name for run in runs if not run.accuracy],
        numbers_of_steps=sorted({len(run.steps) for run in runs}),
        score_figure=None if scores is None else draw_scores(scores, colors),
        mean=MEAN_COLUMN,
        headline=None if scores is None else _headline(scores),
        samples=[shown for run_dir in run_dirs[:1] for shown in _samples(run_dir, options.num_samples)],
        configs=[(run.name, _config_text(run_dir)) for run, run_dir in zip(runs, run_dirs, strict=True)],
        environments=[
            (run.name, list(map(_flat, read_starts(run_dir))))
            for run, run_dir in zip(runs, run_dirs, strict=True)
        ],
        distances=_distances(run_dirs[0]),
        planned=plan_beside_measured(run_dirs[0], runs[0]),
        refresh=options.refresh_seconds,
    )


def shown_sample(sample: Sample, pictures: Sequence[str] = ()) -> ShownSample:
    """A sample with its tokens joined where they look alike."""
    ratios = [ratio for ratio in sample.log_ratios() if ratio is not None]
    return ShownSample(
        sample=sample,
        tokens=_tokens(sample),
        pictures=pictures,
        gap=math.fsum(ratios) / len(ratios) if ratios else None,
    )


def shade_of(ratio: float | None) -> str:
    """The class of a token's colour: see ``Token.shade``."""
    strength = 0 if ratio is None else min(_SHADES, round(abs(ratio) / _STRONGEST * _SHADES))
    return f"{'p' if ratio is not None and ratio > 0 else 'n'}{strength}" if strength else ""


def _tokens(sample: Sample) -> list[Token]:
    found = []
    for number, (piece, ratio) in enumerate(zip(sample.pieces(), sample.log_ratios(), strict=True)):
        if number == sample.cut_at:
            found.append(Token(text=f" […{sample.num_left_out} tokens…] ", shade="", note=""))
        note = "" if ratio is None or not shade_of(ratio) else f"log-ratio {ratio:+.2f}"
        found.append(Token(text=visible(piece), shade=shade_of(ratio), note=note))
    joined = []
    for (shade, note), group in groupby(found, key=lambda token: (token.shade, token.note)):
        joined.append(Token(text="".join(token.text for token in group), shade=shade, note=note))
    return joined


def _samples(run_dir: Path, count: int) -> list[ShownSample]:
    """Samples of the newest step that has any, of every branch and kind in turn; with pictures."""
    try:
        groups = _newest(read_samples(run_dir))
    except FileNotFoundError:
        return []
    for members in groups.values():
        random.Random(0).shuffle(members)
    chosen: list[Sample] = []
    while len(chosen) < count and any(groups.values()):
        chosen += [members.pop() for members in groups.values() if members]
    order = {
        key: number for number, key in enumerate(sorted(groups, key=lambda key: (key[2].value, key[:2])))
    }
    chosen = sorted(chosen[:count], key=lambda s: order[s.model, s.edge or "", s.kind])
    thumbnails = _thumbnails(run_dir)
    return [shown_sample(sample, _pictures(sample, thumbnails)) for sample in chosen]


def _newest(samples: Iterable[Sample]) -> dict[tuple[str, str, Kind], list[Sample]]:
    """By model, edge and kind, the samples of the newest step that has any; of samples in order of steps, the
    last ones first. Only these are held."""
    groups: dict[tuple[str, str, Kind], list[Sample]] = {}
    for sample in samples:
        key = (sample.model, sample.edge or "", sample.kind)
        members = groups.pop(key, [])
        groups[key] = [*members, sample] if members and members[0].step == sample.step else [sample]
    return {key: groups[key][::-1] for key in reversed(groups)}


def _pictures(sample: Sample, thumbnails: Thumbnails | None) -> list[str]:
    found = [] if thumbnails is None else [thumbnails.uri(medium) for medium in sample.media]
    return [uri for uri in found if uri is not None]


def _thumbnails(run_dir: Path) -> Thumbnails | None:
    """None where the run's settings cannot be read here."""
    try:
        return Thumbnails(load_config(run_dir / "config.yaml"))
    except ConfigError:
        return None


def _facts(run: RunHistory) -> list[tuple[str, str]]:
    """What a run was, in a few words and numbers."""
    steps = run.named("", "/timing/step_seconds")
    seconds = [max(values) for values in zip(*steps.values(), strict=True)]
    known = [value for value in seconds if not math.isnan(value)]
    phases = {"rlvr": "Phase I (RLVR)", "opd": "Phase II (OPD)"}
    counts = [(phases.get(p, p), run.phases.count(p)) for p in dict.fromkeys(run.phases)]
    facts = [("steps", f"{len(run.steps)}: " + ", ".join(f"{n} of {name}" for name, n in counts))]
    if known:
        facts.append(("time in steps", f"{sum(known):,.0f} s, {sum(known) / len(known):.1f} s a step"))
    return [*facts, ("branches", ", ".join(sorted(run.named("", "/train/reward"))))]


def _headline(scores: ScoreTable) -> str | None:
    """What the merged model gained over the base, in a sentence."""
    base, merged = scores.cell("base", MEAN_COLUMN), scores.cell("merged", MEAN_COLUMN)
    if base is None or merged is None:
        return None
    gain = 100 * (merged.value - base.value)
    counts = [scores.counts[model][MEAN_COLUMN] for model in ("merged", "base")]
    if counts[0] != counts[1]:
        over = f" (means of {counts[0]} and {counts[1]} runs, not of the same)"
    else:
        over = f" (mean of {counts[0]} runs)" if scores.num_runs > 1 else ""
    return (
        f"The merged model has {100 * merged.value:.1f} % on average over the domains, the base "
        f"{100 * base.value:.1f} %: {gain:+.1f} points{over}."
    )


def _config_text(run_dir: Path) -> str:
    return read_shown(run_dir / "config.yaml")


def read_shown(path: Path) -> str:
    """A small text of a run directory, which a page or a terminal shows as it is; empty if there is none.

    Raises OSError: it is too large, no regular file, or a link out of the run directory.
    """
    try:
        content = read_regular(path, _MAX_SHOWN_BYTES, inside=path.parent)
    except FileNotFoundError:
        return ""
    return content.decode("utf-8", "replace")


def _flat(start: Mapping[str, Any]) -> dict[str, Any]:
    """A start of the run with its packages beside its other facts."""
    packages = start.get("packages")
    facts = {name: value for name, value in start.items() if name != "packages" and value is not None}
    return facts | (packages if isinstance(packages, dict) else {})


def _distances(run_dir: Path) -> Any:
    """Header and rows of how far the branches moved, where it was measured; None elsewhere."""
    from copd_megatron.report.merge_distance import read_distances

    path = run_dir / "distances.json"
    return read_distances(path) if path.is_file() else None


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}"


def _points(estimate: Estimate, *, signed: bool = False) -> str:
    """The interval around a share, in points; nothing where it has no width that could be seen."""
    form = "+.1f" if signed else ".1f"
    low, high = (format(100 * edge, form) for edge in (estimate.low, estimate.high))
    return "" if low == high else f"[{low}, {high}]"
