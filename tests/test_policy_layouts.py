"""The actor under sequence, context, virtual pipeline and expert parallelism: numbers as on one rank.

Real Megatron on Gloo ranks, packed micro-batches; all layouts of both models run in one launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config.schema import ParallelConfig, RolloutConfig, WeightSyncConfig
from tests.support.distributed import run_distributed
from tests.support.layouts import Job, run_layouts
from tests.support.models import make_model, random_texts, reference_logprobs, reference_model
from tests.test_checkpoint_actor import _either
from tests.test_policy import OPTIMIZER, TEMPERATURE, VOCAB, Outcome, _exercise, _rows
from tests.test_weight_sync import _actor, _stream

SEQUENCE = {"sequence_parallel": True}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {
        "dense": make_model(root / "dense", seed=1, tie_word_embeddings=True, vocab_size=VOCAB),
        "mixture": make_model(root / "mixture", seed=2, num_experts=4, num_experts_per_tok=2),
    }


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, Path]) -> dict[tuple[str, str], list[Outcome]]:
    texts = random_texts(11, VOCAB, seed=1)
    states = [[0, text.response_length - 1] if i % 2 else [] for i, text in enumerate(texts)]
    jobs, keys = [], []
    for kind, layouts in (("dense", DENSE), ("mixture", MIXTURE)):
        rows = _rows(folders[kind], texts)
        for name, sizes in layouts.items():
            jobs.append(Job(**sizes, args=(folders[kind], texts, states, rows)))
            keys.append((kind, name))
    return dict(zip(keys, run_layouts(_exercise, jobs), strict=True))


each_layout = pytest.mark.parametrize(
    ("kind", "layout"), [("dense", name) for name in DENSE] + [("mixture", name) for name in MIXTURE]
)


@each_layout
def test_scores_equal_transformers(
    outcomes: dict[Any, list[Outcome]], folders: dict[str, Path], kind: str, layout: str
) -> None:
    alone = outcomes[kind, "one"][0]
    for rank in outcomes[kind, layout]:
        for text, score, other in zip(
            random_texts(11, VOCAB, seed=1), rank.scores, alone.scores, strict=True
        ):
            exact = reference_logprobs(folders[kind], text.token_ids, text.prompt_length, TEMPERATURE)
            np.testing.assert_allclose(score.logprobs, exact, atol=1e-4)
            np.testing.assert_allclose(score.entropy, other.entropy, atol=1e-4)
            np.testing.assert_allclose(score.state_logprobs, other.state_logprobs, atol=1e-4)


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


def test_layouts_reach_every_rank_of_a_sync(folders: dict[str, Path], tmp_path: Path) -> None:
    """Streams live weights to vLLM's shards and exports them; the ranks compare every element."""
    cases = [
        ("mixture", Job(dp=2, also=EXPERTS, args=(folders["mixture"], 1, tmp_path / "0"))),
        ("mixture", Job(pp=2, dp=2, also=EXPERTS, args=(folders["mixture"], 2, tmp_path / "1"))),
        ("dense", Job(pp=2, also=VIRTUAL, args=(folders["dense"], 1, tmp_path / "2"))),
        ("dense", Job(tp=2, cp=2, also=SEQUENCE, args=(folders["dense"], 2, tmp_path / "3"))),
    ]
    for ranks in run_layouts(_stream, [job for _, job in cases]):
        assert all(rank["filled"] == rank["expected_filled"] for rank in ranks)
    for number, (kind, _) in enumerate(cases):
        original = reference_model(folders[kind]).state_dict()
        exported = reference_model(tmp_path / str(number)).state_dict()
        assert list(exported) == list(original)
        for name, tensor in exported.items():
            assert torch.equal(tensor, original[name] * 2), name


@pytest.mark.slow
def test_checkpoints_of_chunks_and_experts(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Saved and loaded at the same layout, and chunks without a virtual pipeline."""
    jobs = []
    for kind, sizes in (("dense", {"pp": 2, "also": VIRTUAL}), ("mixture", {"dp": 2, "also": EXPERTS})):
        model, out = folders[kind], tmp_path / kind
        jobs.append(Job(**sizes, args=(True, model, out)))
        jobs.append(Job(**sizes, args=(False, model, out, True)))
    jobs.append(Job(pp=2, args=(False, folders["dense"], tmp_path / "dense", False)))
    saved_chunks, chunks, saved_experts, experts, plain = run_layouts(_either, jobs)
    for before, after in ((saved_chunks, chunks), (saved_experts, experts)):
        for mine, other in zip(after, before, strict=True):
            assert mine["then"] == other["then"]
    assert plain[0]["then"] == [pytest.approx(step, rel=1e-5) for step in saved_chunks[0]["then"]]


# ---- with vLLM -------------------------------------------------------------------------------------------


def _sample_and_score(folder: Path) -> float:
    """Largest difference between vLLM's and the actor's log-probabilities of sampled tokens, after a sync of
    weights that are not the folder's."""
    from copd_megatron.records import Prompt
    from copd_megatron.rollout.engine import RolloutEngine, SamplingSettings
    from copd_megatron.weight_sync.sync import WeightSync

    parallel = ParallelConfig(data_parallel_size=2, expert_model_parallel_size=2)
    torch.distributed.init_process_group("gloo")
    actor = _actor(parallel, folder)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.mul_(1.1)
    engine = RolloutEngine(
        model_path=folder,
        config=RolloutConfig(max_new_tokens=12, max_num_seqs=8),
        branch="b",
        run_id="test",
        dtype=torch.float32,
        max_tokens=64,
        seed=1,
    )
    WeightSync(actor, engine, WeightSyncConfig())()
    prompts = [
        Prompt(prompt_id=str(i), domain="b", token_ids=t.token_ids[:9], answer="", verifier="exact")
        for i, t in enumerate(random_texts(6, 256, seed=4))
    ]
    rollouts = engine.sample(prompts, SamplingSettings(num_generations=2, temperature=1.0), step=0)
    scores = actor.log_probs(rollouts)
    return max(
        float(np.abs(score.logprobs - rollout.rollout_logprobs).max())
        for score, rollout in zip(scores, rollouts, strict=True)
    )


@pytest.mark.slow
def test_vllm_agrees_on_a_mixture_of_experts(folders: dict[str, Path]) -> None:
    for difference in run_distributed(_sample_and_score, 2, args=(folders["mixture"],), timeout=400):
        assert difference < 1e-3
