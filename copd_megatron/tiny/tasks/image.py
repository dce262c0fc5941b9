"""Image tasks: count, count_arithmetic, compare, locate, read_digits, read_chart.

The first four draw shapes on a grid of equal cells. The defaults (few colours, small counts) suit a model of
one or two million parameters that sees 64 x 64 pixels. Every setting controls the difficulty.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from copd_megatron.tiny.tasks.canvas import (
    DIGIT_COLUMNS,
    DIGIT_ROWS,
    add_noise,
    blank,
    draw_bar,
    draw_digit,
    draw_shape,
)
from copd_megatron.tiny.tasks.encode import png
from copd_megatron.tiny.tasks.families import VisualTask, check_names, require, visual_family

Cell = tuple[int, int, str, str]
"""Row, column, colour, shape."""


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """A square image of ``grid`` x ``grid`` cells, some of which hold coloured shapes."""

    image_size: int = 64
    """Pixels per side."""
    grid: int = 4
    colors: tuple[str, ...] = ("red", "blue", "green")
    shapes: tuple[str, ...] = ("square",)
    min_count: int = 1
    """Shapes of the kind that the question asks about."""
    max_count: int = 6
    min_others: int = 0
    """Shapes of other kinds."""
    max_others: int = 4
    jitter: int = 0
    """Largest offset of a shape from the middle of its cell, in pixels."""
    noise: int = 0
    """Amplitude of the pixel noise, 0 .. 255."""

    def __post_init__(self) -> None:
        check_names(self.colors, self.shapes)
        require(self.grid >= 1, f"grid {self.grid} is below 1")
        cell = self.image_size // self.grid
        require(cell >= 6, f"image_size {self.image_size} / grid {self.grid} leaves cells below 6 pixels")
        require(0 <= self.jitter <= (cell - 4) // 2, f"jitter {self.jitter} moves shapes out of their cells")
        require(0 <= self.min_count <= self.max_count, "counts must satisfy 0 <= min_count <= max_count")
        require(0 <= self.min_others <= self.max_others, "counts must satisfy 0 <= min_others <= max_others")
        require(
            self.max_count + self.min_others <= self.grid**2,
            f"{self.max_count} shapes and {self.min_others} others do not fit {self.grid**2} cells",
        )
        require(0 <= self.noise <= 255, f"noise {self.noise} is not in 0 .. 255")

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return [(color, shape) for color in self.colors for shape in self.shapes]


def _scatter(
    settings: GridSettings, counts: Mapping[tuple[str, str], int], rng: random.Random
) -> tuple[Cell, ...]:
    """Random cells for the given number of shapes of each kind, in reading order."""
    places = [(row, column) for row in range(settings.grid) for column in range(settings.grid)]
    rng.shuffle(places)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return tuple(sorted((row, column, *kind) for (row, column), kind in zip(places, kinds, strict=False)))


def _others(
    settings: GridSettings, kinds: list[tuple[str, str]], taken: int, rng: random.Random
) -> dict[tuple[str, str], int]:
    """How many shapes of each of ``kinds`` to add to ``taken`` shapes."""
    counts = dict.fromkeys(kinds, 0)
    most = min(settings.max_others, settings.grid**2 - taken)
    for _ in range(rng.randint(min(settings.min_others, most), most) if kinds else 0):
        counts[rng.choice(kinds)] += 1
    return counts


def _draw_grid(settings: GridSettings, cells: tuple[Cell, ...], seed: int) -> dict[str, bytes]:
    canvas = blank(settings.image_size, settings.image_size)
    cell = settings.image_size // settings.grid
    size = max(4, cell - 4 - 2 * settings.jitter)
    rng = random.Random(seed)
    for row, column, color, shape in cells:
        top = row * cell + (cell - size) // 2 + rng.randint(-settings.jitter, settings.jitter)
        left = column * cell + (cell - size) // 2 + rng.randint(-settings.jitter, settings.jitter)
        draw_shape(canvas, shape, color, top, left, size)
    add_noise(canvas, settings.noise, seed)
    return {"0.png": png(canvas)}


def _grid_task(
    settings: GridSettings,
    cells: tuple[Cell, ...],
    rng: random.Random,
    *,
    question: str,
    answer: str,
    verifier: str,
) -> VisualTask:
    seed = rng.getrandbits(32) if settings.jitter or settings.noise else 0
    return VisualTask(
        question=f"<image>{question}",
        answer=answer,
        verifier=verifier,
        scene=(settings.image_size, settings.grid, cells, settings.jitter, settings.noise, seed),
        draw=partial(_draw_grid, settings, cells, seed),
    )


def _counted(settings: GridSettings, rng: random.Random) -> tuple[tuple[str, str], int, tuple[Cell, ...]]:
    """A kind, the number of its shapes, and the cells of all shapes."""
    asked = rng.choice(settings.kinds)
    count = rng.randint(settings.min_count, settings.max_count)
    others = _others(settings, [kind for kind in settings.kinds if kind != asked], count, rng)
    return asked, count, _scatter(settings, {asked: count, **others}, rng)


@visual_family("count", "image", GridSettings)
def count(settings: GridSettings, rng: random.Random) -> VisualTask:
    """How many shapes of one kind."""
    (color, shape), number, cells = _counted(settings, rng)
    question = f"How many {color} {shape}s are there?"
    return _grid_task(settings, cells, rng, question=question, answer=str(number), verifier="numeric")


@dataclass(frozen=True, kw_only=True)
class ArithmeticSettings(GridSettings):
    """Counting, then one operation with a given number."""

    operations: tuple[str, ...] = ("plus",)
    """Of ``plus``, ``minus``, ``times``."""
    min_operand: int = 1
    max_operand: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("plus", "minus", "times")
        unknown = [name for name in self.operations if name not in known]
        require(not unknown and len(self.operations) > 0, f"operations {self.operations}: use {known}")
        require(self.min_operand <= self.max_operand, "min_operand exceeds max_operand")


@visual_family("count_arithmetic", "image", ArithmeticSettings)
def count_arithmetic(settings: ArithmeticSettings, rng: random.Random) -> VisualTask:
    """A number of shapes plus, minus or times a number."""
    (color, shape), number, cells = _counted(settings, rng)
    operation = rng.choice(settings.operations)
    operand = rng.randint(settings.min_operand, settings.max_operand)
    result = {"plus": number + operand, "minus": number - operand, "times": number * operand}[operation]
    question = f"Number of {color} {shape}s {operation} {operand}?"
    return _grid_task(settings, cells, rng, question=question, answer=str(result), verifier="numeric")


@visual_family("compare", "image", GridSettings)
def compare(settings: GridSettings, rng: random.Random) -> VisualTask:
    """Which of two kinds has more shapes; the answer is a kind or "equal"."""
    kinds = settings.kinds
    require(len(kinds) >= 2, "compare needs two kinds of shapes: more colors or shapes")
    room = settings.grid**2
    require(2 * settings.min_count <= room, "compare needs cells for twice min_count")
    first, second = rng.sample(kinds, 2)
    equal = rng.random() < 0.2
    while True:
        a = rng.randint(settings.min_count, min(settings.max_count, room - settings.min_count))
        b = a if equal else rng.randint(settings.min_count, min(settings.max_count, room - a))
        if a + b <= room and (equal or a != b or settings.min_count == settings.max_count):
            break
    others = _others(settings, [kind for kind in kinds if kind not in (first, second)], a + b, rng)
    cells = _scatter(settings, {first: a, second: b, **others}, rng)
    names = [color if len(settings.shapes) == 1 else f"{color} {shape}" for color, shape in (first, second)]
    noun = f" {settings.shapes[0]}s" if len(settings.shapes) == 1 else "s"
    question = f"More {names[0]} or {names[1]}{noun}, or equal?"
    answer = "equal" if a == b else names[0] if a > b else names[1]
    return _grid_task(settings, cells, rng, question=question, answer=answer, verifier="exact")


@visual_family("locate", "image", GridSettings)
def locate(settings: GridSettings, rng: random.Random) -> VisualTask:
    """Row and column of the only shape of its kind, counted from 1 at the upper left. Ignores min_count and
    max_count."""
    asked = rng.choice(settings.kinds)
    others = _others(settings, [kind for kind in settings.kinds if kind != asked], 1, rng)
    cells = _scatter(settings, {asked: 1, **others}, rng)
    row, column = next((cell[0], cell[1]) for cell in cells if cell[2:] == asked)
    question = f"Row and column of the {asked[0]} {asked[1]}?"
    return _grid_task(
        settings, cells, rng, question=question, answer=f"{row + 1}, {column + 1}", verifier="exact"
    )


@dataclass(frozen=True, kw_only=True)
class DigitSettings:
    """Digits in a row."""

    image_size: int = 64
    """Width in pixels; the height is half of it."""
    min_digits: int = 2
    max_digits: int = 3
    colors: tuple[str, ...] = ("black",)
    ask_sum: bool = False
    """Ask for the sum of the digits instead of the number."""
    shift: int = 2
    """Largest offset of the row from the middle, in pixels."""
    noise: int = 0

    def __post_init__(self) -> None:
        check_names(self.colors)
        require(1 <= self.min_digits <= self.max_digits, "digits must satisfy 1 <= min_digits <= max_digits")
        require(self.image_size % 2 == 0, f"image_size {self.image_size} must be even")
        require(self.scale >= 1, f"{self.max_digits} digits do not fit {self.image_size} pixels")
        require(0 <= self.noise <= 255, f"noise {self.noise} is not in 0 .. 255")

    @property
    def scale(self) -> int:
        """Pixels per dot, such that the longest number fits with its shift."""
        columns = self.max_digits * (DIGIT_COLUMNS + 1)
        room = self.image_size - 2 * self.shift
        return min(room // columns, (self.image_size // 2 - 2 * self.shift) // DIGIT_ROWS)


@visual_family("read_digits", "image", DigitSettings)
def read_digits(settings: DigitSettings, rng: random.Random) -> VisualTask:
    """Which number is written, or the sum of its digits."""
    length = rng.randint(settings.min_digits, settings.max_digits)
    digits = "".join(rng.choice("0123456789") for _ in range(length))
    colors = tuple(rng.choice(settings.colors) for _ in digits)
    offset = (rng.randint(-settings.shift, settings.shift), rng.randint(-settings.shift, settings.shift))
    seed = rng.getrandbits(32) if settings.noise else 0
    return VisualTask(
        question="<image>" + ("Sum of the digits?" if settings.ask_sum else "Which digits are written?"),
        answer=str(sum(map(int, digits))) if settings.ask_sum else digits,
        verifier="numeric" if settings.ask_sum else "exact",
        scene=(settings.image_size, settings.scale, digits, colors, offset, settings.noise, seed),
        draw=partial(_draw_digits, settings, digits, colors, offset, seed),
    )


def _draw_digits(
    settings: DigitSettings, digits: str, colors: tuple[str, ...], offset: tuple[int, int], seed: int
) -> dict[str, bytes]:
    height, width, scale = settings.image_size // 2, settings.image_size, settings.scale
    canvas = blank(height, width)
    top = (height - DIGIT_ROWS * scale) // 2 + offset[0]
    left = (width - (len(digits) * (DIGIT_COLUMNS + 1) - 1) * scale) // 2 + offset[1]
    for position, (digit, color) in enumerate(zip(digits, colors, strict=True)):
        draw_digit(canvas, digit, color, top, left + position * (DIGIT_COLUMNS + 1) * scale, scale)
    add_noise(canvas, settings.noise, seed)
    return {"0.png": png(canvas)}


@dataclass(frozen=True, kw_only=True)
class ChartSettings:
    """A bar chart without numbers. Marks on the left, one per unit, show the heights."""

    image_size: int = 64
    num_bars: int = 3
    max_value: int = 7
    colors: tuple[str, ...] = ("red", "blue", "green", "purple", "orange")
    questions: tuple[str, ...] = ("value", "highest")
    """Some of ``value`` (of one bar), ``highest`` (which bar), ``sum`` and ``difference`` (of two bars)."""
    noise: int = 0

    def __post_init__(self) -> None:
        check_names(self.colors)
        known = ("value", "highest", "sum", "difference")
        unknown = [name for name in self.questions if name not in known]
        require(not unknown and len(self.questions) > 0, f"questions {self.questions}: use {known}")
        require(
            2 <= self.num_bars <= len(self.colors), f"{self.num_bars} bars: use 2 to the number of colors"
        )
        require(
            self.max_value >= 2 and self.unit >= 2, f"max_value {self.max_value} leaves units below 2 pixels"
        )
        require(self.bar_width >= 3, f"{self.num_bars} bars leave each less than 3 pixels")
        require(0 <= self.noise <= 255, f"noise {self.noise} is not in 0 .. 255")

    @property
    def unit(self) -> int:
        """Pixels of height per unit."""
        return (self.image_size - 4) // self.max_value

    @property
    def bar_width(self) -> int:
        return (self.image_size - 8) // self.num_bars - 3


@visual_family("read_chart", "image", ChartSettings)
def read_chart(settings: ChartSettings, rng: random.Random) -> VisualTask:
    """A bar's height, the highest bar, or the sum or difference of two."""
    colors = tuple(rng.sample(settings.colors, settings.num_bars))
    values = [rng.randint(1, settings.max_value) for _ in colors]
    first, second = rng.sample(range(settings.num_bars), 2)
    asked = rng.choice(settings.questions)
    verifier = "numeric"
    if asked == "value":
        question, answer = f"How high is the {colors[first]} bar?", str(values[first])
    elif asked == "sum":
        question = f"Height of the {colors[first]} bar plus the {colors[second]} bar?"
        answer = str(values[first] + values[second])
    elif asked == "difference":
        question = f"How far apart in height are the {colors[first]} and {colors[second]} bars?"
        answer = str(abs(values[first] - values[second]))
    else:
        top = rng.randrange(settings.num_bars)
        heights = rng.sample(range(1, settings.max_value + 1), 2)
        values = [rng.randint(1, min(heights)) for _ in colors]
        values[top] = max(heights)
        question, answer, verifier = "Which bar is the highest?", colors[top], "exact"
    seed = rng.getrandbits(32) if settings.noise else 0
    return VisualTask(
        question=f"<image>{question}",
        answer=answer,
        verifier=verifier,
        scene=(settings.image_size, settings.max_value, colors, tuple(values), settings.noise, seed),
        draw=partial(_draw_chart, settings, colors, tuple(values), seed),
    )


def _draw_chart(
    settings: ChartSettings, colors: tuple[str, ...], values: tuple[int, ...], seed: int
) -> dict[str, bytes]:
    size, unit = settings.image_size, settings.unit
    canvas = blank(size, size)
    floor = size - 2
    draw_bar(canvas, "black", floor, 0, 1, size)
    draw_bar(canvas, "black", floor - settings.max_value * unit, 4, settings.max_value * unit, 1)
    for value in range(1, settings.max_value + 1):
        draw_bar(canvas, "black", floor - value * unit, 1, 1, 3)
    for position, (color, value) in enumerate(zip(colors, values, strict=True)):
        left = 8 + position * (settings.bar_width + 3)
        draw_bar(canvas, color, floor - value * unit, left, value * unit, settings.bar_width)
    add_noise(canvas, settings.noise, seed)
    return {"0.png": png(canvas)}
