"""Where a branch's prompts come from: each domain's shards, opened once, and the streams over them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from copd_megatron.config import Config
from copd_megatron.config.domains import Domain, all_domains, domains_by_name, domains_of, evaluated_as
from copd_megatron.data import (
    PromptMix,
    PromptReader,
    PromptSequence,
    PromptStream,
    ShardSet,
    check_shards,
    load_validation,
)
from copd_megatron.data.difficulty import load_difficulty
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media_prompts import MediaPrompts
from copd_megatron.data.media_share import MediaShare
from copd_megatron.data.model_files import load_tokenizer
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.data.seeds import sample_seed
from copd_megatron.model.shape import ModelShape
from copd_megatron.records import Prompt

Part = Literal["train", "validation"]


class PromptSources:
    """Opens a domain's shards when they are first asked for.

    Media are referred to by names that are the same on every branch: ``<domain>/train`` and
    ``<domain>/validation``.
    """

    def __init__(
        self,
        config: Config,
        model_path: str | Path,
        shape: ModelShape,
        *,
        share: MediaShare | None = None,
    ) -> None:
        """``share``: this rank's part in decoding, where the ranks of a branch draw the same prompts."""
        self.config = config
        self._share = share
        self.tokenizer = load_tokenizer(model_path)
        self.media: MediaLoader | None = None
        if shape.vision is not None:
            processor = MultimodalProcessor.from_folder(model_path, config.media)
            self.media = MediaLoader(processor, config.media)
        self._open: dict[str, tuple[ShardSet, MediaPrompts | None]] = {}

    def stream(self, branch: str, purpose: str) -> PromptSequence:
        """An endless sequence of a branch's training prompts; each purpose has its own order."""
        streams, weights = {}, {}
        for domain in domains_of(self.config, branch):
            order = f"{purpose}/{domain.name}" if domain.is_pool else purpose
            streams[domain.name], weights[domain.name] = self._stream(domain, order), domain.weight
        return PromptMix(streams, weights) if self.config.branches[branch].data.pools else streams[branch]

    def validation(self) -> dict[str, list[Prompt]]:
        """The validation prompts of every domain that has any; data that domains share, once."""
        known = domains_by_name(self.config)
        return {
            name: load_validation(
                self.reader(known[name], "validation"), max_prompts=self.config.evaluation.max_prompts
            )
            for name in dict.fromkeys(evaluated_as(self.config).values())
        }

    def reader(self, domain: Domain, part: Part) -> PromptReader:
        """What reads a domain's samples."""
        branch = self.config.branches[domain.branch]
        shards, media = self._shards(domain, part)
        return PromptReader(
            shards,
            self.tokenizer,
            domain=domain.name,
            max_prompt_tokens=branch.data.max_prompt_tokens,
            system_prompt=self.config.model.system_prompt,
            verifiers=branch.reward.verifiers,
            media=media,
            prefix=f"{domain.name}/" if domain.is_pool else "",
        )

    def know_all_media(self) -> None:
        """Opens every domain's training shards, so that this branch can read any medium a student names."""
        if self.media is not None and not self.config.opd.ship_media:
            for domain in all_domains(self.config):
                if domain.train:
                    self._shards(domain, "train")

    def _stream(self, domain: Domain, purpose: str) -> PromptStream:
        data, reader = self.config.branches[domain.branch].data, self.reader(domain, "train")
        return PromptStream(
            reader,
            seed=stream_seed(self.config.run.seed, purpose),
            shuffle=data.shuffle,
            difficulty=load_difficulty(domain, data.difficulty, reader.shards),
        )

    def _shards(self, domain: Domain, part: Part) -> tuple[ShardSet, MediaPrompts | None]:
        name = f"{domain.name}/{part}"
        if name not in self._open:
            patterns = domain.train if part == "train" else domain.validation
            shards = check_shards(patterns, self.config.branches[domain.branch].reward.verifiers)
            media = None if self.media is None else MediaPrompts(self.media, name, shards, self._share)
            self._open[name] = (shards, media)
        return self._open[name]


def stream_seed(run_seed: int, purpose: str) -> int:
    """The seed of one stream's order; ``purpose`` is ``native`` or an edge's name."""
    return sample_seed(run_seed, purpose, 0, "stream", 0) % 2**31
