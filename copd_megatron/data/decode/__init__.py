"""Encoded images and videos to RGB arrays, within limits that are checked before anything is decoded.

Same bytes and settings, same arrays. PIL and PyAV release the interpreter lock while they decode, so threads
suffice to run several decoders at once; each decoder itself uses one thread.

``image.py`` and ``video.py`` decode; ``containers.py`` says what a video file is before FFmpeg sees it;
``upright.py`` applies stored rotations; ``budget.py`` bounds what all threads decode at once.
"""

from copd_megatron.data.decode.budget import PixelBudget, Reserve, unbounded
from copd_megatron.data.decode.image import decode_image
from copd_megatron.data.decode.limits import PixelArray
from copd_megatron.data.decode.video import VideoFrames, decode_video, sample_indices

__all__ = [
    "PixelArray",
    "PixelBudget",
    "Reserve",
    "VideoFrames",
    "decode_image",
    "decode_video",
    "sample_indices",
    "unbounded",
]
