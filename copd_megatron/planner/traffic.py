"""How many bytes branches exchange in a step. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from copd_megatron.config.graph import Edge
from copd_megatron.config.schema import Topology
from copd_megatron.records import Ask

_SAMPLED_TOKENS: Final = Ask(tokens=True)
TOKEN_ID_BYTES: Final = 4
LOGPROB_BYTES: Final = 4


def edge_count(topology: Topology, num_branches: int) -> int:
    """Number of edges between live branches: 2 (K - 1) for hub and spoke, K (K - 1) for all to all."""
    match topology:
        case Topology.none:
            return 0
        case Topology.hub_and_spoke:
            return 2 * (num_branches - 1) if num_branches else 0
        case Topology.all_to_all:
            return num_branches * (num_branches - 1)
        case Topology.custom:
            raise ValueError("a custom topology has as many edges as opd.edges lists")


def answer_bytes(ask: Ask, support_k: int, vocab_size: int) -> int:
    """Bytes that come back about each response token: 4 for the sampled token's log-probability, 8 for each
    of the teacher's k likeliest ids, 4 for each id asked about, 4 for the entropy; all of the vocabulary
    where the whole distribution is asked (and 4 more for the position, which is sent)."""
    values = ask.tokens + 2 * ask.top_k + support_k + ask.entropy
    return LOGPROB_BYTES * (values + (vocab_size + 1 if ask.everywhere else 0))


def router_bytes(
    edges: Iterable[Edge],
    *,
    sequence_tokens: float,
    response_tokens: float,
    num_states: int = 0,
    vocab_size: int = 0,
    ask: Ask = _SAMPLED_TOKENS,
    support_k: int = 0,
) -> int:
    """Payload that branches exchange in one step, in bytes: the cost model of the router.

    A row sends 4 bytes per token id and receives 4 for each number that its objective asks about a response
    token: ``answer_bytes``. Ids that it asks about are sent, 4 bytes each. A state whose full distribution is
    requested sends 4 bytes for its position and receives 4 per vocabulary entry. Row tables and headers
    (under 150 bytes per row and lane) are not counted.

    Args:
        edges: of the graph.
        sequence_tokens: mean number of tokens of prompt plus response.
        response_tokens: mean number of tokens of a response.
        num_states: states per edge whose distribution is requested.
        vocab_size: log-probabilities per state.
        ask: what the edges' objective asks (``Objective.asks``); samples are not counted.
        support_k: ids that are asked about at each response token.
    """
    per_token = 4 * support_k + answer_bytes(ask, support_k, vocab_size)
    total = 0.0
    for edge in edges:
        total += edge.num_rows * (TOKEN_ID_BYTES * sequence_tokens + response_tokens * per_token)
        total += num_states * (4 + LOGPROB_BYTES * vocab_size)
    return round(total)
