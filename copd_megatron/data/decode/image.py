"""PNG, JPEG and WebP to RGB."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from copd_megatron.data.decode.budget import Reserve, unbounded
from copd_megatron.data.decode.limits import WRITE_AGAIN, PixelArray, check_pixels
from copd_megatron.data.decode.upright import AS_STORED, stored_view, upright_size
from copd_megatron.data.failures import sample_failure
from copd_megatron.errors import BadSampleError

_STORED = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
"""Formats that samples may have, by PIL's names, and their extensions."""
_CONVERTED = (*_STORED, "GIF", "BMP", "TIFF", "PPM")
"""Formats that become one of these when a data set is converted. PIL has others, which run programs."""
_ORIENTATION = 0x0112
"""EXIF tag."""
_STRIP_PIXELS = 1 << 20


def decode_image(
    data: bytes,
    where: str,
    *,
    max_pixels: int,
    reserve: Reserve = unbounded,
) -> PixelArray:
    """[H, W, 3] RGB of a PNG, JPEG or WebP, upright as its EXIF orientation says, transparency on white.

    Of 16 bits a channel the upper eight are kept. Memory at the peak: the result (3 bytes a pixel), the
    picture as PIL holds it (1 byte a pixel with palette or grey, else 4) and what the format's own decoder
    needs; conversions go strip by strip.

    Raises BadSampleError: ``corrupt_image`` or ``too_many_pixels``; ``where`` names the sample.
    """
    with _opened(data, where, tuple(_STORED), max_pixels, reserve) as image:
        image.load()
        return _upright_rgb(image)


def storable_image(data: bytes, where: str, *, max_pixels: int) -> tuple[str, bytes]:
    """Extension and bytes under which an image goes into a shard: as it is if samples may have its format,
    else as PNG. Raises BadSampleError as ``decode_image`` does."""
    with _opened(data, where, _CONVERTED, max_pixels) as image:
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise BadSampleError(
                where,
                "media_unsupported",
                f"the {image.format} holds several pictures, of which only the first would be kept",
                "Store the one that is meant, or make a video of them.",
            )
        if image.format in _STORED:
            image.verify()
            return _STORED[image.format], data
        image.load()
        buffer = io.BytesIO()
        Image.fromarray(_upright_rgb(image)).save(buffer, format="PNG")
        return "png", buffer.getvalue()


@contextmanager
def _opened(
    data: bytes, where: str, formats: tuple[str, ...], max_pixels: int, reserve: Reserve = unbounded
) -> Iterator[Image.Image]:
    """An image whose size is within the limit; whatever goes wrong inside is its own failure."""
    with sample_failure(where, "corrupt_image", "the image cannot be decoded", WRITE_AGAIN):
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                reserve(check_pixels(1, image.height, image.width, max_pixels, where))
                yield image
        except Image.DecompressionBombError as error:
            raise BadSampleError(
                where, "too_many_pixels", f"PIL refuses it: {error}", "Store the image smaller."
            ) from error


def _upright_rgb(image: Image.Image) -> PixelArray:
    orientation = image.getexif().get(_ORIENTATION, AS_STORED)
    if orientation not in range(1, 9):
        orientation = AS_STORED
    height, width = upright_size(orientation, image.height, image.width)
    out = np.empty((height, width, 3), dtype=np.uint8)
    stored = stored_view(out, orientation)
    if image.mode == "P" and image.has_transparency_data:
        _put_palette_on_white(image)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        whole = bottom - top == image.height
        strip = image if whole else image.crop((0, top, image.width, bottom))
        stored[top:bottom] = _rgb(strip)
    return out


def _put_palette_on_white(image: Image.Image) -> None:
    """Makes a palette opaque, so that its pixels need no conversion of their own to RGBA."""
    each_once = image.crop((0, 0, 256, 1))
    each_once.putdata(range(256))
    image.putpalette(_rgb(each_once).tobytes(), "RGB")
    image.info.pop("transparency", None)


def _rgb(image: Image.Image) -> PixelArray:
    """[H, W, 3]"""
    if image.mode.startswith("I;16"):
        return _rgb_of_deep_grey(image)
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, with_alpha)
    return np.asarray(image.convert("RGB"))


def _rgb_of_deep_grey(image: Image.Image) -> PixelArray:
    # PIL's own conversion clips at 255 instead of dividing.
    deep = np.asarray(image)
    grey = (deep >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[deep == transparent] = 255
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))
