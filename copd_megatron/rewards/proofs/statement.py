"""What is to be proved: read from a sample."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from copd_megatron.rewards.sandbox import Limits
from copd_megatron.rewards.sandbox.limits import MIB

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_']*")
_OURS = "copd"
"""How the names of our own modules and constants begin, in any case."""


class RejectedError(Exception):
    """The response is no proof of the statement: says why."""


class Assistant(Enum):
    """A proof assistant."""

    coq = "coq"
    lean = "lean"
    """Lean 4."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A theorem without its proof."""

    assistant: Assistant
    name: str
    statement: str
    """The proposition, closed: ``forall n : nat, n + 0 = n``."""
    header: str
    """Imports, scopes and options. Stands at the beginning of several files, so it may define nothing."""
    definitions: str
    """What the statement speaks of, compiled once. Whatever it assumes may be used."""
    axioms: frozenset[str]
    """Axioms that the proof may rest on, by name or full name."""


def read_statement(answer: str) -> Statement:
    """The statement of a sample: a JSON object with ``name`` and ``statement``, and where they are needed
    ``header``, ``definitions``, ``axioms`` (a list) and ``assistant`` (``coq``, the default, or ``lean``).

    Raises ValueError: it is none.
    """
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer of verifier 'proof' is no JSON: {error}") from error
    known = {field.name for field in fields(Statement)}
    if not isinstance(given, Mapping) or not {"name", "statement"} <= set(given) <= known:
        raise ValueError(
            f"the answer of verifier 'proof' needs name and statement, and knows {', '.join(sorted(known))}: "
            f"{answer[:80]!r}"
        )
    axioms = given.get("axioms") or []
    if not isinstance(axioms, list):
        raise ValueError(f"axioms of verifier 'proof' are a list of names, not {axioms!r:.60}.")
    kind = given.get("assistant") or Assistant.coq.value
    if kind not in [assistant.value for assistant in Assistant]:
        raise ValueError(f"verifier 'proof' knows no assistant {kind!r:.60}. Take coq or lean.")
    return Statement(
        assistant=Assistant(kind),
        name=_name(given["name"]),
        statement=_text(given, "statement").strip(),
        header=_text(given, "header"),
        definitions=_text(given, "definitions"),
        axioms=frozenset(str(name) for name in axioms),
    )


def _name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower().startswith(_OURS):
        raise ValueError(f"{name!r:.60} cannot name a theorem of verifier 'proof'.")
    return name


def _text(given: Mapping[str, Any], key: str) -> str:
    text = given.get(key) or ""
    if not isinstance(text, str) or (key == "statement" and not text.strip()):
        raise ValueError(f"{key} of verifier 'proof' is no text: {text!r:.60}")
    return text


def limits(seconds: float, memory_bytes: int, total_memory_bytes: int) -> Limits:
    """Limits of one run of an assistant.

    Args:
        seconds: CPU time; as much again may pass on a busy machine.
        memory_bytes: address space of each process.
        total_memory_bytes: memory of all processes together.
    """
    return Limits(
        cpu_seconds=seconds,
        wall_seconds=2 * seconds,
        memory_bytes=memory_bytes,
        total_memory_bytes=total_memory_bytes,
        processes=16,
        file_bytes=32 * MIB,
        scratch_bytes=64 * MIB,
        open_files=256,
        output_bytes=16 * MIB,
    )
