"""Where a branch's prompts come from: each domain's shards, opened once, and the streams over them."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from copd_megatron.config import Config
from copd_megatron.data import PromptStream, ShardSet, check_shards, load_validation
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media_prompts import MediaPrompts
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.data.seeds import sample_seed
from copd_megatron.model.shape import ModelShape
from copd_megatron.records import Prompt


class PromptSources:
    """Opens a domain's shards when they are first asked for.

    Media are referred to by names that are the same on every branch: ``<domain>/train`` and
    ``<domain>/validation``.
    """

    def __init__(self, config: Config, model_path: str | Path, shape: ModelShape) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.media: MediaLoader | None = None
        if shape.vision is not None:
            processor = MultimodalProcessor.from_folder(model_path, config.media)
            self.media = MediaLoader(processor, config.media)
        self._open: dict[str, tuple[ShardSet, MediaPrompts | None]] = {}

    def stream(self, domain: str, purpose: str) -> PromptStream:
        """An endless stream over a domain's training prompts; each purpose has its own order."""
        branch = self.config.branches[domain]
        shards, media = self._shards(domain, "train")
        return PromptStream.from_config(
            branch.data,
            self.tokenizer,
            domain=domain,
            seed=stream_seed(self.config.run.seed, purpose),
            verifiers=branch.reward.verifiers,
            system_prompt=self.config.model.system_prompt,
            shards=shards,
            media=media,
        )

    def validation(self) -> dict[str, list[Prompt]]:
        """The validation prompts of every domain that has any."""
        return {
            domain: self._validation(domain)
            for domain, branch in self.config.branches.items()
            if branch.data.validation
        }

    def know_all_media(self) -> None:
        """Opens every domain's training shards, so that this branch can read any medium a student names."""
        if self.media is not None and not self.config.opd.ship_media:
            for domain, branch in self.config.branches.items():
                if branch.data.train:
                    self._shards(domain, "train")

    def _validation(self, domain: str) -> list[Prompt]:
        branch = self.config.branches[domain]
        shards, media = self._shards(domain, "validation")
        return load_validation(
            branch.data,
            self.tokenizer,
            domain=domain,
            max_prompts=self.config.evaluation.max_prompts,
            verifiers=branch.reward.verifiers,
            system_prompt=self.config.model.system_prompt,
            shards=shards,
            media=media,
        )

    def _shards(self, domain: str, part: str) -> tuple[ShardSet, MediaPrompts | None]:
        name = f"{domain}/{part}"
        if name not in self._open:
            branch = self.config.branches[domain]
            patterns = branch.data.train if part == "train" else branch.data.validation
            shards = check_shards(patterns, branch.reward.verifiers)
            media = None if self.media is None else MediaPrompts(self.media, name, shards)
            self._open[name] = (shards, media)
        return self._open[name]


def stream_seed(run_seed: int, purpose: str) -> int:
    """The seed of one stream's order; ``purpose`` is ``native`` or an edge's name."""
    return sample_seed(run_seed, purpose, 0, "stream", 0) % 2**31
