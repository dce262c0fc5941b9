"""Random token sequences, as rollouts and training rows carry them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copd_megatron.records import IntArray


@dataclass(frozen=True, kw_only=True)
class Text:
    """A token sequence with the boundary that scoring needs."""

    token_ids: IntArray
    prompt_length: int

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


def random_texts(count: int, vocab_size: int, *, seed: int = 0, longest: int = 50) -> list[Text]:
    """Sequences of different lengths, some with a single response token; each ends with the last token id."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        length = int(rng.integers(4, longest))
        tokens = rng.integers(0, vocab_size, size=length).astype(np.int32)
        tokens[-1] = vocab_size - 1
        texts.append(Text(token_ids=tokens, prompt_length=length - 1 if i % 4 == 0 else max(1, length // 3)))
    return texts


def grouped_texts(groups: int, size: int, vocab_size: int, *, seed: int = 0, longest: int = 30) -> list[Text]:
    """``size`` responses of different lengths to each of ``groups`` prompts, the groups' members apart from
    one another; two prompts are alike but for their last token."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size, size=int(rng.integers(1, longest))) for _ in range(groups)]
    prompts[-1] = prompts[0].copy()
    prompts[-1][-1] = (prompts[0][-1] + 1) % vocab_size
    texts = []
    for _ in range(size):
        for prompt in prompts:
            response = rng.integers(0, vocab_size, size=int(rng.integers(1, longest)))
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            texts.append(Text(token_ids=tokens, prompt_length=len(prompt)))
    return texts
