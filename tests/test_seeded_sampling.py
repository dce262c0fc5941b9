"""The draw of a whole batch by seed and position: its law, what it depends on, and that vLLM uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.rollout.seeded import _negative_times, _token_keys, first_arrivals, row_keys
from tests.support.distributed import run_distributed
from tests.support.models import make_model

SEEDS = st.integers(0, 2**56 - 1)


def _draw(probabilities: torch.Tensor, seeds: list[int], positions: list[int]) -> list[int]:
    return first_arrivals(probabilities, row_keys(seeds, np.array(positions))).tolist()


def _law(num_tokens: int, *, spread: float = 2.0) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(num_tokens).standard_normal(num_tokens))
    return (noise * spread).softmax(-1).float()


@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_tokens_follow_their_probabilities(varied: str) -> None:
    law, count = _law(40), 100_000
    many = range(count)
    keys = row_keys(many, np.full(count, 25)) if varied == "seeds" else row_keys([7] * count, np.array(many))
    found = np.bincount(first_arrivals(law.expand(count, -1), keys), minlength=40)
    expected = law.double().numpy() * count
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert abs(chi_square - 39) < 4 * np.sqrt(2 * 39)


def test_times_are_exponential_also_where_they_are_small() -> None:
    """Small times decide. With a vocabulary of 150,000 the first of them is around 1e-5."""
    times = -_negative_times(_token_keys(150_000), row_keys(range(60), np.arange(60)))
    assert (times > 0).all() and times.isfinite().all()
    assert _distance(times[:2].flatten()) * np.sqrt(300_000) < 2  # by chance once in 1,500 times
    first = times.min(dim=-1).values * 150_000
    assert _distance(first) * np.sqrt(len(first)) < 2


def _distance(times: torch.Tensor) -> float:
    """Of Kolmogorov and Smirnov, from the exponential law."""
    uniform = np.sort(-np.expm1(-times.double().numpy()))
    steps = np.arange(len(uniform) + 1) / len(uniform)
    return float(max((uniform - steps[:-1]).max(), (steps[1:] - uniform).max()))


@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_neighbours_are_independent(varied: str) -> None:
    """Rows of successive seeds or positions, and tokens: correlations are as large as by chance."""
    size = 1000
    near = np.arange(size)
    keys = row_keys(range(size), np.full(size, 3)) if varied == "seeds" else row_keys([5] * size, near)
    uniform = _negative_times(_token_keys(size), keys).double().exp()
    normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).numpy()
    for table in (normal, normal.T):
        pairs = (table @ table.T / np.sqrt(size))[np.triu_indices(size, 1)]
        assert abs(pairs).max() < 6
        assert abs((pairs**2).mean() - 1) < 0.01


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SEEDS, st.integers(1, 2**17)), min_size=1, max_size=9), st.integers(1, 400))
def test_a_row_depends_on_nothing_but_itself(rows: list[tuple[int, int]], num_tokens: int) -> None:
    laws = _law(num_tokens).expand(len(rows), -1)
    together = _draw(laws, [seed for seed, _ in rows], [position for _, position in rows])
    alone = [_draw(laws[:1], [seed], [position])[0] for seed, position in rows]
    assert together == alone


def test_a_large_vocabulary_is_drawn_from_in_parts() -> None:
    laws = _law(70_000, spread=1.0).expand(5, -1)
    together = _draw(laws, [1, 2, 3, 4, 5], [9] * 5)
    assert together == [_draw(laws[:1], [seed], [9])[0] for seed in (1, 2, 3, 4, 5)]
    assert len(set(together)) == 5


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 2**20), st.integers(0, 299))
def test_what_is_certain_comes_and_what_is_impossible_does_not(seed: int, position: int, token: int) -> None:
    certain = torch.zeros(1, 300)
    certain[0, token] = 1
    assert _draw(certain, [seed], [position]) == [token]
    assert _draw(1 - certain, [seed], [position]) != [token]


def test_the_law_is_the_recorded_one() -> None:
    """Seeds mean the same responses after an upgrade of anything; a resumed run relies on it."""
    laws = _law(512).expand(8, -1)
    seeds = [0, 1, 2, 3, 2**55 + 1, 2**56 - 1, 12345, 12345]
    assert _draw(laws, seeds, [1, 1, 1, 1, 30, 31, 32, 33]) == RECORDED


RECORDED = [497, 194, 292, 373, 222, 49, 113, 92]


def _sampled(folder: Path) -> dict[str, list[object]]:
    from vllm import ir

    from copd_megatron.config.schema import RolloutConfig
    from copd_megatron.hf.folder import HFFolder
    from copd_megatron.rollout.engine import SamplingSettings
    from copd_megatron.topology.single import single_process
    from tests.support.actors import make_engine, random_prompts

    with single_process():
        config = RolloutConfig(max_new_tokens=12, max_num_seqs=8, cpu_kv_cache_gib=0.1)
        engine = make_engine(folder, config)
        engine.load_weights(((name, tensor * 0) for name, tensor in HFFolder(folder).iterate()), version=1)
        rollouts = engine.sample(
            random_prompts(4, length=9), SamplingSettings(num_generations=3, temperature=1.0), step=0
        )
        return {"rollouts": list(rollouts), "norms": [ir.ops.rms_norm.get_priority()[0]]}


@pytest.mark.slow
def test_vllm_draws_so(tmp_path: Path) -> None:
    """Of a model whose weights are all zero, every token is as likely as any other, so the tokens are known
    beforehand. (There are more responses than places, so rows change theirs.)"""
    folder = make_model(tmp_path / "model", seed=1)
    (seen,) = run_distributed(_sampled, 1, args=(folder,), timeout=400)
    assert seen["norms"] == ["copd_cpu"]
    for rollout in seen["rollouts"]:
        tokens = rollout.token_ids[rollout.prompt_length :].tolist()
        positions = rollout.prompt_length + np.arange(len(tokens))
        even = torch.full((len(tokens), 321), 1 / 321)
        assert tokens == first_arrivals(even, row_keys([rollout.seed] * len(tokens), positions)).tolist()
        np.testing.assert_allclose(rollout.rollout_logprobs, -np.log(321), atol=1e-4)
