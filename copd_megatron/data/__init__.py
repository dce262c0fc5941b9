"""Prompts from webdataset shards, in an order that (seed, epoch) determines. Imports no torch.

``shards.py`` finds, indexes and reads shards; ``samples.py`` says what a sample is; ``stream.py`` turns
them into tokenised prompts; ``write.py``, ``make.py`` and ``convert.py`` write new ones.

Images and videos: ``media.py`` refers to them, ``decode.py`` and ``processing.py`` turn them into what a
model sees, ``loader.py`` does that ahead of time and off the training thread, ``media_prompts.py`` joins it
to the stream. ``visual_tasks`` makes such data, ``layouts.py`` and ``convert_public.py`` read public sets.
(None of these is imported here: decoders and processors are heavy.)
"""

from copd_megatron.data.samples import Sample, SampleRef
from copd_megatron.data.shards import ShardSet, check_shards, expand_patterns
from copd_megatron.data.stream import PromptReader, PromptStream, encode_prompt, load_validation, split_evenly
from copd_megatron.errors import BadSampleError, DataError

__all__ = [
    "BadSampleError",
    "DataError",
    "PromptReader",
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
