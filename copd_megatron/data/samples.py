"""One sample of a shard: its fields, their types, and how its JSON member is read and checked.

A sample is every member of the tar whose name starts with the same key (webdataset's convention)::

    000017.json     {"prompt": ..., "answer": ..., "verifier": ..., "metadata": {...}}
    000017.0.png    optional media members, referred to by extension ("0.png", "1.png", "mp4", ...)

``prompt`` is a string or a non-empty list of chat messages ``{"role": ..., "content": ...}``; ``metadata``
may be left out. Other fields are ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from copd_megatron.errors import BadSampleError

Message = Mapping[str, Any]

REQUIRED_FIELDS = ("prompt", "answer", "verifier")


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

    Raises BadSampleError: not JSON, a missing field, a field of a wrong type, or an unknown verifier.
    """
    try:
        record = json.loads(raw)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise BadSampleError(
            where, "not_json", f"the .json member is not valid JSON ({error})", "Write the shard again."
        ) from error
    return sample_from_record(record, ref, where, media=media, verifiers=verifiers)


def sample_from_record(
    record: Any,
    ref: SampleRef,
    where: str,
    *,
    media: tuple[str, ...] = (),
    verifiers: Collection[str] | None = None,
) -> Sample:
    """The same checks on a decoded record. Raises BadSampleError."""
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
        near = difflib.get_close_matches(verifier, list(verifiers), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise BadSampleError(
            where,
            "unknown_verifier",
            f"verifier {verifier!r} is not among the branch's verifiers {sorted(verifiers)}",
            f"{hint}Name it in the branch's reward.verifiers or correct the shard.",
        )
    return Sample(
        ref=ref, prompt=prompt, answer=record["answer"], verifier=verifier, metadata=metadata, media=media
    )


def _check_prompt(prompt: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadSampleError(where, "empty_prompt", "'prompt' is empty", "Drop the sample or fill it in.")
        return prompt
    if not isinstance(prompt, list):
        raise _bad_type(where, "'prompt'", "a string or a list of chat messages", prompt)
    if not prompt:
        raise BadSampleError(
            where, "empty_prompt", "'prompt' is an empty list", "Drop the sample or fill it in."
        )
    for position, message in enumerate(prompt):
        name = f"message {position} of 'prompt'"
        if not isinstance(message, dict):
            raise _bad_type(where, name, 'an object {"role": ..., "content": ...}', message)
        if not isinstance(message.get("role"), str):
            raise _bad_type(where, f"'role' of {name}", "a string", message.get("role"))
        # A list holds typed parts ({"type": "text", ...}, {"type": "image", ...}) for the chat template.
        if not isinstance(message.get("content"), str | list):
            raise _bad_type(
                where, f"'content' of {name}", "a string or a list of parts", message.get("content")
            )
    return tuple(prompt)


def _bad_type(where: str, what: str, wanted: str, got: Any) -> BadSampleError:
    shown = repr(got)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return BadSampleError(
        where,
        "bad_type",
        f"{what} must be {wanted}, got {type(got).__name__} {shown}",
        "Write the shard again.",
    )
