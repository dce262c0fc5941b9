"""Streams of prompts with media over samples that a test makes up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copd_megatron.config import MediaConfig
from copd_megatron.data import PromptReader, PromptStream, ShardSet
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media_prompts import MediaPrompts
from copd_megatron.data.processing import MultimodalProcessor
from tests.support.hostile_media import (
    sample_json,
    tar_of,
    write_tar,
)

CONFIG = MediaConfig(frame_rate=4.0, min_frames=2, num_workers=2, max_pixels_hard_limit=10**6)

Samples = Mapping[str, tuple[Any, Mapping[str, bytes]]]
"""By key: prompt, and members by extension."""


@contextmanager
def vision_streams(
    folder: Path, processor: MultimodalProcessor
) -> Iterator[Callable[[Samples], PromptStream]]:
    """Gives a function that makes a stream over samples, which a shard in ``folder`` holds."""
    sources = itertools.count()
    with MediaLoader(processor, CONFIG) as loader:

        def make(samples: Samples) -> PromptStream:
            members = []
            for key, (prompt, media) in samples.items():
                members.append((f"{key}.json", sample_json(prompt=prompt)))
                members += [(f"{key}.{extension}", data) for extension, data in media.items()]
            shards = ShardSet.open([str(write_tar(folder / "s.tar", tar_of(members)))])
            reader = PromptReader(
                shards,
                processor.tokenizer,
                domain="image",
                max_prompt_tokens=500,
                media=MediaPrompts(loader, f"image/{next(sources)}", shards),
            )
            return PromptStream(reader, seed=3)

        yield make
