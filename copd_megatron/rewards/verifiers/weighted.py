"""``weighted``: several verifiers' grades, added up with weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copd_megatron.rewards import registry
from copd_megatron.rewards.registry import register
from copd_megatron.rewards.terms import read_terms


@register("weighted", gold_is_a_response=False)
def weighted(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """The sum of the grades of metadata ``terms``, each times its weight (``terms.read_terms``).

    ``{"terms": [{"verifier": "math", "weight": 0.9}, {"verifier": "format", "weight": 0.1}]}``

    In a run, every term is graded as if the sample named it, with its own time limit and process
    (``grader.py``); the terms' verifiers must be among the branch's ``reward.verifiers``.

    Raises ValueError for terms that cannot be read or name a function by its path (in a run, such a term is
    graded as a sample of its own), and whatever a verifier raises.
    """
    return sum(
        term.weight
        * registry.named_by_data(term.verifier).verify(
            response, answer if term.answer is None else term.answer, term.settings(metadata)
        )
        for term in read_terms(metadata)
    )
