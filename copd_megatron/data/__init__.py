"""Prompts from webdataset shards, in an order that (seed, epoch) determines. Imports no torch.

``shards.py`` finds, indexes and reads shards, ``remote.py`` fetches those that are not files; ``samples.py``
says what a sample is; ``stream.py`` turns samples into tokenised prompts; ``mix.py`` draws them from several
streams. ``failures.py`` makes whatever goes wrong with one sample that sample's failure.

Images and videos: ``media.py`` refers to them, ``decode`` and ``processing.py`` turn them into what a model
sees, ``loader.py`` does so ahead of time on other threads, ``media_prompts.py`` joins it to the stream.
(None of these is imported here: decoders and processors are heavy.)

``convert`` makes shards out of a user's JSON lines and of public data sets.
"""

from copd_megatron.data.mix import PromptMix
from copd_megatron.data.samples import Sample, SampleRef
from copd_megatron.data.shards import ShardSet, check_shards, expand_patterns
from copd_megatron.data.stream import (
    PromptReader,
    PromptSequence,
    PromptStream,
    encode_prompt,
    load_validation,
    split_evenly,
)
from copd_megatron.errors import BadSampleError, DataError

__all__ = [
    "BadSampleError",
    "DataError",
    "PromptMix",
    "PromptReader",
    "PromptSequence",
    "PromptStream",
    "Sample",
    "SampleRef",
    "ShardSet",
    "check_shards",
    "encode_prompt",
    "expand_patterns",
    "load_validation",
    "split_evenly",
]
