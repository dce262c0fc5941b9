"""What decoders of images and videos share: the array type and the limit on pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from copd_megatron.errors import BadSampleError

PixelArray = npt.NDArray[np.uint8]

WRITE_AGAIN = "Write the sample again, or drop it."


def check_pixels(frames: int, height: int, width: int, limit: int, where: str) -> int:
    """The number of pixels. Raises BadSampleError (``too_many_pixels``) if they exceed ``limit``."""
    pixels = frames * height * width
    if pixels > limit:
        what = f"{frames} frames of {width} x {height}" if frames > 1 else f"{width} x {height}"
        raise BadSampleError(
            where,
            "too_many_pixels",
            f"{what} = {pixels} pixels exceed media.max_pixels_hard_limit = {limit}",
            "Raise the limit, take fewer frames, or store the media smaller.",
        )
    return pixels
