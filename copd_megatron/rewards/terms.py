"""Rewards of several terms: verifiers with weights, for one sample or for all of a branch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

OWN = "sample"
"""Stands in a branch's ``reward.terms`` for the verifier that a sample names."""
WEIGHTED = "weighted"
"""The verifier whose samples bring terms of their own."""
_KEYS = frozenset({"verifier", "weight", "answer", "metadata"})


@dataclass(frozen=True, kw_only=True)
class Term:
    """One verifier's share of a reward."""

    verifier: str
    weight: float
    answer: str | None = None
    """Its gold answer; None: the sample's."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Its settings, beside the sample's."""

    def settings(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata for this term's verifier."""
        return {**sample, **self.metadata}


def read_terms(metadata: Mapping[str, Any], verifiers: Collection[str] | None = None) -> tuple[Term, ...]:
    """The terms of a sample of verifier ``weighted``: metadata ``terms``, a list of objects with
    ``verifier`` and ``weight``, and where they differ from the sample's ``answer`` and ``metadata``.

    Args:
        verifiers: the names that terms may use; None: any.

    Raises ValueError: no such list, or a verifier that is unknown or has terms itself.
    """
    listed = metadata.get("terms")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"verifier 'weighted' needs metadata 'terms', a list, not {listed!r:.60}.")
    terms = tuple(_term(given) for given in listed)
    for term in terms:
        if term.verifier == WEIGHTED or (verifiers is not None and term.verifier not in verifiers):
            raise ValueError(
                f"a term of verifier 'weighted' names {term.verifier!r:.60}, which it cannot use."
            )
    return terms


def _term(given: object) -> Term:
    if not isinstance(given, Mapping) or not {"verifier", "weight"} <= set(given) <= _KEYS:
        raise ValueError(f"a term has verifier and weight, and may have answer and metadata: {given!r:.80}")
    verifier, weight = given["verifier"], given["weight"]
    if not isinstance(verifier, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"a term's verifier is a name and its weight a number: {given!r:.80}")
    if not math.isfinite(weight):
        raise ValueError(f"a term's weight is finite, not {weight}.")
    answer, settings = given.get("answer"), given.get("metadata")
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping) or not isinstance(answer, str | None):
        raise ValueError(f"a term's answer is text and its metadata an object: {given!r:.80}")
    return Term(verifier=verifier, weight=float(weight), answer=answer, metadata=settings)


def terms_of(
    verifier: str, metadata: Mapping[str, Any], branch: Mapping[str, float] | None = None
) -> tuple[Term, ...]:
    """All terms of a sample's reward.

    Args:
        verifier: the one that the sample names.
        branch: weights by verifier, for all samples of a branch (``reward.terms``); none: the sample's alone.

    Raises ValueError as ``read_terms``.
    """
    own = read_terms(metadata) if verifier == WEIGHTED else (Term(verifier=verifier, weight=1.0),)
    if not branch:
        return own
    terms = []
    for name, weight in branch.items():
        if name != OWN:
            terms.append(Term(verifier=name, weight=weight))
            continue
        terms += [
            Term(
                verifier=term.verifier,
                weight=weight * term.weight,
                answer=term.answer,
                metadata=term.metadata,
            )
            for term in own
        ]
    return tuple(terms)
