"""Videos to sampled RGB frames: MP4 and QuickTime, Matroska and WebM, AVI."""

from __future__ import annotations

import io
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from copd_megatron.config.schema import MediaConfig
from copd_megatron.data.decode.budget import Reserve, unbounded
from copd_megatron.data.decode.containers import refuse_other_files, video_container
from copd_megatron.data.decode.limits import WRITE_AGAIN, PixelArray, check_pixels
from copd_megatron.data.decode.upright import (
    AS_STORED,
    orientation_of_matrix,
    stored_view,
    upright_size,
)
from copd_megatron.data.failures import name_and_text, sample_failure
from copd_megatron.errors import BadSampleError

_MAX_DECODED_RATIO = 1000
"""All frames of a video, taken or not, may have this many times the pixels of the limit on those taken:
36 hours of 640 x 360 at 30 frames per second under the default limit. A small file can hold endless
repetitions of one large frame, and all have to be decoded."""
_CLOCK = 1000.0
"""Ticks per second for videos of a variable frame rate."""


@dataclass(frozen=True, kw_only=True)
class VideoFrames:
    """Frames taken from a video, and where they stand in it.

    Positions count frames. In a video of a variable frame rate they count milliseconds instead, and ``fps``
    is 1000: either way, what stands at position ``i`` is shown at ``i / fps`` seconds.
    """

    frames: PixelArray
    """[T, H, W, 3] RGB, upright"""
    fps: float
    """Positions per second."""
    frames_indices: tuple[int, ...]
    """[T] positions of the taken frames."""
    total_num_frames: int
    """Positions in the whole video."""

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


def sample_indices(total: int, fps: float, config: MediaConfig) -> tuple[int, ...]:
    """Evenly spaced frame positions, first and last frame included; see ``num_frames_taken``."""
    count = num_frames_taken(total, total / fps, config)
    return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())


def num_frames_taken(total: int, seconds: float, config: MediaConfig) -> int:
    """As many as ``frame_rate`` gives over the video's length, at least ``min_frames``, at most
    ``max_frames``, and never more than there are: the rule of Qwen3-VL's own video processor."""
    return min(max(int(seconds * config.frame_rate), config.min_frames), config.max_frames, total)


def decode_video(
    data: bytes, where: str, config: MediaConfig, *, reserve: Reserve = unbounded
) -> VideoFrames:
    """Frames of a video, sampled as ``config`` says.

    Besides the result (3 bytes a pixel), memory holds the frames that the codec refers to.

    Raises BadSampleError: ``corrupt_video`` (none of the three containers, no frames, no decoder, damaged
    frames), ``unknown_format`` (turned by an odd angle), ``truncated_video`` (it ends before its index
    or header says), ``too_many_pixels``, ``bad_size`` (the frame size changes).
    """
    import av  # not on top: runs without videos, on a machine without PyAV, come through here too

    container = video_container(data)
    if container is None:
        problem = "the file is not a video in MP4, QuickTime, Matroska, WebM or AVI"
        raise BadSampleError(where, "corrupt_video", problem, "Store the video as MP4.")
    _refuse_shorter(data, container.claimed_bytes, where)
    with sample_failure(where, "corrupt_video", "the video cannot be decoded", WRITE_AGAIN):
        try:
            with open_alone(data, container.demuxer, config.max_pixels_hard_limit) as opened:
                return _decode(opened, data, where, config, reserve)
        except av.FFmpegError as error:  # its MemoryError too: FFmpeg says so of sizes that make no sense
            problem = f"the video cannot be decoded ({name_and_text(error)})"
            raise BadSampleError(where, "corrupt_video", problem, WRITE_AGAIN) from error


def open_alone(data: bytes, demuxer: str, max_pixels: int) -> Any:
    """A PyAV container of this one format that can open no other file or address, nor larger frames.

    Raises what PyAV and ``refuse_other_files`` raise.
    """
    import av

    return av.open(
        io.BytesIO(data),
        mode="r",
        format=demuxer,
        options={"max_pixels": str(_roomy(max_pixels)), "protocol_whitelist": "none"},
        io_open=refuse_other_files,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which frames of a video are taken."""

    total: int
    """Frames in the video."""
    takes: tuple[int, ...]
    """[T] frame numbers in the order of showing, never falling; a number may repeat."""
    fps: float
    positions: tuple[int, ...]
    """[T] see ``VideoFrames.frames_indices``."""
    num_positions: int


def _decode(container: Any, data: bytes, where: str, config: MediaConfig, reserve: Reserve) -> VideoFrames:
    if not container.streams.video:
        raise _corrupt(where, "the file has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise _corrupt(where, "FFmpeg has no decoder for its codec")
    _refuse_shorter(data, max((entry.pos + entry.size for entry in stream.index_entries), default=0), where)
    packets = list(container.demux(stream))
    plan = _plan(stream, packets, where, config)
    limit = config.max_pixels_hard_limit
    pixels = check_pixels(len(plan.takes), stream.height, stream.width, limit, where)
    _refuse_endless(plan.total, stream.height, stream.width, limit, where)
    reserve(pixels)
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(_roomy(limit // len(plan.takes)))}
    return VideoFrames(
        frames=_take(packets, plan, limit, where),
        fps=plan.fps,
        frames_indices=plan.positions,
        total_num_frames=plan.num_positions,
    )


def _plan(stream: Any, packets: Sequence[Any], where: str, config: MediaConfig) -> _Plan:
    """What to take, from the packets' times; nothing is decoded for it."""
    stored = [packet for packet in packets if packet.size]
    shown = [packet for packet in stored if not packet.is_discard]  # edited videos begin with hidden ones
    total = (stream.frames or len(stored)) - (len(stored) - len(shown))
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    if total < 1 or not (fps > 0 and math.isfinite(fps)):
        raise _corrupt(where, f"the video has {total} frames at {fps:g} frames per second")
    times, seconds = _times(shown, float(stream.time_base or 0))
    if times and len(times) < total and seconds * fps >= total - total // 100:
        total = len(times)  # AVI counts frames that repeat the one before and are not stored
    if len(times) != total or _is_constant(times, fps):
        indices = sample_indices(total, fps, config)
        return _Plan(total=total, takes=indices, fps=fps, positions=indices, num_positions=total)
    targets = np.linspace(0.0, times[-1], num_frames_taken(total, seconds, config))
    return _Plan(
        total=total,
        takes=tuple(bisect_right(times, target) - 1 for target in targets),
        fps=_CLOCK,
        positions=tuple((targets * _CLOCK).round().astype(int).tolist()),
        num_positions=round(seconds * _CLOCK),
    )


def _times(packets: Sequence[Any], time_base: float) -> tuple[list[float], float]:
    """When frames are shown, in the order of showing, and when the last one ends.

    In seconds after the first frame. Empty and 0 if the packets do not say.
    """
    if not packets or not time_base or any(packet.pts is None for packet in packets):
        return [], 0.0
    stamps = sorted(packet.pts for packet in packets)
    last = max(packets, key=lambda packet: packet.pts)
    ends = stamps[-1] - stamps[0] + (last.duration or 0)
    return [(stamp - stamps[0]) * time_base for stamp in stamps], ends * time_base


def _is_constant(times: Sequence[float], fps: float) -> bool:
    """Whether frame ``i`` is shown at ``i / fps`` seconds, to half a frame."""
    return all(abs(time * fps - i) <= 0.5 for i, time in enumerate(times))


def _take(packets: Sequence[Any], plan: _Plan, limit: int, where: str) -> PixelArray:
    """[T, H, W, 3] of the frames that are taken. Decodes up to the last of them, and converts only these."""
    pictures: _Pictures | None = None
    number, last = 0, None
    for frame in itertools.chain.from_iterable(packet.decode() for packet in packets):
        if frame.is_corrupt:
            raise _corrupt(where, f"frame {number} is damaged")
        if pictures is None:
            pictures = _Pictures(frame, len(plan.takes), limit, where)
        pictures.check_size(frame, number)
        while number == plan.takes[pictures.taken]:
            pictures.add(frame)
            if pictures.taken == len(plan.takes):
                return pictures.upright
        last = frame
        number += 1
    # Headers of long videos are often wrong by a few frames; a short one that lacks frames is cut off.
    if pictures is None or plan.total - number > plan.total // 100:
        raise _truncated(where, f"the video should have {plan.total} frames but ends after {number}")
    while pictures.taken < len(plan.takes):
        pictures.add(last)
    return pictures.upright


class _Pictures:
    """The taken frames, written to where they end up, so that no second copy of them exists."""

    def __init__(self, first: Any, count: int, limit: int, where: str) -> None:
        orientation = _orientation(first, where)
        # The header may say another size than the frames have.
        check_pixels(count, first.height, first.width, limit, where)
        height, width = upright_size(orientation, first.height, first.width)
        self.upright: PixelArray = np.empty((count, height, width, 3), dtype=np.uint8)
        self.taken = 0
        self._stored = stored_view(self.upright, orientation)
        self._size = (first.width, first.height)
        self._where = where

    def check_size(self, frame: Any, number: int) -> None:
        if (frame.width, frame.height) != self._size:
            raise BadSampleError(
                self._where,
                "bad_size",
                f"the video's frames change their size from {self._size[0]} x {self._size[1]} to "
                f"{frame.width} x {frame.height} at frame {number}",
                "Encode the video again with one size.",
            )

    def add(self, frame: Any) -> None:
        self._stored[self.taken] = frame.to_ndarray(format="rgb24")
        self.taken += 1


def _orientation(frame: Any, where: str) -> int:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    orientation = AS_STORED if matrix is None else orientation_of_matrix(bytes(matrix))
    if orientation is None:
        problem = f"the video is to be shown turned by {frame.rotation} degrees"
        raise BadSampleError(where, "unknown_format", problem, "Turn the frames themselves.")
    return orientation


def _refuse_endless(total: int, height: int, width: int, limit: int, where: str) -> None:
    if total * height * width > _MAX_DECODED_RATIO * limit:
        raise BadSampleError(
            where,
            "too_many_pixels",
            f"its {total} frames of {width} x {height}, all of which would be decoded, have more than "
            f"{_MAX_DECODED_RATIO} times media.max_pixels_hard_limit = {limit} pixels",
            "Cut the video, or store it smaller.",
        )


def _refuse_shorter(data: bytes, needed: int, where: str) -> None:
    if needed > len(data):
        raise _truncated(where, f"the file is cut off: {len(data)} bytes of at least {needed}")


def _roomy(pixels: int) -> int:
    """A limit for FFmpeg, which counts rows and columns up to the next multiple of a block's size."""
    return pixels * 5 // 4 + (1 << 16)


def _corrupt(where: str, problem: str) -> BadSampleError:
    return BadSampleError(where, "corrupt_video", problem, WRITE_AGAIN)


def _truncated(where: str, problem: str) -> BadSampleError:
    return BadSampleError(where, "truncated_video", problem, WRITE_AGAIN)
