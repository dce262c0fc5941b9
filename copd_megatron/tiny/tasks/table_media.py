"""Pictures and videos of the number that a chain of operations starts from.

An image shows the digit somewhere; a video shows another digit first and this one last, so that it takes both
halves to know which counts. All are 32 x 32 pixels: four decoder tokens each, or each half of a video.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from copd_megatron.tiny.tasks.canvas import COLORS, DIGIT_COLUMNS, DIGIT_ROWS, Canvas, blank, draw_digit
from copd_megatron.tiny.tasks.encode import mp4, png
from copd_megatron.tiny.tasks.tables import IMAGE, VIDEO, Chain

SIZE = 32
"""Height and width in pixels."""
SCALE = 4
"""Pixels of a dot of a digit."""
FRAME_RATE = 4.0
"""Frames of a video for each second."""
FRAMES_OF_A_DIGIT = 2
_DARK = tuple(name for name in COLORS if name not in ("yellow", "cyan"))


def medium_of(chain: Chain, num_symbols: int, rng: random.Random) -> Mapping[str, bytes]:
    """The sample's members by extension: none for a domain in text alone."""
    if chain.domain.medium == IMAGE:
        return {"png": png(_digit(chain.start, rng))}
    if chain.domain.medium == VIDEO:
        before = rng.choice([symbol for symbol in range(num_symbols) if symbol != chain.start])
        frames = [canvas for digit in (before, chain.start) for canvas in _still(_digit(digit, rng))]
        return {"mp4": mp4(frames, FRAME_RATE)}
    return {}


def _digit(digit: int, rng: random.Random) -> Canvas:
    canvas = blank(SIZE, SIZE)
    top = rng.randrange(SIZE - DIGIT_ROWS * SCALE)
    left = rng.randrange(SIZE - DIGIT_COLUMNS * SCALE)
    draw_digit(canvas, str(digit), rng.choice(_DARK), top, left, SCALE)
    return canvas


def _still(canvas: Canvas) -> list[Canvas]:
    return [canvas] * FRAMES_OF_A_DIGIT
