"""A response's text, decoded once at its end, is what vLLM's own decoding token by token makes of it."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.models import make_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("text")
    make_model(folder / "m", num_hidden_layers=1)
    return AutoTokenizer.from_pretrained(folder / "m")


def _vllm_text(tokenizer: Any, ids: list[int], *, ended_by_token: bool) -> str:
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    request: Any = SimpleNamespace(
        request_id="r", sampling_params=SamplingParams(), prompt_token_ids=tokenizer.encode("1 + 1 =")
    )
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    for number, token in enumerate(ids):
        detokenizer.update([token], ended_by_token and number == len(ids) - 1)
    return detokenizer.get_next_output_text(finished=True, delta=False)


@pytest.mark.parametrize("seed", range(5))
def test_text_is_that_of_decoding_token_by_token(tokenizer: Any, seed: int) -> None:
    from copd_megatron.rollout.engine import decode

    draw = random.Random(seed)
    words = ["seven", " = ", "²", "数学", "🙂", "é", "\n", "<think>", "  ", "ﬁ", "</s>"]
    for _ in range(20):
        ids = tokenizer.encode("".join(draw.choices(words, k=8)), add_special_tokens=False)
        ids = ids[: draw.randint(1, len(ids))]  # may end within a character
        assert decode(tokenizer, ids) == _vllm_text(tokenizer, ids, ended_by_token=False)
        with_end = [*ids, tokenizer.eos_token_id]
        assert decode(tokenizer, ids) == _vllm_text(tokenizer, with_end, ended_by_token=True)
