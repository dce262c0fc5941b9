"""Mathematics with pictures: MathVista, MathVision, MathVerse, WeMath, ZeroBench."""

from __future__ import annotations

import re
from pathlib import Path

from copd_megatron.data.convert.benchmarks.layout import (
    AS_PUBLISHED,
    choice_task,
    gold_letter,
    images,
    kept,
    listed,
    one_of,
    open_task,
    text,
    with_options,
)
from copd_megatron.data.convert.public_sets import PublicTask
from copd_megatron.data.convert.rows import Row
from copd_megatron.errors import BadSampleError

_OPTION = re.compile(r"(?:^|[;\uff1b\n])\s*([A-H])\s*[.\uff0e\u3001:\uff1a]\s*")
_IN_THE_IMAGE = "Answer the question that the image shows."
_VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
_WEMATH_KEYS = ("2steps_1", "2steps_2", "2steps_multi", "3steps_1", "3steps_2", "3steps_3", "3steps_multi")


def mathvista(row: Row, source: Path, where: str) -> PublicTask:
    """MathVista, testmini. Numbers with decimals must agree when rounded to the row's ``precision``."""
    question, answer = text(row, ("question",), where), text(row, ("answer",), where)
    media = images(row, ("decoded_image", "image"), where)
    details = row.get("metadata") or {}
    metadata = {**kept(row, ("pid", "question_type", "answer_type")), **kept(details, ("task", "source"))}
    if one_of(row, "question_type", ("multi_choice", "free_form"), where) == "multi_choice":
        options = listed(row, "choices", where)
        letter = gold_letter(answer, options, where)
        return choice_task(with_options(question, options), letter, options, media, metadata, where)
    if row.get("unit"):
        question += f"\nUnit: {row['unit']}"
    kind = one_of(row, "answer_type", ("integer", "float", "list", "text"), where)
    if kind in ("integer", "float"):
        metadata["abs_tol"] = _rounding(row, where) if kind == "float" else 0.0
        if kind == "float":
            question += f"\nGive {int(float(row['precision']))} decimal place(s)."
    verifier = {"integer": "numeric", "float": "numeric", "list": "math", "text": "exact"}[kind]
    return PublicTask(
        question=question, answer=answer, verifier=verifier, metadata=metadata, media=tuple(media)
    )


def mathvision(row: Row, source: Path, where: str) -> PublicTask:
    """MathVision: options, which may be in the picture and then are letters, or a free answer."""
    question, answer = text(row, ("question",), where), text(row, ("answer",), where)
    media = images(row, ("decoded_image", "image"), where)
    metadata = kept(row, ("id", "level", "subject"))
    options = listed(row, "options", where)
    if options:
        shown = with_options(question, options)
        return choice_task(shown, answer, options, media, metadata, where)
    return PublicTask(
        question=question, answer=answer, verifier="math", metadata=metadata, media=tuple(media)
    )


def mathverse(row: Row, source: Path, where: str) -> PublicTask:
    """MathVerse, testmini: each problem in five versions; that of ``Vision Only`` is in the picture alone."""
    version = one_of(row, "problem_version", _VERSIONS, where)
    question = _IN_THE_IMAGE if version == "Vision Only" else text(row, ("question",), where)
    answer = text(row, ("answer",), where)
    media = images(row, ("image",), where)
    metadata = kept(row, ("sample_index", "problem_index", "problem_version"))
    if one_of(row, "question_type", ("multi-choice", "free-form"), where) == "multi-choice":
        return PublicTask(
            question=question, answer=answer, verifier="choice", metadata=metadata, media=tuple(media)
        )
    return PublicTask(
        question=question, answer=answer, verifier="math", metadata=metadata, media=tuple(media)
    )


def wemath(row: Row, source: Path, where: str) -> PublicTask:
    """WeMath, testmini: problems of two or three steps, and each step as a question of its own.

    What is scored is the share of right answers. ``key`` and ``ID`` are kept, of which the benchmark's
    own measures (complete mastery, rote memorisation) are made.
    """
    options = _split_options(text(row, ("option",), where), where)
    question = with_options(text(row, ("question",), where), options)
    one_of(row, "key", _WEMATH_KEYS, where)
    media = images(row, ("image_path", "image"), where)
    metadata = kept(row, ("ID", "key", "knowledge concept"))
    return choice_task(question, text(row, ("answer",), where), options, media, metadata, where)


def zerobench(row: Row, source: Path, where: str) -> PublicTask:
    """ZeroBench: one or several pictures, and an answer that is a number or a short text."""
    return open_task(
        text(row, ("question_text",), where),
        text(row, ("question_answer",), where),
        images(row, ("question_images_decoded", "question_images"), where),
        kept(row, ("question_id",)),
    )


def _rounding(row: Row, where: str) -> float:
    """Half a unit of the last decimal place that counts."""
    precision = row.get("precision")
    if not isinstance(precision, int | float) or not 0 <= precision <= 12:
        problem = f"'precision' is {precision!r}, not a number of decimal places"
        raise BadSampleError(where, "bad_type", problem, AS_PUBLISHED)
    return 0.5 * 10.0 ** -int(precision)


def _split_options(options: str, where: str) -> list[str]:
    """The texts of ``A. 20; B. 30; C. none``."""
    _, *parts = _OPTION.split(options)
    letters, texts = parts[::2], [part.strip().rstrip(";\uff1b").strip() for part in parts[1::2]]
    if len(letters) < 2 or "".join(letters) != "ABCDEFGH"[: len(letters)] or not all(texts):
        problem = f"'option' {options[:60]!r} is not a list such as 'A. 20; B. 30'"
        raise BadSampleError(where, "bad_type", problem, AS_PUBLISHED)
    return texts
