"""Before a run starts: does any sample of a domain fit its limit? Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from copd_megatron.config import Config
from copd_megatron.config.domains import Domain
from copd_megatron.data.prompt_sizes import most_characters, num_characters
from copd_megatron.data.samples import Sample, texts_and_media
from copd_megatron.data.shards import ShardSet
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.untrusted.regular_file import read_regular

_TOKENIZER: Final = "tokenizer.json"
_MAX_TOKENIZER_BYTES: Final = 2**28
_MOST_READ: Final = 2000
"""Samples that are read at most: of larger sets, whose first samples are all too long, the run itself says
whether another one fits."""
_JOINED: Final = 2
"""Tokens that a text may lose when a chat template's own text joins it."""


class PromptLengths:
    """Counts tokens with the tokenizers of the branches' models, each read once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._read: dict[str, Any] = {}

    def check(self, domain: Domain, part: str, shards: ShardSet) -> None:
        """Whether the text of one sample at least is no longer than ``data.max_prompt_tokens``.

        Raises:
            DataError: none has.
        """
        branch = self._config.branches[domain.branch]
        tokenizer = self._tokenizer(branch.model_path or self._config.model.path)
        limit = branch.data.max_prompt_tokens
        if tokenizer is None or not len(shards):
            return
        most = most_characters(tokenizer, limit)
        shortest: int | None = None
        for ref in shards.refs[:_MOST_READ]:
            try:
                sample = shards.read(ref, branch.reward.verifiers)
            except BadSampleError:
                continue
            endless = num_characters(sample.prompt) > most
            length = limit + 1 if endless else _least_tokens(tokenizer, sample)
            if length <= limit:
                return
            shortest = length if shortest is None else min(shortest, length)
        if shortest is not None and len(shards) <= _MOST_READ:
            raise DataError(
                f"branches.{domain.branch}.data.max_prompt_tokens: {limit} is less than every {part} prompt "
                f"of {domain.name} has: the shortest text of {len(shards)} samples has {shortest} tokens or "
                "more, without what a chat template adds. Raise it, and model.max_sequence_tokens if need be."
            )

    def _tokenizer(self, folder: str) -> Any:
        """None: it has none in this form, or a damaged one, of which the ranks will complain."""
        if folder not in self._read:
            self._read[folder] = None
            path = Path(folder).expanduser() / _TOKENIZER
            try:
                # not in the environment of launchers/nemo_experiment.py
                from tokenizers import Tokenizer  # type: ignore[import-untyped]

                text = read_regular(path, _MAX_TOKENIZER_BYTES).decode("utf-8")
                self._read[folder] = Tokenizer.from_str(text)
            except Exception:  # the parser raises plain exceptions
                return None
        return self._read[folder]


def _least_tokens(tokenizer: Any, sample: Sample) -> int:
    """Tokens that the sample's prompt has at least: those of its longest text, without media."""
    texts = [text.strip() for kind, text in texts_and_media(sample.prompt) if kind == "text"]
    longest = max(texts, key=len, default="")
    return max(len(tokenizer.encode(longest, add_special_tokens=False).ids) - _JOINED, 0)
