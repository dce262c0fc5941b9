"""Encodes arrays as PNG and MP4. Both are lossless and, with the same versions of Pillow and PyAV, give the
same bytes for the same arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from copd_megatron.tiny.tasks.canvas import Canvas


def png(canvas: Canvas) -> bytes:
    """[H, W, 3] RGB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def mp4(frames: Sequence[Canvas], fps: float) -> bytes:
    """Frames [H, W, 3] as H.264 in MP4, lossless (RGB, quantiser 0). Height and width must be even."""
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    height, width = frames[0].shape[:2]
    with av.open(buffer, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # one thread, because the bytes depend on how frames are assigned to threads
        stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0", "preset": "fast"})
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
        for canvas in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(canvas), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
