"""Prompts from webdataset shards, in an order that (seed, epoch) determines. Imports no torch.

``shards.py`` finds, indexes and reads shards; ``samples.py`` says what a sample is; ``stream.py`` turns
them into tokenised prompts; ``write.py``, ``make.py`` and ``convert.py`` write new ones.
"""

from copd_megatron.data.errors import BadSampleError, DataError
from copd_megatron.data.samples import Sample, SampleRef
from copd_megatron.data.shards import ShardSet, check_shards, expand_patterns
from copd_megatron.data.stream import PromptReader, PromptStream, encode_prompt, load_validation, split_evenly

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
