"""The Megatron actor against transformers and against itself under other layouts, on real Gloo ranks.

All layouts of a model run in one launch (see ``tests.support.layouts``); the tests here read its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.records import TrainRow
from tests.support.layouts import Job, run_layouts
from tests.support.models import make_model, reference_distributions, reference_model
from tests.support.policy_runs import NUM_STEPS, OPTIMIZER, TEMPERATURE, VOCAB, Outcome, exercise, mixed_rows
from tests.support.texts import random_texts

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)]
KINDS = ("tied", "untied")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("policy")
    folders = {
        kind: make_model(root / kind, seed=i, tie_word_embeddings=kind == "tied", vocab_size=VOCAB)
        for i, kind in enumerate(KINDS)
    }
    texts = random_texts(11, VOCAB, seed=1)
    states = [[0, text.response_length - 1] if i % 2 else [] for i, text in enumerate(texts)]
    return {
        "folders": folders,
        "texts": texts,
        "states": states,
        "rows": {kind: mixed_rows(folder, texts) for kind, folder in folders.items()},
    }


@pytest.fixture(scope="module")
def outcomes(material: dict[str, Any]) -> dict[tuple[str, tuple[int, int, int]], list[Outcome]]:
    jobs = [
        Job(
            tp=tp, pp=pp, dp=dp,
            args=(material["folders"][kind], material["texts"], material["states"], material["rows"][kind]),
        )
        for kind in KINDS
        for tp, pp, dp in LAYOUTS
    ]  # fmt: skip
    keys: list[Any] = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
    for kind in KINDS:
        rows, texts, states = material["rows"][kind], material["texts"], material["states"]
        jobs.append(Job(args=(material["folders"][kind], texts, states, rows, False)))
        keys.append((kind, "padded"))
    return dict(zip(keys, run_layouts(exercise, jobs), strict=True))


each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}-pp{}-dp{}".format(*sizes))
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@each_layout
def test_scores_equal_transformers(
    outcomes: dict[Any, list[Outcome]], material: dict[str, Any], kind: str, layout: tuple[int, int, int]
) -> None:
    folder = material["folders"][kind]
    for rank in outcomes[kind, layout]:
        for text, states, score in zip(material["texts"], material["states"], rank.scores, strict=True):
            full = reference_distributions(folder, text.token_ids, text.prompt_length, TEMPERATURE)
            picked = full[np.arange(len(full)), text.token_ids[text.prompt_length :]]
            np.testing.assert_allclose(score.logprobs, picked, atol=1e-4)
            np.testing.assert_allclose(score.entropy, -(np.exp(full) * full).sum(-1), atol=1e-4)
            assert score.state_logprobs.shape == (len(states), VOCAB)
            np.testing.assert_allclose(score.state_logprobs, full[states], atol=1e-4)


def test_distributions_are_not_uniform(material: dict[str, Any]) -> None:
    """Otherwise agreement with transformers would say little."""
    for folder in material["folders"].values():
        text = material["texts"][1]
        full = reference_distributions(folder, text.token_ids, text.prompt_length)
        assert (full.max(-1) - full.min(-1)).min() > 3


@each_layout
def test_small_budget_makes_many_micro_batches(
    outcomes: dict[Any, list[Outcome]], material: dict[str, Any], layout: tuple[int, int, int]
) -> None:
    assert sum(len(t.token_ids) for t in material["texts"]) > 200
    assert max(rank.largest_micro_batch for rank in outcomes["tied", layout]) <= 100


@each_kind
@each_layout
def test_loss_and_grad_norm_do_not_depend_on_the_layout(
    outcomes: dict[Any, list[Outcome]], kind: str, layout: tuple[int, int, int]
) -> None:
    """A loss is a difference of terms of order one, so its rounding is measured against those: the tied
    model's second loss is -0.065, and each layout is up to 6e-7 off the float64 reference there. The head's
    plain formula (log-sum-exp, then p log p) is as far off as the one with a single exponential."""
    alone = outcomes[kind, (1, 1, 1)][0]
    for rank in outcomes[kind, layout]:
        for (mine, stepped), (other, other_stepped) in zip(rank.steps, alone.steps, strict=True):
            assert mine.loss == pytest.approx(other.loss, rel=1e-5, abs=2e-6)
            assert stepped["grad_norm"] == pytest.approx(other_stepped["grad_norm"], rel=1e-5)
            assert mine.terms == pytest.approx(other.terms, rel=1e-5)
            assert mine.sums == pytest.approx(other.sums, rel=1e-5, abs=1e-5)
            assert mine.max_gen_logprob_error == pytest.approx(other.max_gen_logprob_error, abs=1e-5)


@each_kind
def test_packed_equals_padded(outcomes: dict[Any, list[Outcome]], kind: str) -> None:
    (packed,), (padded,) = outcomes[kind, (1, 1, 1)], outcomes[kind, "padded"]
    for mine, other in zip(packed.scores, padded.scores, strict=True):
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(mine.entropy, other.entropy, atol=1e-5)
        np.testing.assert_allclose(mine.state_logprobs, other.state_logprobs, atol=1e-5)
    for (mine, stepped), (other, other_stepped) in zip(packed.steps, padded.steps, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-5)
        assert stepped["grad_norm"] == pytest.approx(other_stepped["grad_norm"], rel=1e-5)


# ---- a slow reference: transformers in float64, the loss written from the equations ---------------------


def _reference_loss(model: Any, rows: Sequence[TrainRow]) -> tuple[torch.Tensor, dict[str, float]]:
    """Eq. 7 per component, mean over tokens of a row, then over its component's rows that count; plus
    0.2 * k3 to the reference minus 0.1 * entropy."""
    total = torch.zeros((), dtype=torch.float64)
    extra = {"entropy": 0.0, "gen_kl_error": 0.0, "max_gen": 0.0}
    for component in {row.component for row in rows}:
        members = [row for row in rows if row.component == component and row.loss_mask.any()]
        for row in members:
            ids = torch.from_numpy(row.token_ids.astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0, row.prompt_length - 1 : -1]
            full = (logits / TEMPERATURE).log_softmax(-1)
            logprobs = full.gather(1, ids[row.prompt_length :, None]).squeeze(1)
            entropy = -(full.exp() * full).sum(-1)
            stream = {
                name: torch.from_numpy(getattr(row, name).astype(np.float64))
                for name in ("advantages", "loss_mask", "rollout_logprobs")
            }
            old = logprobs.detach()
            if row.old_logprobs is not None:
                old = torch.from_numpy(row.old_logprobs.astype(np.float64))
            ratio, advantage = (logprobs - old).exp(), stream["advantages"]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            token_loss = -surrogate - 0.1 * entropy
            if row.reference_logprobs is not None:
                gap = torch.from_numpy(row.reference_logprobs.astype(np.float64)) - logprobs
                token_loss = token_loss + 0.2 * (gap.exp() - gap - 1)
            mask = stream["loss_mask"]
            mean = (mask * token_loss).sum() / mask.sum()
            total = total + row.component_weight * mean / len(members)
            error = (logprobs - stream["rollout_logprobs"]).detach()
            extra["entropy"] += float((mask * entropy).detach().sum())
            extra["gen_kl_error"] += float((mask * (error.exp() - 1 - error)).sum())
            extra["max_gen"] = max(extra["max_gen"], float((mask * error).abs().max()))
    return total, extra


@pytest.fixture(scope="module")
def reference(material: dict[str, Any]) -> dict[str, Any]:
    """Per kind: losses and norms of each step, initial and final weights."""
    results = {}
    for kind, folder in material["folders"].items():
        model = reference_model(folder, torch.float64)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        # Megatron leaves vectors (norms) out of weight decay
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1]},
                {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.lr,
            weight_decay=OPTIMIZER.weight_decay,
            eps=OPTIMIZER.adam_eps,
        )
        steps = []
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            loss, extra = _reference_loss(model, material["rows"][kind])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
            optimizer.step()
            steps.append((float(loss.detach()), float(norm), extra))
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        results[kind] = {"steps": steps, "before": before, "after": after}
    return results


@each_kind
def test_loss_and_gradient_equal_a_float64_reference(
    outcomes: dict[Any, list[Outcome]], reference: dict[str, Any], kind: str
) -> None:
    outcome = outcomes[kind, (1, 1, 1)][0]
    for (statistics, stepped), (loss, norm, extra) in zip(
        outcome.steps, reference[kind]["steps"], strict=True
    ):
        # a difference of terms of order one
        assert statistics.loss == pytest.approx(loss, rel=1e-5, abs=2e-6)
        assert stepped["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert norm > OPTIMIZER.clip_grad, "the gradient has to be clipped for this to be tested"
        assert statistics.sums["entropy"] == pytest.approx(extra["entropy"], rel=1e-5)
        assert statistics.sums["gen_kl_error"] == pytest.approx(extra["gen_kl_error"], rel=1e-4)
        assert statistics.max_gen_logprob_error == pytest.approx(extra["max_gen"], abs=1e-5)
        assert stepped["lr"] == OPTIMIZER.lr


@each_kind
@each_layout
def test_weights_after_two_updates_equal_adamw(
    outcomes: dict[Any, list[Outcome]], reference: dict[str, Any], kind: str, layout: tuple[int, int, int]
) -> None:
    """Every weight, so every gradient: AdamW with a large epsilon moves weights by what the gradient is."""
    before, after = reference[kind]["before"], reference[kind]["after"]
    covered: dict[str, int] = {}
    for rank in outcomes[kind, layout]:
        for place, (dim, start, stop, values) in rank.weights.items():
            name = place.removeprefix("copy of ")
            old, new = before[name], after[name]
            if dim is not None:
                old, new = old.narrow(dim, start, stop - start), new.narrow(dim, start, stop - start)
            step = (new - old).numpy()
            scale = np.abs(step).max()
            assert scale > 1e-4, f"{name} does not move: nothing would be tested"
            np.testing.assert_allclose(values - old.numpy(), step, atol=2e-4 * scale, err_msg=place)
            covered[place] = covered.get(place, 0) + values.size
    dp = layout[2]
    for name, tensor in before.items():
        copies = dp if _is_split(name) else dp * layout[0]
        assert covered.pop(name) == tensor.numel() * copies, name
    if kind == "tied" and layout[1] > 1:
        copy = covered.pop("copy of model.embed_tokens.weight")
        assert copy == before["model.embed_tokens.weight"].numel() * dp
    assert not covered


def _is_split(name: str) -> bool:
    return "norm" not in name


@each_kind
@each_layout
def test_snapshot_scores_with_the_weights_it_was_taken_at(
    outcomes: dict[Any, list[Outcome]], kind: str, layout: tuple[int, int, int]
) -> None:
    for rank in outcomes[kind, layout]:
        assert rank.snapshot_version == 0
        for now, then in zip(rank.snapshot_scores, rank.scores, strict=False):
            np.testing.assert_allclose(now.logprobs, then.logprobs, atol=2e-6)


@each_layout
def test_stale_rows_are_refused(outcomes: dict[Any, list[Outcome]], layout: tuple[int, int, int]) -> None:
    for rank in outcomes["tied", layout]:
        assert "weights 0, the actor is at 1" in rank.stale_error
        assert "max_weight_lag" in rank.stale_error


@each_kind
@each_layout
def test_a_bad_update_is_skipped_and_leaves_nothing_behind(
    outcomes: dict[Any, list[Outcome]], kind: str, layout: tuple[int, int, int]
) -> None:
    """A NaN in one rank's rows, a gradient above the bound: weights and moments stay as they were."""
    for rank in outcomes[kind, layout]:
        skips = rank.skips
        assert skips.nan["skipped"] == 1 and not np.isfinite(skips.nan["grad_norm"])
        assert skips.above["skipped"] == 1 and 1e-6 < skips.above["grad_norm"] < np.inf
        assert skips.unchanged
        assert skips.good["skipped"] == 0 and skips.good["grad_norm"] == skips.above["grad_norm"]
        assert skips.changed and skips.finite
