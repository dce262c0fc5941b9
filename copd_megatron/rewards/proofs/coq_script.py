"""Coq text, cut into sentences; and which sentences a response may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

from copd_megatron.rewards.proofs.statement import RejectedError

_PREFIX = re.compile(r"(?:\s|[-+*]+|[{}]|(?:all|par|!|\[\w+\]|\d[\d,\s-]*)\s*:(?!=))*")
"""Bullets, braces and goal selectors, which may stand before a tactic."""
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_']*")
_TACTIC_STARTS = re.compile(r"[a-z_(\[]")
_UNFINISHED = re.compile(r"\b(?:admit|give_up|Admitted)\b")
_THEOREM = frozenset({"Theorem", "Lemma", "Corollary", "Fact", "Remark", "Proposition"})
_HEADER = frozenset({"Require", "From", "Import", "Open", "Local", "Set", "Unset"})
_HEADER_OPTION = re.compile(
    r"(?:Local\s+)?(?:(?:Set|Unset)\s+(?:Implicit|Strict|Maximal|Asymmetric)\b|Open\s+Scope\b)"
)


@dataclass(frozen=True)
class Proof:
    """What is taken from a response."""

    helpers: tuple[str, ...]
    """Sentences that state and prove lemmas, before the theorem."""
    body: tuple[str, ...]
    """Sentences between ``Proof.`` and ``Qed.``"""


def sentences(text: str) -> list[str]:
    """The sentences of a text, without comments, each with its full stop.

    Raises RejectedError: a comment or a string does not end, a comment holds a string (Coq reads those, so
    that it might see the end of the comment elsewhere), or a sentence has no end.
    """
    found, start = [], 0
    plain = _without_comments(text)
    for match in re.finditer(r"\"[^\"]*\"|\.(?=\s|\Z)", plain):
        if match.group() == ".":
            found.append(plain[start : match.end()].strip())
            start = match.end()
    rest = plain[start:].strip()
    if rest.strip("}- +*\n\t"):
        raise RejectedError(f"a sentence has no end: {rest[:60]!r}")
    return [*found, *([rest] if rest else [])]


def _without_comments(text: str) -> str:
    pieces, depth, start = [], 0, 0
    in_string = False
    for match in re.finditer(r"\"|\(\*|\*\)", text):
        token = match.group()
        if token == '"':
            if depth:
                raise RejectedError("a comment holds a quotation mark")
            in_string = not in_string
        elif in_string:
            raise RejectedError("a string holds the sign of a comment")
        elif token == "(*":
            if depth == 0:
                pieces.append(text[start : match.start()])
            depth += 1
        else:
            if depth == 0:
                raise RejectedError("a comment ends that did not begin")
            depth -= 1
            start = match.end()
    if depth or in_string:
        raise RejectedError("a comment or a string does not end")
    return " ".join([*pieces, text[start:]])


def read_proof(text: str, name: str, header: str) -> Proof:
    """The proof in a text: tactics alone; or ``Proof.``, tactics and ``Qed.``; or the theorem of this name
    again with its proof, after lemmas with theirs. The sample's own imports may be repeated.

    Raises RejectedError: a sentence that is neither a tactic nor one of these.
    """
    ours = {_spaced(sentence) for sentence in sentences(header)}
    given = [sentence for sentence in sentences(text) if _spaced(sentence) not in ours]
    for sentence in given:
        if unfinished := _UNFINISHED.search(sentence):
            raise RejectedError(f"{unfinished.group()!r} is no proof")
    starts = [number for number, sentence in enumerate(given) if _spaced(sentence) == "Proof."]
    helpers, body = ([], given) if not starts else (given[: starts[-1]], given[starts[-1] + 1 :])
    if helpers:
        if not _states(helpers[-1], name):
            raise RejectedError(f"the last proof is none of {name}")
        helpers = helpers[:-1]
    if body and body[-1] == "Qed.":
        body = body[:-1]
    for sentence in body:
        _require_tactic(sentence)
    _require_lemmas(helpers)
    return Proof(tuple(helpers), tuple(body))


def check_header(header: str) -> None:
    """Raises ValueError where a sample's header does more than import, open scopes and set how arguments are
    read: what it defines would be another thing in every file."""
    for sentence in sentences(header):
        word = _first_word(sentence)
        is_option = _HEADER_OPTION.match(sentence) is not None
        if word not in _HEADER or (word in ("Local", "Set", "Unset", "Open") and not is_option):
            raise ValueError(
                f"the header of a proof sample holds {sentence[:60]!r}. Move it to 'definitions'."
            )


def _require_lemmas(helpers: list[str]) -> None:
    is_open = False
    for sentence in helpers:
        word = _first_word(sentence)
        if _spaced(sentence) == "Proof.":
            continue
        if is_open and sentence in ("Qed.", "Defined."):
            is_open = False
        elif not is_open and word in _THEOREM:
            is_open = True
        else:
            _require_tactic(sentence)
            if not is_open:
                raise RejectedError(f"a tactic outside a proof: {sentence[:60]!r}")
    if is_open:
        raise RejectedError("a lemma's proof does not end")


def _require_tactic(sentence: str) -> None:
    rest = sentence[_prefix(sentence) :]
    if rest and not _TACTIC_STARTS.match(rest):
        raise RejectedError(f"no tactic: {rest[:60]!r}")


def _prefix(sentence: str) -> int:
    match = _PREFIX.match(sentence)
    return match.end() if match else 0


def _first_word(sentence: str) -> str:
    match = _WORD.match(sentence, _prefix(sentence))
    return match.group() if match else ""


def _states(sentence: str, name: str) -> bool:
    words = _spaced(sentence).split(" ", 2)
    return len(words) == 3 and words[0] in _THEOREM and words[1].rstrip(":") == name


def _spaced(sentence: str) -> str:
    return re.sub(r"\s+", " ", sentence.strip())
