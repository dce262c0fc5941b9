"""From rewards and scores to one loss (Alg. 1, lines 9 to 12) against the paper in plain loops."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.schema import AdvantageConfig, LossConfig
from copd_megatron.objectives.denominators import component_counts, row_weights
from copd_megatron.objectives.grpo import native_rows
from copd_megatron.objectives.policy_loss import TokenStreams, policy_loss
from copd_megatron.objectives.sampled_token import cross_rows
from tests.support.rows import MAX_NEW_TOKENS, make_rollout, slow_grpo


def slow_update_loss(
    native: list, cross: list, theta: dict, beta: float, low: float, high: float
) -> torch.Tensor:
    """Eq. 7 + 11 on native groups plus Eq. 8 on cross responses: means of means, straight from the paper.

    native: (rollout, old log-probabilities); cross: (rollout, old, teacher). theta: id -> log pi, a leaf.
    """

    def surrogate(rho: torch.Tensor, advantage: float) -> torch.Tensor:
        return torch.minimum(rho * advantage, torch.clamp(rho, 1 - low, 1 + high) * advantage)

    rewards = [rollout.reward for rollout, _ in native]
    groups = [rollout.prompt.prompt_id for rollout, _ in native]
    responses = []
    for (rollout, old), advantage in zip(
        native, slow_grpo(rewards, groups, normalize=True, epsilon=1e-6), strict=True
    ):
        logp = theta[id(rollout)]
        terms = [surrogate(torch.exp(logp[t] - old[t]), advantage) for t in range(len(old))]
        responses.append(sum(terms) / len(terms))
    loss = -sum(responses) / len(responses)
    responses = []
    for rollout, old, teacher in cross:
        logp = theta[id(rollout)]
        terms = [
            surrogate(torch.exp(logp[t] - old[t]), beta * float(teacher[t] - old[t])) for t in range(len(old))
        ]
        responses.append(sum(terms) / len(terms))
    return loss - sum(responses) / len(responses)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), num_ranks=st.integers(1, 3))
def test_one_update_of_native_and_cross_rows_equals_the_paper(seed: int, num_ranks: int) -> None:
    generator = np.random.default_rng(seed)

    def logprobs(length: int) -> np.ndarray:
        return -generator.random(length).astype(np.float32) * 3

    lengths = generator.integers(1, 6, 8)
    native = [
        make_rollout(f"t/{i // 3}", i % 3, int(lengths[i]), float(generator.integers(0, 2))) for i in range(6)
    ]
    cross = [make_rollout("i/9", i, int(lengths[6 + i]), None) for i in range(2)]
    old = {id(r): logprobs(r.response_length) for r in native + cross}
    teacher = {id(r): logprobs(r.response_length) for r in cross}
    theta = {
        id(r): torch.tensor(old[id(r)] + 0.3 * generator.standard_normal(r.response_length)).requires_grad_()
        for r in native + cross
    }
    slow = slow_update_loss(
        [(r, torch.tensor(old[id(r)], dtype=torch.float64)) for r in native],
        [(r, torch.tensor(old[id(r)], dtype=torch.float64), teacher[id(r)].astype(float)) for r in cross],
        theta,
        beta=0.7,
        low=0.2,
        high=0.28,
    )
    slow_gradients = torch.autograd.grad(slow, list(theta.values()))

    config = LossConfig()
    rows = native_rows(
        native, AdvantageConfig(), config, MAX_NEW_TOKENS, old_logprobs=[old[id(r)] for r in native]
    )
    rows += cross_rows(
        cross,
        [teacher[id(r)] for r in cross],
        [old[id(r)] for r in cross],
        component="cross:image",
        teacher="image",
        beta=0.7,
    )
    order = {id(row): theta[id(r)] for row, r in zip(rows, native + cross, strict=True)}
    counts = component_counts(rows)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(num_ranks):
        mine = rows[rank::num_ranks]
        weights = row_weights(mine, counts, config, MAX_NEW_TOKENS)
        streams = TokenStreams(
            old_logprobs=torch.tensor(np.concatenate([row.old_logprobs for row in mine])),
            advantages=torch.tensor(np.concatenate([row.advantages for row in mine])),
            weights=torch.tensor(np.concatenate(weights)),
            loss_mask=torch.tensor(np.concatenate([row.loss_mask for row in mine])),
            row_index=torch.tensor(np.repeat(np.arange(len(mine)), [row.response_length for row in mine])),
        )
        total = total + policy_loss(torch.cat([order[id(row)] for row in mine]), None, streams, config).loss
    torch.testing.assert_close(total, slow, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(total, list(theta.values()))
    for a, b in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
