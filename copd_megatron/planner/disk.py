"""How many bytes a run writes. Imports no torch.

A checkpoint takes 16 bytes per parameter (float32 weights, the optimizer's copy of them and two moments), or
14 with bfloat16 weights. While one is written, ``keep_last`` + ``keep_best`` older ones still exist. The
exports hold the weights of every branch and of the merged model.
"""

from __future__ import annotations

from collections.abc import Mapping

from copd_megatron.config import Config, ModelShape

GIB = 2**30
_CHECKPOINT_BYTES_PER_PARAMETER = 16
_WEIGHT_BYTES_PER_PARAMETER = 4


def run_bytes(config: Config, shapes: Mapping[str, ModelShape]) -> int:
    """The largest size of the run directory, in bytes; an upper bound with bfloat16 weights.

    Args:
        shapes: the model of every branch (``read_model_shapes``).
    """
    trained = [shapes[name].num_parameters for name, branch in config.branches.items() if not branch.frozen]
    options, end = config.checkpoint, config.end
    # without a save period, a run still saves when it is told to stop
    kept = options.keep_last + options.keep_best if options.save_period else 0
    checkpoints = (kept + 1) * sum(trained) * _CHECKPOINT_BYTES_PER_PARAMETER
    exported = sum(trained) if end.export or end.merge else 0
    if end.merge and len(trained) > 1:
        exported += max(trained)
    return checkpoints + exported * _WEIGHT_BYTES_PER_PARAMETER


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
