"""What every family of layouts shares: reading a published row's fields, its options and its media."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from copd_megatron.data.convert.media import MediaSource, medium_source
from copd_megatron.data.convert.public_sets import PublicTask
from copd_megatron.data.convert.rows import Row
from copd_megatron.data.media import IMAGE
from copd_megatron.errors import BadSampleError
from copd_megatron.rewards.verifiers.numeric import is_number

Layout = Callable[[Row, Path, str], PublicTask]
"""(row, the file it comes from, the words that name its place) -> what it asks. Raises BadSampleError."""

AS_PUBLISHED = "Give the files as they are published."


def text(row: Row, names: Sequence[str], where: str) -> str:
    """The text of the first of these fields that the row has; numbers as text. Raises BadSampleError."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        problem = f"needs text in {' or '.join(map(repr, names))}; the row has {sorted(row)}"
        raise BadSampleError(where, "missing_field", problem, AS_PUBLISHED)
    return value.strip()


def one_of(row: Row, name: str, known: Sequence[str], where: str) -> str:
    """The text of a field that has few values. Raises BadSampleError for any other."""
    value = text(row, (name,), where)
    if value not in known:
        problem = f"{name!r} is {value[:60]!r}, not one of {', '.join(map(repr, known))}"
        raise BadSampleError(where, "bad_type", problem, AS_PUBLISHED)
    return value


def kept(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """The fields that become metadata, as far as the row has them: ``copd eval --by`` groups by them."""
    return {name: row[name] for name in names if row.get(name) is not None}


def listed(row: Row, name: str, where: str) -> list[str]:
    """A field with a list of texts, which some tables hold as the text of a Python list. Empty if absent.

    Raises BadSampleError: it holds something else.
    """
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            problem = f"{name!r} is no list: {str(row[name])[:60]!r}"
            raise BadSampleError(where, "bad_type", problem, AS_PUBLISHED) from error
    if value in (None, ""):
        return []
    if not isinstance(value, list | tuple):
        problem = f"{name!r} is a {type(value).__name__}, not a list"
        raise BadSampleError(where, "bad_type", problem, AS_PUBLISHED)
    return [str(item).strip() for item in value]


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with its options below it, lettered."""
    lines = [f"{letter_of(number)}. {option}" for number, option in enumerate(options)]
    return "\n".join([question, "Options:", *lines])


def letter_of(number: int) -> str:
    """A for 0, B for 1 and so on."""
    return chr(ord("A") + number)


def gold_letter(answer: str, options: Sequence[str], where: str) -> str:
    """The letter of an answer that is given as a letter or as the option's text. A text comes first: options
    may be letters themselves, the names of points for example. Raises BadSampleError for any other answer."""
    if list(options).count(answer) == 1:
        return letter_of(options.index(answer))
    letters = [letter_of(number) for number in range(len(options))]
    if answer in letters:
        return answer
    problem = f"the answer {answer[:60]!r} is none of the {len(options)} options"
    raise BadSampleError(where, "bad_answer", problem, AS_PUBLISHED)


def choice_task(
    question: str,
    letter: str,
    options: Sequence[str],
    media: Sequence[MediaSource],
    metadata: Mapping[str, Any],
    where: str,
) -> PublicTask:
    """A multiple-choice question whose text holds its options already. Raises BadSampleError if the gold
    answer is the letter of no option."""
    if letter not in [letter_of(number) for number in range(len(options))]:
        problem = f"the answer {letter[:60]!r} is the letter of none of the {len(options)} options"
        raise BadSampleError(where, "bad_answer", problem, AS_PUBLISHED)
    return PublicTask(
        question=question,
        answer=letter,
        verifier="choice",
        metadata={**metadata, "choices": list(options)},
        media=tuple(media),
    )


def open_task(
    question: str, answer: str, media: Sequence[MediaSource], metadata: Mapping[str, Any]
) -> PublicTask:
    """A question with a free answer: compared as a number where it is one, else as text."""
    return PublicTask(
        question=question,
        answer=answer,
        verifier="numeric" if is_number(answer) else "exact",
        metadata=metadata,
        media=tuple(media),
    )


def images(row: Row, names: Sequence[str], where: str) -> list[MediaSource]:
    """The images of the first of these fields that holds any. Raises BadSampleError without one."""
    value = next((row[name] for name in names if row.get(name) not in (None, "", [], {})), None)
    if value is None:
        problem = f"needs an image in {' or '.join(map(repr, names))}; the row has {sorted(row)}"
        raise BadSampleError(where, "no_media", problem, AS_PUBLISHED)
    entries = value if isinstance(value, list | tuple) else [value]
    return [medium_source(entry, IMAGE, where) for entry in entries]
