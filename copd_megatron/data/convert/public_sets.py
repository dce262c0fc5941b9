r"""Rows of the public sets that CoPD trains on, as tasks of ours. The layouts that are assumed:

``polaris``
    Polaris-Dataset-53K (text mathematics): ``problem``, ``answer``, ``difficulty`` ("3/8", optional).
``mmfinereason``
    MMFineReason-SFT-123K (images): ``question`` (``<image>`` where the picture goes, or none), ``answer``,
    ``image`` ({"bytes", "path"} as Hugging Face's image columns have it, a path, or a list of these);
    ``source``, ``id``, ``pass_rate`` are kept. In JSON, ``bytes`` is base64. Answers that are the letter of
    an option are graded as choices, all others as mathematics.
``video_r1``
    Video-R1-260k.json (images and videos): ``problem``, ``problem_type``, ``options``, ``solution``
    ("<answer>B</answer>"), ``data_type`` ("image" or "video"), ``path`` (relative, "./LLaVA-.../x.mp4").
``onethinker``
    onethinker_rl_train.json (images and videos): as Video-R1, but with ``answer`` instead of the solution,
    ``images`` and ``videos`` (lists of relative paths) instead of the path, and ``<image>`` / ``<video>`` in
    ``problem``. Grounding answers are JSON: {"time": [12.3, 25.7]}, {"boxes": [35, 227, 437, 932]}.

Of the problem types, multiple choice, numerical, math, temporal grounding and spatial grounding are used.
The others (open-ended, free-form, OCR, regression, tracking, segmentation, spatial-temporal grounding) are
graded by similarity in their original projects rather than verified; they are skipped and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from copd_megatron.data.convert.media import MediaSource, medium_source
from copd_megatron.data.convert.rows import Row
from copd_megatron.data.media import IMAGE, VIDEO
from copd_megatron.errors import BadSampleError

INSTRUCTIONS = {
    "math": "\nPut your final answer in \\boxed{}.",
    "numeric": "\nPut your final answer, a number, in \\boxed{}.",
    "exact": "\nPut your final answer in \\boxed{}.",
    "choice": "\nPut the letter of the right option in \\boxed{}.",
    "temporal_iou": "\nGive start and end in seconds, such as <answer>12.3-25.7</answer>.",
    "box_iou": "\nGive the box as <answer>[x1, y1, x2, y2]</answer>.",
}
"""By verifier: appended to the question unless another instruction is given."""

_VERIFIERS = {
    "multiple choice": "choice",
    "numerical": "numeric",
    "math": "math",
    "temporal grounding": "temporal_iou",
    "spatial grounding": "box_iou",
}
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPTION = re.compile(r"^\s*[(\[]?([A-Z])[)\].:]\s*(.*)$", re.DOTALL)
_LETTER = re.compile(r"^[(\[]?([A-Z])[)\].]?$")


@dataclass(frozen=True, kw_only=True)
class PublicTask:
    """What a row asks, in this project's terms."""

    question: str
    """May hold ``<image>`` and ``<video>``."""
    answer: str
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[MediaSource, ...] = ()


Layout = Callable[[Row, str], PublicTask]
"""(row, the words that name its place) -> task; raises BadSampleError for rows that it cannot use."""


def polaris(row: Row, where: str) -> PublicTask:
    """Polaris-Dataset-53K."""
    metadata = {"dataset": "polaris"}
    if row.get("difficulty") is not None:
        metadata["difficulty"] = str(row["difficulty"])
    return PublicTask(
        question=_text(row, "problem", where),
        answer=_text(row, "answer", where),
        verifier="math",
        metadata=metadata,
    )


def mmfinereason(row: Row, where: str) -> PublicTask:
    """MMFineReason-SFT-123K."""
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    letter = _LETTER.match(answer)
    kept = {name: row[name] for name in ("source", "id", "pass_rate") if row.get(name) is not None}
    images = row.get("image")
    entries = images if isinstance(images, list) else [images]
    media = tuple(medium_source(entry, IMAGE, where) for entry in entries if entry is not None)
    if not media:
        raise BadSampleError(where, "no_media", "no image in 'image'", "Text rows belong to a text set.")
    return PublicTask(
        question=question,
        answer=letter.group(1) if letter else answer,
        verifier="choice" if letter else "math",
        metadata={"dataset": "mmfinereason", **kept},
        media=media,
    )


def video_r1(row: Row, where: str) -> PublicTask:
    """Video-R1-260k."""
    return _problem(row, where, "video_r1", _text(row, "solution", where), [row.get("path")])


def onethinker(row: Row, where: str) -> PublicTask:
    """OneThinker's reinforcement learning set."""
    kind = _kind(row, where)
    paths = row.get("videos" if kind == VIDEO else "images")
    entries = paths if isinstance(paths, list) else [paths if paths is not None else row.get("path")]
    answer = _text(row, "answer" if row.get("answer") is not None else "solution", where)
    return _problem(row, where, "onethinker", answer, entries)


LAYOUTS: dict[str, Layout] = {
    "polaris": polaris,
    "mmfinereason": mmfinereason,
    "video_r1": video_r1,
    "onethinker": onethinker,
}


def _problem(row: Row, where: str, dataset: str, solution: str, media: Sequence[Any]) -> PublicTask:
    """What Video-R1 and OneThinker have in common."""
    kind = _kind(row, where)
    problem_type = _text(row, "problem_type", where).strip().lower()
    verifier = _VERIFIERS.get(problem_type)
    if verifier is None:
        raise BadSampleError(
            where,
            f"unverifiable_{re.sub(r'[^a-z]+', '_', problem_type)}",
            f"problem type {problem_type!r} has no verifier",
            f"Types that have: {', '.join(_VERIFIERS)}.",
        )
    tagged = _ANSWER_TAG.findall(solution)
    answer = (tagged[-1] if tagged else solution).strip()
    question, metadata = _text(row, "problem", where), {"dataset": dataset}
    if row.get("data_source") is not None:
        metadata["source"] = str(row["data_source"])
    extra: dict[str, Any] = {}
    options = row.get("options")
    if verifier == "choice" and isinstance(options, list) and options:
        question = f"{question}\nOptions:\n" + "\n".join(str(option) for option in options)
        extra["choices"] = option_texts(options)
    elif verifier == "numeric":
        extra["abs_tol"] = 0.005  # their graders round to two decimals
    elif verifier in ("temporal_iou", "box_iou"):
        answer = _grounding(answer, "time" if verifier == "temporal_iou" else "boxes", where)
    entries = [entry for entry in media if entry]
    if not entries:
        raise BadSampleError(where, "no_media", "no path to an image or video", "Drop the row.")
    return PublicTask(
        question=question,
        answer=answer,
        verifier=verifier,
        metadata={**metadata, **extra},
        media=tuple(medium_source(entry, kind, where) for entry in entries),
    )


def option_texts(options: Sequence[Any]) -> list[str]:
    """The options' texts, without their letters if these are A, B, ... in order."""
    matches = [_OPTION.match(str(option)) for option in options]
    letters = [match.group(1) if match else "" for match in matches]
    if letters == [chr(ord("A") + i) for i in range(len(options))]:
        return [match.group(2).strip() for match in matches if match]
    return [str(option).strip() for option in options]


def _grounding(answer: str, key: str, where: str) -> str:
    try:
        numbers = json.loads(answer)[key]
        values = [float(number) for number in numbers]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise BadSampleError(
            where, "bad_answer", f"answer {answer[:60]!r} has no numbers under {key!r}", "Drop the row."
        ) from error
    if key == "time" and len(values) == 2:
        return f"{values[0]:g}-{values[1]:g}"
    if key == "boxes" and len(values) == 4:
        return json.dumps([int(value) if value.is_integer() else value for value in values])
    raise BadSampleError(
        where, "bad_answer", f"answer has {len(values)} numbers under {key!r}", "Drop the row."
    )


def _kind(row: Row, where: str) -> str:
    kind = _text(row, "data_type", where).strip().lower()
    if kind not in (IMAGE, VIDEO):
        raise BadSampleError(where, "bad_type", f"data_type is {kind!r}", "Use 'image' or 'video'.")
    return kind


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadSampleError(
            where, "missing_field", f"no {name!r}; it has {sorted(row)}", "Check --layout against the file."
        )
    if not isinstance(value, str):
        raise BadSampleError(
            where, "bad_type", f"{name!r} is a {type(value).__name__}, not text", "Check --layout."
        )
    return value.strip()
