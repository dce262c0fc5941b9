"""The actor under sequence, context, virtual pipeline and expert parallelism: numbers as on one rank.

Real Megatron on Gloo ranks, packed micro-batches; all layouts of both models run in one launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.layouts import EXPERTS, SEQUENCE, VIRTUAL, Job, run_layouts
from tests.support.models import reference_distributions, reference_logprobs
from tests.support.policy_runs import (
    OPTIMIZER,
    TEMPERATURE,
    TOP_K,
    VOCAB,
    Outcome,
    exercise,
    mixed_rows,
    support_ids,
)
from tests.support.texts import Text, grouped_texts, random_texts

DENSE: dict[str, dict[str, Any]] = {
    "one": {},
    "sequence": {"tp": 2, "also": SEQUENCE},
    "context": {"cp": 2},
    "sequence and context": {"tp": 2, "cp": 2, "also": SEQUENCE},
    "virtual pipeline": {"pp": 2, "also": VIRTUAL},
}
MIXTURE: dict[str, dict[str, Any]] = {
    "one": {},
    "experts over data": {"dp": 2, "also": EXPERTS},
    "experts over tensor": {"tp": 2, "also": EXPERTS | SEQUENCE},
    "experts and pipeline": {"pp": 2, "dp": 2, "also": EXPERTS},
}


def _texts() -> list[Text]:
    """Rows alone and in groups: a prompt is computed once, but under context parallelism for every row."""
    return [*random_texts(5, VOCAB, seed=1), *grouped_texts(3, 4, VOCAB, seed=2)]


@pytest.fixture(scope="module")
def outcomes(layout_models: dict[str, Path]) -> dict[tuple[str, str], list[Outcome]]:
    texts = _texts()
    states = [[0, text.response_length - 1] if i % 2 else [] for i, text in enumerate(texts)]
    jobs, keys = [], []
    for kind, layouts in (("dense", DENSE), ("mixture", MIXTURE)):
        rows = mixed_rows(layout_models[kind], texts)
        for name, sizes in layouts.items():
            jobs.append(Job(**sizes, args=(layout_models[kind], texts, states, rows)))
            keys.append((kind, name))
    return dict(zip(keys, run_layouts(exercise, jobs), strict=True))


each_layout = pytest.mark.parametrize(
    ("kind", "layout"), [("dense", name) for name in DENSE] + [("mixture", name) for name in MIXTURE]
)


@each_layout
def test_scores_equal_transformers(
    outcomes: dict[Any, list[Outcome]], layout_models: dict[str, Path], kind: str, layout: str
) -> None:
    alone = outcomes[kind, "one"][0]
    for rank in outcomes[kind, layout]:
        for text, score, other in zip(_texts(), rank.scores, alone.scores, strict=True):
            exact = reference_logprobs(layout_models[kind], text.token_ids, text.prompt_length, TEMPERATURE)
            np.testing.assert_allclose(score.logprobs, exact, atol=1e-4)
            np.testing.assert_allclose(score.entropy, other.entropy, atol=1e-4)
            np.testing.assert_allclose(score.state_logprobs, other.state_logprobs, atol=1e-4)


@each_layout
def test_distributions_equal_those_of_one_rank(
    outcomes: dict[Any, list[Outcome]], kind: str, layout: str
) -> None:
    """Likeliest ids, ids asked about, and the loss and gradient of objectives that compare distributions."""
    alone = outcomes[kind, "one"][0]
    for rank in outcomes[kind, layout]:
        for mine, other in zip(rank.answers, alone.answers, strict=True):
            assert np.array_equal(mine["ids"], other["ids"])
            for name in ("logprobs", "support"):
                np.testing.assert_allclose(mine[name], other[name], atol=1e-4)
        (mine, stepped), (other, other_stepped) = rank.distilled, alone.distilled
        assert mine.loss == pytest.approx(other.loss, rel=1e-5)
        assert mine.sums == pytest.approx(other.sums, rel=1e-5, abs=1e-5)
        assert stepped["skipped"] == 1.0
        assert stepped["grad_norm"] == pytest.approx(other_stepped["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_likeliest_ids_are_those_of_the_exact_distribution(
    outcomes: dict[Any, list[Outcome]], layout_models: dict[str, Path], kind: str
) -> None:
    texts = _texts()
    for text, ids, answer in zip(texts, support_ids(texts), outcomes[kind, "one"][0].answers, strict=True):
        exact = reference_distributions(
            layout_models[kind], text.token_ids, text.prompt_length, TEMPERATURE * 0.7
        )
        order = np.argsort(-exact, axis=1)[:, :TOP_K]
        assert np.array_equal(answer["ids"], order)
        np.testing.assert_allclose(answer["logprobs"], np.take_along_axis(exact, order, 1), atol=1e-4)
        expected = np.where(ids >= 0, np.take_along_axis(exact, np.maximum(ids, 0), 1), 0.0)
        np.testing.assert_allclose(answer["support"], expected, atol=1e-4)


@each_layout
def test_training_equals_one_rank(outcomes: dict[Any, list[Outcome]], kind: str, layout: str) -> None:
    """Loss, gradient norm, and after two steps every weight wherever it lies."""
    alone = outcomes[kind, "one"][0]
    covered = set()
    for rank in outcomes[kind, layout]:
        for (mine, stepped), (other, other_stepped) in zip(rank.steps, alone.steps, strict=True):
            assert mine.loss == pytest.approx(other.loss, rel=1e-5)
            assert stepped["grad_norm"] == pytest.approx(other_stepped["grad_norm"], rel=1e-5)
            assert mine.sums == pytest.approx(other.sums, rel=1e-5, abs=1e-5)
        for place, (dim, start, stop, values) in rank.weights.items():
            name = place.removeprefix("copy of ")
            expected = alone.weights[name][3]
            if dim is not None:
                expected = np.take(expected, range(start, stop), axis=dim)
            np.testing.assert_allclose(values, expected, atol=0.02 * OPTIMIZER.lr, err_msg=place)
            covered.add(name)
    assert covered == set(alone.weights)


def test_experts_are_shared_out(outcomes: dict[Any, list[Outcome]]) -> None:
    for layout in ("experts over data", "experts over tensor"):
        held = [
            {name.split(".")[5] for name in rank.weights if ".experts." in name}
            for rank in outcomes["mixture", layout]
        ]
        assert held == [{"0", "1"}, {"2", "3"}]
