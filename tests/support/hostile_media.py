"""Inputs that a data set may hold by accident or malice: media, JSON, chat prompts, tar files. One place for
all, so that a new test can take every kind at once."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from copd_megatron.errors import BadSampleError
from copd_megatron.tiny.tasks.encode import mp4, png

# ---------------------------------------------------------------- images


def picture(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """[H, W, 3] noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def palette_png(side: int) -> bytes:
    """A square of two colours, one of them half transparent: a bit a pixel, next to nothing as a file."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 3, 0, 0, 0))
        + chunk(b"PLTE", b"\xff\0\0\0\xff\0")
        + chunk(b"tRNS", b"\x80\xff")
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def jpeg_with_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An 8 x 6 JPEG whose EXIF directory has these (tag, type, count, four bytes of value)."""
    directory = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHI", tag, kind, count) + value
    exif = b"Exif\0\0II*\0\x08\0\0\0" + directory + b"\0\0\0\0" + bytes(range(60))
    return encoded(Image.fromarray(picture(6, 8)), "JPEG", exif=exif)


TURNED_RIGHT = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
MALFORMED_EXIF = {
    "rational text": [TURNED_RIGHT, (270, 5, 2, b"\x08\0\0\0")],
    "no integer": [TURNED_RIGHT, (34853, 0, 2, b"\0\0\0\0"), (330, 5, 1, b"\x08\0\0\0")],
}
"""EXIF directories that PIL reads but cannot write again, each with an orientation that is right."""

NOT_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not an image",
    "head": png(picture())[:200],
    "cut": png(picture())[:-400],
    "zeros": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n%%EOF",
    "GIF": encoded(Image.new("P", (4, 4)), "GIF"),
    "TIFF": encoded(Image.new("RGB", (4, 4)), "TIFF"),
}

# ---------------------------------------------------------------- videos


def clip(frames: int = 8, size: int = 64, seed: int = 0, fps: float = 4.0) -> bytes:
    """Noise as MP4."""
    return mp4([picture(size, size, seed * 1000 + i) for i in range(frames)], fps)


def video_of_packets(
    packets: Sequence[bytes],
    *,
    form: str = "matroska",
    codec: str = "mjpeg",
    size: tuple[int, int] = (64, 64),
    times: Sequence[int] | None = None,
    clock: int = 1000,
    degrees: int | None = None,
) -> bytes:
    """A container with these encoded frames as they are, four a second.

    ``times``: of each frame, ``clock`` ticks a second. ``degrees``: how it says it is turned.
    """
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(4))
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24"
        if degrees is not None:
            stream.set_display_rotation(degrees)
        stream.codec_context.time_base = Fraction(1, clock)
        container.start_encoding()
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream = stream
            packet.time_base = Fraction(1, clock)
            packet.pts = packet.dts = times[number] if times is not None else clock // 4 * number
            packet.duration = clock // 4
            packet.is_keyframe = True
            container.mux(packet)
    return buffer.getvalue()


def jpeg(height: int, width: int, level: int = 128) -> bytes:
    """A frame of one grey."""
    return encoded(Image.new("RGB", (width, height), (level, level, level)), "JPEG", quality=95)


def changing_size(*sizes: tuple[int, int], form: str = "matroska", each: int = 4) -> bytes:
    """A video whose header tells the first (height, width), and whose frames go on to the others."""
    frames = [jpeg(height, width) for height, width in sizes for _ in range(each)]
    return video_of_packets(frames, form=form, size=(sizes[0][1], sizes[0][0]))


def noise_video(form: str, frames: int = 12) -> bytes:
    packets = [encoded(Image.fromarray(picture(64, 64, i)), "JPEG") for i in range(frames)]
    return video_of_packets(packets, form=form, clock=4)


def without_decoder() -> bytes:
    """An MP4 of a codec that nobody knows."""
    return clip().replace(b"avc1", b"zzzz")


NOT_VIDEOS: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a video",
    "zeros": bytes(4000),
    "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    b"a=rtpmap:96 H264/90000\n",
    "list of files": b"ffconcat version 1.0\nfile beside.mp4\n",
    "playlist": b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:5,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
    "manifest": b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'></MPD>",
    "image": png(picture()),
    "audio": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\0\0\0\0",
    "lone header": b"\x1aE\xdf\xa3\x80",
    "endless boxes": b"\0\0\0\x08free" * 1000,
}
"""Contents that some format of FFmpeg's takes for a video, or nothing does."""

# ---------------------------------------------------------------- JSON and prompts


def sample_json(**changes: Any) -> bytes:
    fields = {"prompt": "Say 1", "answer": "1", "verifier": "exact", "metadata": {}, **changes}
    return json.dumps(fields).encode()


def nested(depth: int) -> bytes:
    """A sample whose metadata nests lists."""
    return sample_json(metadata={"deep": 0}).replace(b'"deep": 0', b'"deep": ' + b"[" * depth + b"]" * depth)


BAD_JSON: dict[str, tuple[str, bytes]] = {
    "nested beyond Python's limit": ("too_nested", nested(200_000)),
    "nested below Python's limit": ("too_nested", nested(500)),
    "cut": ("not_json", b'{"prompt": "x'),
    "not UTF-8": ("not_json", b'{"prompt": "\xff"}'),
    "an endless integer": ("not_json", b'{"prompt": ' + b"9" * 6000 + b"}"),
    "not a number": ("not_json", sample_json(metadata={"x": float("nan")})),
    "infinity": ("not_json", sample_json(metadata={"x": [-float("inf")]})),
    "a number beyond every float": ("not_json", sample_json(metadata={"x": 1}).replace(b"1}", b"1e999}")),
    "a whole number beyond every float": (
        "not_json",
        sample_json(metadata={"x": 1}).replace(b"1}", b"1" + b"0" * 400 + b"}"),
    ),
    "a lone surrogate": ("bad_text", sample_json(prompt="x").replace(b'"x"', b'"a\\ud800b"')),
    "a lone surrogate in a key": (
        "bad_text",
        sample_json(metadata={"x": 1}).replace(b'"x": 1', b'"\\udfff": 1'),
    ),
    "a list": ("bad_type", b"[1]"),
}
"""(reason, member) by kind."""


def chat(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


BAD_PROMPTS: dict[str, tuple[str, Any]] = {
    "blank": ("empty_prompt", " \n"),
    "no messages": ("empty_prompt", []),
    "a blank message": ("empty_prompt", chat("")),
    "no parts": ("empty_prompt", chat([])),
    "a blank part": ("empty_prompt", chat([{"type": "text", "text": " "}])),
    "a system message alone": ("empty_prompt", [{"role": "system", "content": "Be kind."}]),
    "no content": ("bad_type", chat(None)),
    "a part without text": ("bad_type", chat([{"type": "image"}, {"type": "text"}])),
    "a part of null": ("bad_type", chat([{"type": "image"}, {"type": "text", "text": None}])),
    "a part that is a string": ("bad_type", chat([{"type": "image"}, "What?"])),
    "a part without type": ("bad_type", chat([{"text": "What?"}])),
    "a part of another type": ("bad_type", chat([{"type": "audio"}, {"type": "text", "text": "?"}])),
    "a part whose type is a list": ("bad_type", chat([{"type": ["text"], "text": "?"}])),
    "a message that is a string": ("bad_type", ["What?"]),
    "a role of null": ("bad_type", [{"role": None, "content": "What?"}]),
}
"""(reason, prompt) by kind, whatever members the sample has."""

PICTURES_WITHOUT_MEMBERS: dict[str, Any] = {
    "an image part": chat([{"type": "image"}, {"type": "text", "text": "What?"}]),
    "a video part": chat([{"type": "video"}, {"type": "text", "text": "What?"}]),
    "a marker": "<image>What?",
    "a marker in a part": chat([{"type": "text", "text": "<video>What?"}]),
    "the token": "<|image_pad|>What?",
    "the token of videos": chat("<|vision_start|><|video_pad|><|vision_end|>What?"),
}
"""Prompts that show a medium although the sample has none."""

# ---------------------------------------------------------------- tar files


def tar_of(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with a right checksum around any size field."""
    header = bytearray(512)
    header[: len(name)] = name
    header[124 : 124 + len(size)] = size
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_of(*records: bytes) -> bytes:
    data = b"".join(records)
    return tar_header(b"pax", b"%011o\0" % len(data), b"x") + data + bytes(-len(data) % 512)


BAD_TARS: dict[str, bytes] = {
    "a size that goes back": tar_header(b"a.json", b"-0000001000\0") + bytes(2048),
    "a size that stays": tar_header(b"a.json", b"-0000000777\0") + bytes(2048),
    "a size with a sign": tar_header(b"a.json", b"+0000000001\0") + bytes(2048),
    "a size with underscores": tar_header(b"a.json", b"1_0\0") + bytes(2048),
    "a negative binary size": tar_header(b"a.json", b"\xff" * 12) + bytes(2048),
    "a huge binary size": tar_header(b"a.json", b"\x80" + b"\xff" * 11) + bytes(2048),
    "a negative size in pax": pax_of(b"12 size=-5\n\0") + tar_header(b"a.json", b"1\0") + bytes(2048),
    "a size of many digits": pax_of(b"9999 size=" + b"9" * 9988 + b"\n") + bytes(2048),
    "a length of many digits": pax_of(b"0" * 9000 + b"9 path=x\n") + bytes(2048),
    "a length of zero": pax_of(b"0 path=x\n") + bytes(2048),
    "a length without a record": pax_of(b"11") + bytes(2048),
    "a length that ends in itself": pax_of(b"1 path=x\n") + bytes(2048),
    "a pax header of megabytes": pax_of(b"5 a=\n" * (1 << 19)) + bytes(2048),
    "a name of megabytes": tar_header(b"n", b"%011o\0" % (1 << 22), b"L") + bytes((1 << 22) + 1024),
    "a hard link": tar_of([("a.json", sample_json())])[:1024]
    + tar_header(b"a.0.png", b"0\0", b"1")
    + bytes(2048),
    "a symbolic link": tar_header(b"a.json", b"0\0", b"2") + bytes(2048),
    "a sparse file": tar_header(b"a.json", b"0\0", b"S") + bytes(2048),
    "a sparse file in pax": pax_of(b"22 GNU.sparse.major=1\n") + tar_header(b"a.json", b"0\0") + bytes(2048),
}


def write_tar(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(call: Callable[[], Any]) -> str:
    """The reason for which a call refuses the sample."""
    with pytest.raises(BadSampleError, match="shard s") as error:
        call()
    return error.value.reason
