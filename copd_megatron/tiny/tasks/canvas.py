"""Draws coloured shapes and digits on small RGB arrays, without anti-aliasing, so that pixels are exact."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Canvas = npt.NDArray[np.uint8]
"""[height, width, 3] RGB"""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "blue": (40, 70, 230),
    "green": (30, 160, 50),
    "yellow": (240, 210, 40),
    "purple": (150, 40, 170),
    "orange": (245, 140, 20),
    "black": (20, 20, 20),
    "cyan": (30, 200, 210),
}

SHAPES = ("square", "circle", "triangle", "diamond", "cross")

# Five rows of three pixels each, most significant bit left.
_DIGITS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}
DIGIT_ROWS, DIGIT_COLUMNS = 5, 3


def blank(height: int, width: int, level: int = 255) -> Canvas:
    """A canvas of one grey level (white)."""
    return np.full((height, width, 3), level, dtype=np.uint8)


def shape_mask(shape: str, size: int) -> npt.NDArray[np.bool_]:
    """[size, size] mask of the pixels that a shape covers; the shape fills the square."""
    # distance of pixel centres from the middle, in units of half the size: -1 .. 1
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    y, x = axis[:, None], axis[None, :]
    if shape == "circle":
        return x * x + y * y <= 1.0
    if shape == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1.0
    if shape == "cross":
        return (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)
    return np.ones((size, size), dtype=np.bool_)


def draw_shape(canvas: Canvas, shape: str, color: str, top: int, left: int, size: int) -> None:
    """Draws a shape whose box has its upper left corner at (top, left). Parts outside the canvas are cut
    off."""
    mask = shape_mask(shape, size)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + size, canvas.shape[0]), min(left + size, canvas.shape[1])
    if y0 < y1 and x0 < x1:
        visible = mask[y0 - top : y1 - top, x0 - left : x1 - left]
        canvas[y0:y1, x0:x1][visible] = COLORS[color]


def draw_bar(canvas: Canvas, color: str, top: int, left: int, height: int, width: int) -> None:
    """Draws a filled rectangle."""
    canvas[top : top + height, left : left + width] = COLORS[color]


def draw_digit(canvas: Canvas, digit: str, color: str, top: int, left: int, scale: int) -> None:
    """Draws a digit of 3 x 5 dots, each of ``scale`` x ``scale`` pixels."""
    bits = np.array(
        [[row >> (DIGIT_COLUMNS - 1 - i) & 1 for i in range(DIGIT_COLUMNS)] for row in _DIGITS[digit]]
    )
    dots = np.kron(bits, np.ones((scale, scale), dtype=np.int64)).astype(np.bool_)
    canvas[top : top + DIGIT_ROWS * scale, left : left + DIGIT_COLUMNS * scale][dots] = COLORS[color]


def add_noise(canvas: Canvas, amplitude: int, seed: int) -> None:
    """Adds uniform noise in -amplitude .. amplitude to every value."""
    if amplitude:
        # unlike that of ``integers``, numpy guarantees that the raw bit stream never changes
        raw = np.random.PCG64(seed).random_raw(canvas.size).reshape(canvas.shape)
        noise = (raw % np.uint64(2 * amplitude + 1)).astype(np.int64) - amplitude
        np.clip(canvas + noise, 0, 255, out=noise)
        canvas[...] = noise.astype(np.uint8)
