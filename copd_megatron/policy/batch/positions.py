"""Where tokens and media stand in a multimodal sequence.

Shape legend: ``b`` rows, ``s`` tokens, ``M`` visual tokens of the micro-batch, ``P`` patches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from copd_megatron.records import IntArray


@dataclass(frozen=True, kw_only=True)
class VisionBatch:
    """The media of one micro-batch, on the actor's device."""

    pixel_values: Tensor
    """[P, channels x temporal patch x patch x patch], images first, then videos, each in row order."""
    grid_thw: Tensor
    """[media, 3] int64: patches along time, height and width."""
    scatter_index: Tensor
    """[m] int64: where the tower's outputs go in the flattened [s * b] hidden states of this rank."""
    taken: Tensor | None = None
    """[m] int64: which of the M outputs those are; None: all of them, in order (m = M)."""


def multimodal_positions(
    token_ids: IntArray,
    *,
    image_token_id: int,
    video_token_id: int,
    image_grid_thw: IntArray,
    video_grid_thw: IntArray,
    spatial_merge_size: int,
    prompt_length: int | None = None,
) -> IntArray:
    """(time, height, width) positions of one sequence, [3, L] int32 (Qwen3-VL's rule).

    Text advances all three together. The tokens of an image, or of one frame of a video (frames are parted
    by timestamp text), form a grid: time stands still, height and width count merged patches; what follows
    continues after the larger of the two. Grids are [n, 3] in patches, in order of appearance. From
    ``prompt_length`` on everything is text: a placeholder token that the model sampled stands for no media.

    Raises:
        ValueError: placeholders and grids do not match.
    """
    prompt = token_ids[:prompt_length]
    kind = np.zeros(len(token_ids), dtype=np.int32)
    kind[: len(prompt)][prompt == image_token_id] = 1
    kind[: len(prompt)][prompt == video_token_id] = 2
    frames = [(1, h, w) for t, h, w in np.asarray(video_grid_thw).reshape(-1, 3) for _ in range(t)]
    grids = {1: iter(np.asarray(image_grid_thw).reshape(-1, 3).tolist()), 2: iter(frames)}
    positions: list[IntArray] = []
    current = 0
    for modality, group in itertools.groupby(kind.tolist()):
        length = len(list(group))
        if modality == 0:
            positions.append(np.broadcast_to(np.arange(current, current + length), (3, length)))
            current += length
            continue
        taken = 0
        while taken < length:
            grid = next(grids[modality], None)
            if grid is None:
                raise ValueError(
                    "more placeholder tokens than media grids: the prompt was expanded for other media"
                )
            t, height, width = grid[0], grid[1] // spatial_merge_size, grid[2] // spatial_merge_size
            time, row, column = np.meshgrid(np.arange(t), np.arange(height), np.arange(width), indexing="ij")
            positions.append(np.stack([time, row, column]).reshape(3, -1) + current)
            current += max(height, width)
            taken += t * height * width
        if taken != length:
            raise ValueError(f"{length} placeholder tokens in a row, the media grids make {taken}")
    if any(next(rest, None) is not None for rest in grids.values()):
        raise ValueError("more media grids than placeholder tokens: the prompt was expanded for other media")
    return np.concatenate(positions, axis=1).astype(np.int32)
