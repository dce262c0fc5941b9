"""MMMU and MMMU-Pro: up to seven images, each referred to as ``<image 2>`` by the question or its options."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.benchmarks.layout import (
    AS_PUBLISHED,
    choice_task,
    images,
    kept,
    listed,
    one_of,
    open_task,
    text,
    with_options,
)
from copd_megatron.data.convert.media import MediaSource, medium_source
from copd_megatron.data.convert.public_sets import PublicTask
from copd_megatron.data.convert.rows import Row
from copd_megatron.data.media import IMAGE
from copd_megatron.errors import BadSampleError

_REFERENCE = re.compile(r"<image (\d)>")
_NUM_IMAGES = 7
_IN_THE_IMAGE = "Answer the question that the image shows."


def mmmu(row: Row, source: Path, where: str) -> PublicTask:
    """MMMU's validation split: multiple choice, and open questions that may have several right answers."""
    name = text(row, ("id",), where)
    split, _, rest = name.partition("_")
    if split != "validation":
        problem = f"{name!r} is not of the validation split, the one with answers that models are measured on"
        raise BadSampleError(where, "wrong_split", problem, "Give each subject's validation file alone.")
    metadata = {"subject": rest.rpartition("_")[0], **kept(row, ("id", "topic_difficulty", "subfield"))}
    if one_of(row, "question_type", ("multiple-choice", "open"), where) == "multiple-choice":
        return _referring(row, metadata, where)
    question, media = _place_images(text(row, ("question",), where), row, where)
    answers = _answers(text(row, ("answer",), where), where)
    task = open_task(question, answers[0], media, metadata)
    if answers[1:]:
        return replace(task, verifier="exact", metadata={**metadata, "also": answers[1:]})
    return task


def mmmu_pro(row: Row, source: Path, where: str) -> PublicTask:
    """MMMU-Pro's standard setting with ten options."""
    return _referring(row, kept(row, ("id", "subject", "topic_difficulty")), where)


def mmmu_pro_vision(row: Row, source: Path, where: str) -> PublicTask:
    """MMMU-Pro's vision setting: one picture shows the question and its options."""
    options = listed(row, "options", where)
    answer, metadata = text(row, ("answer",), where), kept(row, ("id", "subject"))
    return choice_task(_IN_THE_IMAGE, answer, options, images(row, ("image",), where), metadata, where)


def _referring(row: Row, metadata: dict[str, Any], where: str) -> PublicTask:
    options = listed(row, "options", where)
    shown = with_options(text(row, ("question",), where), options)
    question, media = _place_images(shown, row, where)
    # an option that is a picture can be picked by its letter alone
    texts = [_REFERENCE.sub(r"image \1", option) for option in options]
    return choice_task(question, text(row, ("answer",), where), texts, media, metadata, where)


def _place_images(question: str, row: Row, where: str) -> tuple[str, list[MediaSource]]:
    """The question with a placeholder where an image is first referred to, and the images in that order.
    Images that nothing refers to stand in front."""
    given = [number for number in range(1, _NUM_IMAGES + 1) if row.get(f"image_{number}") is not None]
    named = list(dict.fromkeys(int(number) for number in _REFERENCE.findall(question)))
    missing = [number for number in named if number not in given]
    if missing or not given:
        absent = missing or [1]
        problem = f"needs an image in {', '.join(repr(f'image_{number}') for number in absent)}"
        raise BadSampleError(where, "no_media", problem, AS_PUBLISHED)
    seen: set[str] = set()

    def placed(match: re.Match[str]) -> str:
        number = match.group(1)
        if number in seen:
            return f"image {number}"
        seen.add(number)
        return "<image>"

    in_front = [number for number in given if number not in named]
    order = [*in_front, *named]
    media = [medium_source(row[f"image_{number}"], IMAGE, where) for number in order]
    return "<image>" * len(in_front) + _REFERENCE.sub(placed, question), media


def _answers(answer: str, where: str) -> list[str]:
    """One answer, or the several of a text such as ``['f(4)', '4']``."""
    if not answer.startswith("["):
        return [answer]
    try:
        answers = ast.literal_eval(answer)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [answer]  # an interval, say
    if not answers or not all(isinstance(item, str) and item.strip() for item in answers):
        problem = f"the answers {answer[:60]!r} are not a list of texts"
        raise BadSampleError(where, "bad_answer", problem, AS_PUBLISHED)
    return answers
