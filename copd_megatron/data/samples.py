"""One sample of a shard: its fields, their types, and how its JSON member is read and checked.

A sample is every member of the tar whose name starts with the same key (webdataset's convention)::

    000017.json     {"prompt": ..., "answer": ..., "verifier": ..., "metadata": {...}}
    000017.0.png    optional media members, referred to by extension ("0.png", "1.png", "mp4", ...)

``prompt`` is a string or a non-empty list of chat messages ``{"role": ..., "content": ...}``. A content is a
string or a list of parts: ``{"type": "text", "text": ...}``, ``{"type": "image"}``, ``{"type": "video"}``.
``metadata`` may be left out. Other fields are ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from copd_megatron.data.failures import name_and_text
from copd_megatron.errors import BadSampleError
from copd_megatron.rewards.terms import WEIGHTED, read_terms
from copd_megatron.untrusted.json_text import MAX_BYTES, MAX_NESTING, NestingError, load, load_as_written

Message = Mapping[str, Any]

REQUIRED_FIELDS = ("prompt", "answer", "verifier")
PART_TYPES = ("text", "image", "video")

_WRITE_AGAIN = "Write the shard again."


class SampleRef(NamedTuple):
    """Where a sample lies; small, picklable, and the same on every rank that reads the same shards."""

    shard: str
    """Name of the shard within its shard set, usually the file name without ``.tar``."""
    key: str

    @property
    def id(self) -> str:
        """``<shard>/<key>``: the prompt's id."""
        return f"{self.shard}/{self.key}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One checked sample, before tokenisation."""

    ref: SampleRef
    prompt: str | tuple[Message, ...]
    answer: str
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[str, ...] = ()
    """Extensions of the sample's other members; ``ShardSet.read_member(ref, extension)`` reads one."""


def parse_sample(
    raw: bytes,
    ref: SampleRef,
    where: str,
    *,
    media: tuple[str, ...] = (),
    verifiers: Collection[str] | None = None,
) -> Sample:
    """Read and check a sample's JSON member.

    ``where`` names the sample in errors; ``verifiers``: the names a sample may use, None: any.

    Raises BadSampleError: not JSON, or as ``sample_from_record``.
    """
    refuse_large(len(raw), where)
    record = load_json(raw, where, "the .json member is not valid JSON", _WRITE_AGAIN)
    return sample_from_record(record, ref, where, media=media, verifiers=verifiers)


def refuse_large(num_bytes: int, where: str) -> None:
    """Raises BadSampleError (``not_json``) for a JSON member that is too large to be read."""
    if num_bytes > MAX_BYTES:
        raise BadSampleError(
            where, "not_json", f"the .json member has {num_bytes} bytes", f"Keep it below {MAX_BYTES}."
        )


def load_json(raw: bytes, where: str, problem: str, remedy: str, *, as_written: bool = False) -> Any:
    """What a JSON text says, in any of Unicode's encodings; ``as_written``: by ``json_text.load_as_written``.

    Raises BadSampleError (``not_json``, ``too_nested``): as ``json_text.load``, of any length.
    """
    try:
        text = raw.decode(json.detect_encoding(raw), "surrogatepass")
        return (load_as_written if as_written else load)(text, max_bytes=len(raw))
    except NestingError as error:
        raise _too_nested(where) from error
    except ValueError as error:
        raise BadSampleError(where, "not_json", f"{problem} ({name_and_text(error)})", remedy) from error


def sample_from_record(
    record: Any,
    ref: SampleRef,
    where: str,
    *,
    media: tuple[str, ...] = (),
    verifiers: Collection[str] | None = None,
) -> Sample:
    """The sample that a decoded JSON object describes.

    Raises BadSampleError: a missing field, a field of a wrong type, text that is not Unicode, a prompt that
    says nothing, or an unknown verifier.
    """
    check_plain(record, where)
    if not isinstance(record, dict):
        raise _bad_type(where, "the .json member", "an object", record)
    missing = [name for name in REQUIRED_FIELDS if name not in record]
    if missing:
        raise BadSampleError(
            where,
            "missing_field",
            f"field(s) {', '.join(repr(name) for name in missing)} missing; it has {sorted(record)}",
            "Every sample needs prompt, answer and verifier; tools/jsonl_to_shards.py maps other names.",
        )
    prompt = _check_prompt(record["prompt"], where)
    for name in ("answer", "verifier"):
        if not isinstance(record[name], str):
            raise _bad_type(where, repr(name), "a string", record[name])
    metadata = record.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise _bad_type(where, "'metadata'", "an object", metadata)
    verifier = record["verifier"]
    if verifiers is not None and verifier not in verifiers:
        raise _unknown_verifier(where, verifier, verifiers)
    if verifier == WEIGHTED:
        try:
            read_terms(metadata, verifiers)
        except ValueError as error:
            raise BadSampleError(where, "bad_terms", str(error), "Correct the sample's terms.") from error
    return Sample(
        ref=ref, prompt=prompt, answer=record["answer"], verifier=verifier, metadata=metadata, media=media
    )


def check_plain(value: Any, where: str) -> None:
    """Refuse what JSON allows but later stages cannot take: deep nesting and lone surrogates.

    Raises BadSampleError (``too_nested``, ``bad_text``).
    """
    level, depth = [value], 0
    while level:
        if depth > MAX_NESTING:
            raise _too_nested(where)
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, where)
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        level, depth = below, depth + 1


def texts_and_media(prompt: str | Sequence[Message]) -> Iterator[tuple[str, str]]:
    """(type, text) of every part of a prompt, in order; a medium's text is empty."""
    if isinstance(prompt, str):
        yield "text", prompt
        return
    for message in prompt:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            yield part["type"], part["text"] if part["type"] == "text" else ""


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSampleError(
            where,
            "bad_text",
            f"a text holds half of a surrogate pair, {text[error.start]!a}, which is no character",
            "Repair the text: it was probably cut in the middle of a character.",
        ) from error


def _check_prompt(prompt: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _empty_prompt(where, "'prompt' is empty")
        return prompt
    if not isinstance(prompt, list):
        raise _bad_type(where, "'prompt'", "a string or a list of chat messages", prompt)
    if not prompt:
        raise _empty_prompt(where, "'prompt' is an empty list")
    messages = tuple(
        _check_message(message, f"message {position} of 'prompt'", where)
        for position, message in enumerate(prompt)
    )
    asked = [message for message in messages if message["role"] != "system"]
    if not any(kind != "text" or text.strip() for kind, text in texts_and_media(asked)):
        raise _empty_prompt(where, "no message of 'prompt' but the system's has any text")
    return messages


def _check_message(message: Any, name: str, where: str) -> Message:
    if not isinstance(message, dict):
        raise _bad_type(where, name, 'an object {"role": ..., "content": ...}', message)
    if not isinstance(message.get("role"), str):
        raise _bad_type(where, f"'role' of {name}", "a string", message.get("role"))
    content = message.get("content")
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise _bad_type(where, f"'content' of {name}", "a string or a list of parts", content)
    parts = [_check_part(part, f"part {i} of {name}", where) for i, part in enumerate(content)]
    return {**message, "content": parts}


def _check_part(part: Any, name: str, where: str) -> dict[str, Any]:
    """The part without the fields that are null, as tables with one column per field have them."""
    if not isinstance(part, dict):
        raise _bad_type(where, name, 'an object {"type": ...}', part)
    kind = part.get("type")
    if kind not in PART_TYPES:
        raise _bad_type(where, f"'type' of {name}", f"one of {', '.join(PART_TYPES)}", kind)
    if kind == "text" and not isinstance(part.get("text"), str):
        raise _bad_type(where, f"'text' of {name}", "a string", part.get("text"))
    return {field_name: value for field_name, value in part.items() if value is not None}


def _unknown_verifier(where: str, verifier: str, verifiers: Collection[str]) -> BadSampleError:
    near = difflib.get_close_matches(verifier, list(verifiers), n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return BadSampleError(
        where,
        "unknown_verifier",
        f"verifier {verifier!r} is not among the branch's verifiers {sorted(verifiers)}",
        f"{hint}Name it in the branch's reward.verifiers or correct the shard.",
    )


def _empty_prompt(where: str, problem: str) -> BadSampleError:
    return BadSampleError(where, "empty_prompt", problem, "Drop the sample or fill it in.")


def _too_nested(where: str) -> BadSampleError:
    return BadSampleError(
        where,
        "too_nested",
        f"its JSON nests objects and lists more than {MAX_NESTING} levels deep",
        "Store such a value as a string.",
    )


def _bad_type(where: str, what: str, wanted: str, got: Any) -> BadSampleError:
    shown = "nothing" if got is None else f"{type(got).__name__} {_short(got)}"
    return BadSampleError(where, "bad_type", f"{what} must be {wanted}, got {shown}", _WRITE_AGAIN)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
