"""Images and videos decoded: exact pixels, chosen frames, and files that are refused."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from copd_megatron.config import MediaConfig
from copd_megatron.data import BadSampleError
from copd_megatron.data.decode import decode_image, decode_video, sample_indices
from copd_megatron.data.media import media_members
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.tiny.tasks.encode import mp4, png
from tests.support.hostile_media import clip, encoded, picture
from tests.support.models_vl import MEDIA

LIMIT = 10**7


def test_png_is_exact_and_jpeg_close() -> None:
    image = picture(40, 56)
    assert np.array_equal(decode_image(png(image), "x", max_pixels=LIMIT), image)
    smooth = np.broadcast_to(np.arange(0, 224, 4, dtype=np.uint8)[None, :, None], (40, 56, 3))
    decoded = decode_image(encoded(Image.fromarray(smooth), "JPEG", quality=95), "x", max_pixels=LIMIT)
    assert decoded.shape == (40, 56, 3) and np.abs(decoded.astype(int) - smooth).max() < 8


def test_transparency_turns_white_and_orientation_is_applied() -> None:
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert (decode_image(encoded(clear, "PNG"), "x", max_pixels=LIMIT) == 255).all()
    gray = Image.fromarray(np.full((4, 8), 77, dtype=np.uint8))
    assert (decode_image(encoded(gray, "PNG"), "x", max_pixels=LIMIT) == 77).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(Image.fromarray(picture(4, 8)), "JPEG", exif=exif)
    assert decode_image(turned, "x", max_pixels=LIMIT).shape == (8, 4, 3)


def reason_of(error: pytest.ExceptionInfo[BadSampleError]) -> str:
    assert "shard s, sample 'k'" in str(error.value)
    return error.value.reason


def test_big_images_are_refused_before_decoding() -> None:
    with pytest.raises(BadSampleError, match=r"64 x 64 = 4096 pixels exceed.*= 4095") as error:
        decode_image(png(picture()), "shard s, sample 'k'", max_pixels=4095)
    assert reason_of(error) == "too_many_pixels"


def test_videos_are_exact_and_sampled_evenly() -> None:
    frames = [picture(32, 48, i) for i in range(20)]
    data = mp4(frames, 10.0)
    video = decode_video(data, "x", MediaConfig(frame_rate=2.0, min_frames=2))
    assert video.frames_indices == (0, 6, 13, 19)  # 2 seconds, 2 frames each
    assert video.total_num_frames == 20 and video.fps == 10.0 and video.duration == 2.0
    assert np.array_equal(video.frames, np.stack([frames[i] for i in video.frames_indices]))
    assert video.metadata()["frames_indices"] == [0, 6, 13, 19]


def test_frame_counts_are_bounded() -> None:
    def count(total: int, fps: float, **settings: Any) -> int:
        indices = sample_indices(total, fps, MediaConfig(**settings))
        assert list(indices) == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < total
        return len(indices)

    assert count(300, 30.0, frame_rate=2.0) == 20
    assert count(300, 30.0, frame_rate=2.0, max_frames=8) == 8
    assert count(30, 30.0, frame_rate=2.0, min_frames=4) == 4
    assert count(3, 30.0, frame_rate=2.0, min_frames=4) == 3
    assert count(1, 30.0) == 1


def test_an_ordinary_lossy_video_decodes(hf_processor: Any) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(8))
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = decode_video(buffer.getvalue(), "x", MediaConfig(frame_rate=8.0))
    levels = video.frames.reshape(12, -1).mean(1)
    assert np.abs(levels - 20 * np.arange(12)).max() < 6
    assert MultimodalProcessor(hf_processor, MEDIA).process_video(video, "x").grid_thw.tolist() == [6, 8, 12]


def test_other_bad_videos_are_named() -> None:
    for data in (b"", b"not a video", bytes(4000)):
        with pytest.raises(BadSampleError) as error:
            decode_video(data, "shard s, sample 'k'", MEDIA)
        assert reason_of(error) == "corrupt_video"
    small = dataclasses.replace(MEDIA, max_pixels_hard_limit=8 * 64 * 64 - 1)
    with pytest.raises(BadSampleError, match="8 frames of 64 x 64") as error:
        decode_video(clip(), "shard s, sample 'k'", small)
    assert reason_of(error) == "too_many_pixels"


def test_members_are_in_natural_order() -> None:
    names = ["10.png", "mp4", "2.jpg", "json", "txt", "1.mp4", "0.png"]
    assert media_members(names) == ("0.png", "1.mp4", "2.jpg", "10.png", "mp4")
