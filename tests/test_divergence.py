"""Objectives that compare distributions: values and gradients against float64, on one rank and two."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.config.schema import Divergence, LossConfig, Support, Surrogate
from copd_megatron.objectives.distribution import joint_support
from copd_megatron.objectives.divergence import Measure, Targets
from copd_megatron.objectives.policy_loss import TokenStreams, policy_loss
from copd_megatron.objectives.sampled_token import extrapolated, opd_advantages
from copd_megatron.policy.head import VocabShard, linear_divergence, linear_support_logprobs
from copd_megatron.records import TopK
from tests.support.distributed import run_distributed

VOCAB, HIDDEN, TOKENS, K = 37, 12, 23, 5
MEASURES = [
    Measure(kind=Divergence.reverse_kl),
    Measure(kind=Divergence.forward_kl),
    Measure(kind=Divergence.jsd, alpha=0.3),
    Measure(kind=Divergence.reverse_kl, rest=False),
    Measure(kind=Divergence.jsd, alpha=0.7, rest=False),
]


def _random_logprobs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1).to(dtype)


def _exact(kind: Divergence, alpha: float, student: Tensor, teacher: Tensor) -> Tensor:
    """[N] by the textbook, over whole distributions."""
    p, q = student.exp(), teacher.exp()
    if kind is Divergence.reverse_kl:
        return (p * (p / q).log()).sum(-1)
    if kind is Divergence.forward_kl:
        return (q * (q / p).log()).sum(-1)
    m = alpha * q + (1 - alpha) * p
    return alpha * (q * (q / m).log()).sum(-1) + (1 - alpha) * (p * (p / m).log()).sum(-1)


def _coarse(logprobs: Tensor, ids: Tensor, rest: bool) -> Tensor:
    """[k + 1] or [k] log-probabilities of one token's outcomes: the ids, and what is left."""
    known = logprobs[ids[ids >= 0]].exp()
    if not rest:
        return (known / known.sum()).log()
    return torch.cat([known, 1 - known.sum(dim=0, keepdim=True)]).log()


def _ids(empty: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(TOKENS)])
    if empty:
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    return ids


@pytest.mark.parametrize("measure", MEASURES)
def test_on_a_support_it_is_the_divergence_of_the_coarser_distributions(measure: Measure) -> None:
    student, teacher, ids = _random_logprobs(TOKENS, VOCAB), _random_logprobs(TOKENS, VOCAB, seed=1), _ids()
    at = ids.clamp(min=0)
    targets = Targets(ids=ids, logprobs=teacher.gather(1, at))
    got = measure.on_support(student.gather(1, at), targets)
    expected = torch.stack(
        [
            _exact(
                measure.kind,
                measure.alpha,
                _coarse(student[n], ids[n], measure.rest),
                _coarse(teacher[n], ids[n], measure.rest),
            )
            for n in range(TOKENS)
        ]
    )
    torch.testing.assert_close(got, expected)
    assert (got >= 0).all()


@pytest.mark.parametrize("kind", list(Divergence))
def test_a_support_of_all_ids_is_the_whole_vocabulary(kind: Divergence) -> None:
    student, teacher = _random_logprobs(TOKENS, VOCAB), _random_logprobs(TOKENS, VOCAB, seed=1)
    everything = torch.arange(VOCAB).repeat(TOKENS, 1)
    values, gradients = [], []
    for ids in (everything, None):
        mine = student.clone().requires_grad_()
        targets = Targets(ids=ids, logprobs=teacher)
        take = Measure(kind=kind).on_vocabulary if ids is None else Measure(kind=kind).on_support
        values.append(take(mine, targets))
        gradients.append(torch.autograd.grad(values[-1].sum(), mine)[0])
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_distributions_have_no_divergence_and_no_gradient(measure: Measure) -> None:
    student, ids = _random_logprobs(TOKENS, VOCAB), _ids()
    known = student.gather(1, ids.clamp(min=0)).requires_grad_()
    value = measure.on_support(known, Targets(ids=ids, logprobs=known.detach()))
    assert value.abs().max() < 1e-12
    logits = student.clone().requires_grad_()
    again = measure.on_support(
        logits.log_softmax(-1).gather(1, ids.clamp(min=0)), Targets(ids=ids, logprobs=known.detach())
    )
    assert torch.autograd.grad(again.sum(), logits)[0].abs().max() < 1e-12


def test_a_support_without_ids_says_nothing() -> None:
    ids = torch.full((2, 3), -1)
    student = torch.zeros(2, 3, requires_grad=True)
    for measure in MEASURES:
        value = measure.on_support(student, Targets(ids=ids, logprobs=torch.zeros(2, 3)))
        torch.testing.assert_close(value, torch.zeros(2), atol=1e-7, rtol=0.0)
        assert torch.autograd.grad(value.sum(), student)[0].abs().max() == 0


def test_the_added_forward_kl_counts_where_it_is_wanted() -> None:
    student, teacher = _random_logprobs(4, VOCAB), _random_logprobs(4, VOCAB, seed=1)
    wanted = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    targets = Targets(ids=None, logprobs=teacher, forward_weight=wanted)
    got = Measure(kind=Divergence.reverse_kl).on_vocabulary(student, targets)
    expected = _exact(Divergence.reverse_kl, 0, student, teacher) + wanted * _exact(
        Divergence.forward_kl, 0, student, teacher
    )
    torch.testing.assert_close(got, expected)


# --- the expected gradient, on an enumerated vocabulary ----------------------------------------------------


def _sampled_token_gradient(logits: Tensor, teacher: Tensor, loss: LossConfig) -> Tensor:
    """Expectation over all tokens of the gradient that each would give, with Eq. 8's advantage."""
    student = logits.log_softmax(-1).detach()
    total = torch.zeros_like(logits)
    for token, probability in enumerate(student.exp().tolist()):
        mine = logits.clone().requires_grad_()
        advantage = opd_advantages([float(teacher[token])], [float(student[token])], 1.0)
        streams = TokenStreams(
            old_logprobs=student[token : token + 1],
            advantages=torch.from_numpy(advantage).double(),
            weights=torch.ones(1, dtype=torch.float64),
            loss_mask=torch.ones(1),
            row_index=torch.zeros(1, dtype=torch.int64),
        )
        output = policy_loss(mine.log_softmax(-1)[token : token + 1], None, streams, loss)
        total += probability * torch.autograd.grad(output.loss, mine)[0]
    return total


@pytest.mark.parametrize("surrogate", list(Surrogate))
def test_the_sampled_token_has_the_reverse_kls_gradient_in_expectation(surrogate: Surrogate) -> None:
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = _random_logprobs(7, seed=2)
    got = _sampled_token_gradient(logits, teacher, LossConfig(surrogate=surrogate))
    mine = logits.clone().requires_grad_()
    exact = _exact(Divergence.reverse_kl, 0, mine.log_softmax(-1), teacher)
    expected = torch.autograd.grad(exact, mine)[0]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 0.05


def test_a_divergence_summed_to_an_advantage_teaches_nothing() -> None:
    """One number per state is a baseline, whose expected gradient is 0: the divergence must be a loss."""
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = _random_logprobs(7, seed=2)
    mine = logits.clone().requires_grad_()
    student = mine.log_softmax(-1)
    scalar = _exact(Divergence.reverse_kl, 0, student.detach(), teacher)
    expected = (student.detach().exp() * scalar * student).sum()
    assert torch.autograd.grad(expected, mine)[0].abs().max() < 1e-12


def test_extrapolation_goes_beyond_the_teacher_away_from_the_base() -> None:
    teacher, base = np.log([0.5, 0.2]), np.log([0.25, 0.4])
    np.testing.assert_allclose(extrapolated(teacher, base, 1.0), teacher)
    np.testing.assert_allclose(extrapolated(teacher, base, 0.0), base)
    np.testing.assert_allclose(extrapolated(teacher, base, 1.25), teacher + 0.25 * (teacher - base))
    with pytest.raises(ValueError, match="they must agree"):
        extrapolated(teacher, base[:1], 1.0)


# --- supports ----------------------------------------------------------------------------------------------


def test_supports_are_joined_token_by_token() -> None:
    own = TopK(ids=np.array([[3, 1], [4, 5]], np.int32), logprobs=np.zeros((2, 2), np.float32))
    theirs = TopK(
        ids=np.array([[1, 7], [6, 8]], np.int32), logprobs=np.array([[-1, -2], [-3, -4]], np.float32)
    )
    on_own = np.array([[-9, -1], [-7, -8]], np.float32)
    join = {kind: joint_support(own, theirs, on_own, kind) for kind in Support}
    assert join[Support.teacher][0].tolist() == theirs.ids.tolist()
    assert join[Support.student][0].tolist() == own.ids.tolist()
    assert join[Support.student][1].tolist() == on_own.tolist()
    assert join[Support.intersection][0].tolist() == [[-1, 1], [-1, -1]]
    assert join[Support.union][0].tolist() == [[3, 1, -1, 7], [4, 5, 6, 8]]
    assert join[Support.union][1].tolist() == [[-9, -1, -1, -2], [-7, -8, -3, -4]]


# --- the output layer: chunks, padding, tensor parallelism -------------------------------------------------

CASES = list(itertools.product(range(len(MEASURES)), (4, 1000), (True, False)))


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator),
        "weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "teacher": _random_logprobs(TOKENS, VOCAB, seed=1, dtype=torch.float32),
        "grad": torch.randn(TOKENS, generator=generator),
        "forward": torch.rand(TOKENS, generator=generator).round(),
    }


def _targets(inputs: dict[str, Tensor], whole: bool) -> Targets:
    teacher, forward = inputs["teacher"], inputs["forward"]
    if whole:
        return Targets(ids=None, logprobs=teacher, forward_weight=forward)
    ids = _ids()
    return Targets(ids=ids, logprobs=teacher.gather(1, ids.clamp(min=0)), forward_weight=forward)


def _run(shard: VocabShard, width: int, case: tuple[int, int, bool]) -> dict[str, Tensor]:
    """Ours, on a slice of a weight that is padded with rubbish beyond the vocabulary."""
    inputs, (number, chunk, whole) = _inputs(), case
    padded = torch.full((max(VOCAB, shard.start + width), HIDDEN), 1e3)
    padded[:VOCAB] = inputs["weight"]
    hidden = inputs["hidden"].clone().requires_grad_()
    weight = padded[shard.start : shard.start + width].clone().requires_grad_()
    values = linear_divergence(
        hidden, weight, _targets(inputs, whole), MEASURES[number], shard=shard, temperature=0.7,
        chunk_tokens=chunk,
    )  # fmt: skip
    (values * inputs["grad"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    support = linear_support_logprobs(
        hidden.detach(), weight.detach(), _ids(), shard=shard, temperature=0.7, chunk_tokens=chunk
    )
    return {
        "values": values.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad, "support": support,
    }  # fmt: skip


def _reference(case: tuple[int, int, bool]) -> dict[str, Tensor]:
    """Plain torch in float64 on the whole vocabulary."""
    inputs, (number, _, whole) = _inputs(), case
    hidden = inputs["hidden"].double().requires_grad_()
    weight = inputs["weight"].double().requires_grad_()
    full = (hidden @ weight.t() / 0.7).log_softmax(-1)
    targets = _targets(inputs, whole)
    doubled = Targets(
        ids=targets.ids, logprobs=targets.logprobs.double(), forward_weight=inputs["forward"].double()
    )
    measure = MEASURES[number]
    if doubled.ids is None:
        values = measure.on_vocabulary(full, doubled)
    else:
        values = measure.on_support(full.gather(1, doubled.ids.clamp(min=0)), doubled)
    (values * inputs["grad"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    ids = _ids()
    support = full.detach().gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return {
        "values": values.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad, "support": support,
    }  # fmt: skip


def _check(parts: list[dict[str, Tensor]], case: tuple[int, int, bool]) -> None:
    expected = _reference(case)
    close = {"atol": 2e-5, "rtol": 2e-5}
    for part in parts:
        for name in ("values", "grad_hidden", "support"):
            torch.testing.assert_close(part[name], expected[name].float(), **close)
    grad_weight = torch.cat([part["grad_weight"] for part in parts])
    torch.testing.assert_close(grad_weight[:VOCAB], expected["grad_weight"].float(), **close)
    assert not grad_weight[VOCAB:].any(), "padding has no gradient"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", [0, 3])
def test_one_rank_equals_torch(case: tuple[int, int, bool], padding: int) -> None:
    _check([_run(VocabShard(group=None, start=0, vocab_size=VOCAB), VOCAB + padding, case)], case)


def _both_ranks() -> dict[str, list[dict[str, Tensor]]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {}
    # the odd vocabulary leaves one padded row on the last rank; 37 of 80 leaves that rank nothing but padding
    for name, width in (("odd", -(-VOCAB // 2)), ("all padding", 40)):
        shard = VocabShard(group=dist.group.WORLD, start=rank * width, vocab_size=VOCAB)
        results[name] = [_run(shard, width, case) for case in CASES]
    dist.barrier()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_distributed(_both_ranks, 2)


@pytest.mark.parametrize("split", ["odd", "all padding"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_ranks_equal_torch(two_ranks: list[dict[str, Any]], split: str, case: int) -> None:
    _check([rank[split][case] for rank in two_ranks], CASES[case])
