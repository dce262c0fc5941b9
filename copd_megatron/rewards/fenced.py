"""Blocks between fences of back quotes, as models write programs and proofs."""

from __future__ import annotations

from collections.abc import Collection

from copd_megatron.rewards.final_answer import after_thinking

_MAX_CHARACTERS = 200_000


def last_block(response: str, languages: Collection[str]) -> str | None:
    """The last closed block after the thinking whose language is one of these (in small letters; empty for
    a block that names none). None without one, or for a text of more than 200,000 characters."""
    text = after_thinking(response)
    if text is None or len(text) > _MAX_CHARACTERS:
        return None
    found: str | None = None
    language: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        if language is None:
            if bare.startswith("```"):
                language, lines = bare[3:].strip().lower(), []
        elif bare == "```":
            found = "\n".join(lines) if language in languages else found
            language = None
        else:
            lines.append(line)
    return found
