"""The tiny base: its tokenizer, its demonstrations, and that it is made once, whole and reproducibly."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from copd_megatron.data import ShardSet, encode_prompt
from copd_megatron.rewards import registry
from copd_megatron.tiny.base import (
    MARKER,
    TinyBaseError,
    demonstration_batches,
    make_data,
    make_tiny_base,
    validation_prompts,
)
from copd_megatron.tiny.demonstrations import WORKINGS, columns, demonstrations, running_total
from copd_megatron.tiny.muon import Muon, orthogonalize
from copd_megatron.tiny.recipe import TEXT_BASE, Domain, TextBase, WarmUpSettings, base_digest, data_digest
from copd_megatron.tiny.shares import Share, ShareError, in_shares
from copd_megatron.tiny.tasks.text import Family
from copd_megatron.tiny.warm_up import IGNORED, imitation_loss, lr_factor, pad_batch, reproducible, warm_up
from tests.support.commands import ROOT, run_script, run_script_without

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


SMALL = dataclasses.replace(
    TEXT_BASE,
    warm_up=WarmUpSettings(num_steps=6, batch_size=8, length_window=4),
    num_train=30,
    num_validation=20,
    num_threads=1,
)
"""The recipe, cut to six small steps."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from copd_megatron.tiny.tokenizer import build_tokenizer

    return build_tokenizer(TEXT_BASE.model.vocab_size)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    assert make_tiny_base(folder, SMALL, seed=3)
    return folder


# --- tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Calculate 261 + 120.",
        "",
        "  two  spaces\n\n\ttab ",
        "naïve 数学 🙂\x00",
        "<think>1+1=2</think>2",
    ],
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_plain_text_costs_a_token_per_byte_and_a_thinking_mark_costs_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert len(tokenizer("naïve")["input_ids"]) == len("naïve".encode())
    assert len(tokenizer("<think>12</think>3")["input_ids"]) == 5


def test_every_id_of_the_model_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    vocab_size = TEXT_BASE.model.vocab_size
    assert len(tokenizer) == vocab_size and vocab_size % 64 == 0
    assert None not in tokenizer.convert_ids_to_tokens(list(range(vocab_size)))


def test_special_tokens_are_left_out_of_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer("12")["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12"


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 1"}, {"type": "text", "text": " ="}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "why?"},
    ]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|><|system|>Be brief.<|im_end|><|im_start|><|user|>1 + 1 =<|im_end|>"
        "<|im_start|><|assistant|>2<|im_end|><|im_start|><|user|>why?<|im_end|><|im_start|><|assistant|>"
    )
    assert len(encode_prompt(tokenizer, "1 + 1 =")) == len("1 + 1 =") + 5
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_vocabulary_without_room_is_refused() -> None:
    from copd_megatron.tiny.tokenizer import build_tokenizer

    with pytest.raises(ValueError, match="need 264"):
        build_tokenizer(256)


# --- demonstrations --------------------------------------------------------------------------------


def test_workings() -> None:
    assert columns("Calculate 86 + 369.") == "6+9=15 8+6+1=15 3+1=4"
    assert columns("Calculate 99 + 1.") == "9+1=10 9+1=10"
    assert columns("Calculate 100 + 20.") == "0+0=0 0+2=2 1=1"
    assert running_total("Calculate 4 + 10 + 7.") == "4+10=14 14+7=21"
    with pytest.raises(ValueError, match="3 numbers"):
        columns("Calculate 1 + 2 + 3.")


def test_every_demonstration_is_correct_and_so_is_each_of_its_steps() -> None:
    shown = demonstrations(TEXT_BASE, 600, seed=5)
    numeric = registry.get("numeric").verify
    for item in shown:
        gold = str(sum(int(number) for number in re.findall(r"\d+", item.prompt)))
        assert numeric(item.response, gold, {}) == 1.0
        for step in re.findall(r"[\d+]+=\d+", item.response):
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)


def test_early_demonstrations_work_more_than_later_ones() -> None:
    settings = dataclasses.replace(
        TEXT_BASE.warm_up, early_fraction=0.6, early_worked_share=0.9, worked_share=0.2
    )
    recipe = dataclasses.replace(TEXT_BASE, warm_up=settings)
    works = [item.response.startswith("<think>") for item in demonstrations(recipe, 2000, seed=5)]
    assert sum(works[:1200]) / 1200 == pytest.approx(0.9, abs=0.04)
    assert sum(works[1200:]) / 800 == pytest.approx(0.2, abs=0.05)


def test_demonstrations_follow_the_seed_and_avoid_what_is_held_out() -> None:
    shown = demonstrations(SMALL, 200, seed=5)
    assert demonstrations(SMALL, 200, seed=5) == shown
    assert demonstrations(SMALL, 200, seed=6) != shown
    held_out = {item.prompt for item in shown[::2]}
    others = demonstrations(SMALL, 200, seed=5, held_out=held_out)
    assert held_out.isdisjoint(item.prompt for item in others)


def test_the_warm_up_never_sees_a_validation_task(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # A domain of 121 tasks, of which 60 are for validation: without the exclusion, most would be met.
    narrow = Domain(
        name="narrow",
        working="columns",
        family=Family(
            name="basic_arithmetic",
            settings={**TEXT_BASE.domains[0].family.settings, "min_digits": 1, "max_digits": 1},
        ),
    )
    recipe = dataclasses.replace(SMALL, domains=(narrow,), num_validation=60, num_train=60)
    assert make_data(tmp_path / "data", recipe)
    shards = ShardSet.open([f"{tmp_path}/data/narrow-validation-*.tar"])
    written = {shards.read(ref).prompt for ref in shards.refs}
    assert written == validation_prompts(recipe) and len(written) == 60
    met = set()
    for batch in demonstration_batches(recipe, tokenizer, seed=1):
        for row in batch["input_ids"].tolist():
            end_of_prompt = row.index(tokenizer.eos_token_id)
            met.add(tokenizer.decode(row[2:end_of_prompt]))
    assert len(met) > 40
    assert written.isdisjoint(met)


def test_batches_learn_the_response_and_its_end_only(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = list(demonstration_batches(SMALL, tokenizer, seed=1))
    assert len(batches) == 8  # two whole windows for six steps
    # Each token of a window counts alike, in short batches and long ones.
    for window in (batches[:4], batches[4:]):
        learnt = sum(int((batch["labels"] != IGNORED).sum()) for batch in window)
        assert {batch["normalizer"] for batch in window} == {learnt / 4}
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learnt = labels != IGNORED
            assert torch.equal(ids[learnt], labels[learnt])
            text = tokenizer.decode(ids[learnt])
            assert re.fullmatch(r"(<think>[\d+= ]+</think>)?\d+<\|im_end\|>", text)
            assert tokenizer.decode(ids[~learnt]).startswith("<|im_start|><|user|>Calculate ")


# --- warm-up ---------------------------------------------------------------------------------------


class Copier(nn.Module):
    """Predicts the next token from the present one; enough to learn a fixed successor."""

    def __init__(self, vocab_size: int = 8, dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.hidden = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, vocab_size)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = self.output(torch.relu(self.hidden(self.embedding(input_ids))))
        return type("Output", (), {"logits": logits})


def successors(num_batches: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num_batches):
        starts = torch.randint(0, 8, (16,), generator=generator).tolist()
        rows = [([s], [(s * 3 + 1) % 8]) for s in starts]
        batches.append({**pad_batch(rows, padding_id=0), "normalizer": len(rows)})
    return batches


def test_warm_up_learns_any_model_from_any_batches() -> None:
    settings = WarmUpSettings(num_steps=120, matrix_lr=3e-2, vector_lr=5e-2, lr_warmup_steps=5)
    with reproducible(1, 1):
        model = Copier()
        losses = warm_up(model, successors(120), settings)
    assert losses[0] > 1.5 and losses[-1] < 0.1
    assert not model.training


def part(batch: dict[str, Any], share: Share) -> dict[str, Any]:
    return {name: v if name == "normalizer" else v[share.rows] for name, v in batch.items()}


def learnt_in(count: int) -> tuple[Copier, list[float]]:
    """A model and its losses, from batches that ``count`` processes share."""
    settings = WarmUpSettings(num_steps=12, matrix_lr=3e-2, vector_lr=5e-2, lr_warmup_steps=5)
    with reproducible(1, 1):
        model = Copier()
        batches = successors(12)

        def work(share: Share) -> list[float]:
            return warm_up(model, (part(b, share) for b in batches), settings, share=share)

        return model, in_shares(count, sum(p.numel() for p in model.parameters()), work)


def test_processes_share_a_batch_and_learn_the_same() -> None:
    (alone, losses), (shared, shared_losses) = learnt_in(1), learnt_in(3)
    assert losses == pytest.approx(shared_losses, rel=1e-4)
    for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_process_that_ends_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    def work(share: Share) -> float:
        if share.number == 1:
            raise RuntimeError("no more of this")
        return share.add_up(0, torch.zeros(()), [nn.Parameter(torch.zeros(3))])

    with pytest.raises(ShareError, match="its message is above"):
        in_shares(2, 3, work)
    assert "no more of this" in capfd.readouterr().err


def test_warm_up_says_when_batches_run_out() -> None:
    with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
        warm_up(Copier(), successors(3), WarmUpSettings(num_steps=5))


def test_warm_up_stops_at_a_loss_that_is_not_finite() -> None:
    def broken(model: nn.Module, batch: object) -> torch.Tensor:
        return next(model.parameters()).sum() * float("nan")

    with pytest.raises(RuntimeError, match="at step 0"):
        warm_up(Copier(), successors(2), WarmUpSettings(num_steps=2), loss=broken)


def test_padding_and_prompts_do_not_enter_the_loss() -> None:
    model = Copier()
    short = {**pad_batch([([1], [2])], padding_id=0), "normalizer": 1}
    padded = {**pad_batch([([1], [2]), ([3, 4, 5], [])], padding_id=0), "normalizer": 1}
    torch.testing.assert_close(imitation_loss(model, short), imitation_loss(model, padded))


def test_reproducible_puts_everything_back() -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    with reproducible(7, threads + 1):
        assert torch.get_num_threads() == threads + 1
        first = torch.rand(3)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    with reproducible(7, threads):
        assert torch.equal(torch.rand(3), first)


def test_lr_rises_then_falls() -> None:
    settings = WarmUpSettings(lr_warmup_steps=10, final_lr_fraction=0.1)
    factors = [lr_factor(step, 100, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors.index(max(factors)) == 9
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_orthogonalize_against_the_singular_value_decomposition(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    singular = u.mT @ result @ vh.mT
    values = singular.diagonal(dim1=-2, dim2=-1)
    assert (singular - torch.diag_embed(values)).abs().max() < 1e-8
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_scales_its_update_as_adam_would_and_takes_matrices_only() -> None:
    weight = nn.Parameter(torch.zeros(64, 16))
    weight.grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    Muon([weight], lr=0.5).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.5 * 0.2, rel=0.2)
    assert (weight.detach() * weight.grad).sum() < 0
    with pytest.raises(ValueError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(4))], lr=0.1)


# --- the folder ------------------------------------------------------------------------------------


def test_it_loads_in_transformers_and_generates(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    for count in (
        model.config.num_hidden_layers,
        model.config.num_attention_heads,
        model.config.num_key_value_heads,
        model.config.intermediate_size,
        model.config.vocab_size,
    ):
        assert count % 2 == 0
    prompt = torch.tensor([encode_prompt(tokenizer, "Calculate 12 + 34.").tolist()])
    generated = model.generate(prompt, max_new_tokens=4, attention_mask=torch.ones_like(prompt))
    assert prompt.shape[1] < generated.shape[1] <= prompt.shape[1] + 4


def test_the_same_recipe_and_seed_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    torch.manual_seed(12345)  # must not matter
    make_tiny_base(again, SMALL, seed=3)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (again / file).read_bytes() == (base / file).read_bytes(), file
    make_tiny_base(other, SMALL, seed=4)
    assert (other / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_a_finished_folder_is_kept_and_a_stale_one_replaced(base: Path) -> None:
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert not make_tiny_base(base, SMALL, seed=3)
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    (base / MARKER).write_text(json.dumps({"digest": "of another recipe"}))
    assert make_tiny_base(base, SMALL, seed=3)
    assert json.loads((base / MARKER).read_text())["digest"] == base_digest(SMALL, 3)
    assert [path.name for path in base.parent.iterdir()] == [base.name]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TinyBaseError, match="was not made here"):
        make_tiny_base(tmp_path, SMALL)
    with pytest.raises(TinyBaseError, match="was not made here"):
        make_data(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_nothing_is_left_when_the_warm_up_fails(tmp_path: Path) -> None:
    def interrupt(step: int, num_steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tiny_base(tmp_path / "base", SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_follows_what_matters() -> None:
    def changed(**values: object) -> TextBase:
        return dataclasses.replace(SMALL, **values)  # type: ignore[arg-type]

    variants = [
        base_digest(SMALL, 1),
        base_digest(SMALL, 2),
        base_digest(changed(num_threads=2), 1),
        base_digest(changed(warm_up=dataclasses.replace(SMALL.warm_up, worked_share=0.31)), 1),
        base_digest(changed(domains=SMALL.domains[::-1]), 1),
    ]
    assert len(set(variants)) == len(variants)
    assert data_digest(SMALL) == data_digest(changed(num_threads=2))
    assert data_digest(SMALL) != data_digest(changed(data_seed=2))


def test_the_command_makes_both_folders_and_needs_no_torch_to_find_them(tmp_path: Path) -> None:
    arguments = ("make_tiny_base.py", "--out", tmp_path / "base", "--steps", 2)
    first = run_script(*arguments)
    assert first.returncode == 0, first.stderr
    assert "written" in first.stdout and "made in" in first.stdout
    for domain in TEXT_BASE.domains:
        for split, count in (("train", TEXT_BASE.num_train), ("validation", TEXT_BASE.num_validation)):
            assert len(ShardSet.open([f"{tmp_path}/base_data/{domain.name}-{split}-*.tar"])) == count
    second = run_script_without(("torch", "transformers", "reasoning_gym"), *arguments)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("there already") == 2
    wrong = run_script(arguments[0], "--out", ROOT / "tests", "--data", tmp_path / "base_data")
    assert wrong.returncode == 2


def test_the_recipe_names_workings_that_exist() -> None:
    assert {domain.working for domain in TEXT_BASE.domains} <= WORKINGS.keys()
