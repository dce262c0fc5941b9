"""Encoded images and videos to RGB arrays, within limits that are checked before anything is decoded.

Same bytes and settings, same arrays. PIL and PyAV release the interpreter lock while they decode, so threads
suffice to run several decoders at once; each decoder itself uses one thread.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from copd_megatron.config.schema import MediaConfig
from copd_megatron.errors import BadSampleError

PixelArray = npt.NDArray[np.uint8]

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_WRITE_AGAIN = "Write the sample again, or drop it."


@dataclass(frozen=True, kw_only=True)
class VideoFrames:
    """Frames taken from a video, and where they stand in it."""

    frames: PixelArray
    """[T, H, W, 3] RGB"""
    fps: float
    """Frames per second of the whole video."""
    frames_indices: tuple[int, ...]
    """[T] positions of the taken frames; frame ``i`` is shown at ``i / fps`` seconds."""
    total_num_frames: int

    @property
    def duration(self) -> float:
        """Of the whole video, in seconds."""
        return self.total_num_frames / self.fps

    def metadata(self) -> dict[str, Any]:
        """What video processors want to know; a fresh dict, since transformers' changes the index list."""
        return {
            "fps": self.fps,
            "frames_indices": list(self.frames_indices),
            "total_num_frames": self.total_num_frames,
            "duration": self.duration,
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
            "video_backend": "pyav",
        }


def decode_image(data: bytes, where: str, *, max_pixels: int) -> PixelArray:
    """[H, W, 3] RGB of a PNG, JPEG or WebP; turned as its EXIF orientation says, transparency on white.

    Raises BadSampleError: ``corrupt_image`` or ``too_many_pixels``; ``where`` names the sample.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            _check_pixels(1, image.height, image.width, max_pixels, where)
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                with_alpha = upright.convert("RGBA")
                white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
                upright = Image.alpha_composite(white, with_alpha)
            return np.array(upright.convert("RGB"))
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError(where, "too_many_pixels", str(error), _WRITE_AGAIN) from error
    except _DAMAGED_IMAGE as error:
        raise BadSampleError(
            where, "corrupt_image", f"the image cannot be decoded ({error})", _WRITE_AGAIN
        ) from error


def sample_indices(total: int, fps: float, config: MediaConfig) -> tuple[int, ...]:
    """Evenly spaced frame positions, first and last frame included.

    As many as ``frame_rate`` gives over the video's length, at least ``min_frames``, at most ``max_frames``,
    and never more than there are: the rule of Qwen3-VL's own video processor.
    """
    wanted = int(total / fps * config.frame_rate)
    count = min(max(wanted, config.min_frames), config.max_frames, total)
    return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())


def decode_video(data: bytes, where: str, config: MediaConfig) -> VideoFrames:
    """Frames of a video, sampled as ``config`` says.

    Raises BadSampleError: ``corrupt_video`` (not a video, no frames, damaged frames), ``truncated_video``
    (it ends before its index or header says), ``too_many_pixels`` (in the frames to be taken).
    """
    import av  # not on top: runs without videos, on a machine without PyAV, come through here too

    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                raise BadSampleError(where, "corrupt_video", "the file has no video stream", _WRITE_AGAIN)
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            needed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
            if needed > len(data):
                problem = f"the file is cut off: {len(data)} bytes, its index reaches to {needed}"
                raise BadSampleError(where, "truncated_video", problem, _WRITE_AGAIN)
            total = stream.frames or _count_frames(data)
            rate = stream.average_rate or stream.guessed_rate
            fps = float(rate) if rate else 0.0
            if total < 1 or not (fps > 0 and math.isfinite(fps)):
                problem = f"the video has {total} frames at {fps:g} frames per second"
                raise BadSampleError(where, "corrupt_video", problem, _WRITE_AGAIN)
            indices = sample_indices(total, fps, config)
            _check_pixels(len(indices), stream.height, stream.width, config.max_pixels_hard_limit, where)
            taken = _take(container, stream, indices, total, where)
    except av.FFmpegError as error:
        raise BadSampleError(
            where, "corrupt_video", f"the video cannot be decoded ({error})", _WRITE_AGAIN
        ) from error
    return VideoFrames(frames=np.stack(taken), fps=fps, frames_indices=indices, total_num_frames=total)


def _take(container: Any, stream: Any, indices: tuple[int, ...], total: int, where: str) -> list[PixelArray]:
    """The frames at ``indices``. Decodes up to the last of them; converts only those that are asked for."""
    taken: list[PixelArray] = []
    decoded = 0
    last: Any = None
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise BadSampleError(where, "corrupt_video", f"frame {decoded} is damaged", _WRITE_AGAIN)
        if decoded == indices[len(taken)]:
            taken.append(frame.to_ndarray(format="rgb24"))
            if len(taken) == len(indices):
                return taken
        last = frame
        decoded += 1
    # Headers of long videos are often wrong by a few frames; a short one that lacks frames is cut off.
    if last is None or total - decoded > total // 100:
        raise BadSampleError(
            where,
            "truncated_video",
            f"the video should have {total} frames but ends after {decoded}",
            _WRITE_AGAIN,
        )
    return taken + [last.to_ndarray(format="rgb24")] * (len(indices) - len(taken))


def _count_frames(data: bytes) -> int:
    """Frames of a container whose header does not say: its packets, without decoding them."""
    import av

    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


def _check_pixels(frames: int, height: int, width: int, limit: int, where: str) -> None:
    pixels = frames * height * width
    if pixels > limit:
        what = f"{frames} frames of {width} x {height}" if frames > 1 else f"{width} x {height}"
        raise BadSampleError(
            where,
            "too_many_pixels",
            f"{what} = {pixels} pixels exceed media.max_pixels_hard_limit = {limit}",
            "Raise the limit, take fewer frames, or store the media smaller.",
        )
