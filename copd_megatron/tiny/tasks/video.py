"""Video tasks: direction, event_order, event_count, temporal_grounding, digit_sequence.

The defaults suit a model of one or two million parameters: 8 frames of 64 x 64 pixels at 4 frames per second.
Set ``media.frame_rate`` to at least the ``fps`` of the videos, or frames will be dropped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from copd_megatron.tiny.tasks.canvas import (
    DIGIT_COLUMNS,
    DIGIT_ROWS,
    SHAPES,
    Canvas,
    add_noise,
    blank,
    draw_digit,
    draw_shape,
)
from copd_megatron.tiny.tasks.encode import mp4
from copd_megatron.tiny.tasks.families import VisualTask, check_names, require, visual_family

Sprite = tuple[str, str, int, int]
"""Shape, colour, top, left."""

_MOVES = {
    "right": (0, 1),
    "left": (0, -1),
    "down": (1, 0),
    "up": (-1, 0),
    "down right": (1, 1),
    "down left": (1, -1),
    "up right": (-1, 1),
    "up left": (-1, -1),
}


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """A square video with shapes on white."""

    frame_size: int = 64
    """Pixels per side; even."""
    num_frames: int = 8
    fps: float = 4.0
    colors: tuple[str, ...] = ("red", "blue", "green")
    shapes: tuple[str, ...] = ("square",)
    sprite_size: int = 16
    num_distractors: int = 0
    """Black shapes that do not move."""
    noise: int = 0
    """Amplitude of the pixel noise, 0 .. 255, different in each frame."""

    def __post_init__(self) -> None:
        check_names(self.colors, self.shapes)
        require(self.frame_size % 2 == 0, f"frame_size {self.frame_size} must be even")
        require(4 <= self.sprite_size <= self.frame_size // 2, f"sprite_size {self.sprite_size} does not fit")
        require(self.num_frames >= 2, f"num_frames {self.num_frames} is below 2")
        require(self.fps > 0, f"fps {self.fps} is not positive")
        require(0 <= self.noise <= 255, f"noise {self.noise} is not in 0 .. 255")
        require(self.num_distractors >= 0, "num_distractors is negative")


def _video_task(
    settings: VideoSettings,
    frames: Sequence[tuple[Sprite, ...]],
    rng: random.Random,
    *,
    question: str,
    answer: str,
    verifier: str,
    metadata: dict[str, float] | None = None,
) -> VisualTask:
    """``frames`` says what each frame shows."""
    limit = settings.frame_size - settings.sprite_size
    still = tuple(
        (rng.choice(SHAPES), "black", rng.randint(0, limit), rng.randint(0, limit))
        for _ in range(settings.num_distractors)
    )
    seed = rng.getrandbits(32) if settings.noise else 0
    scene = (settings.frame_size, settings.fps, settings.sprite_size, still, tuple(frames), seed)
    return VisualTask(
        question=f"<video>{question}",
        answer=answer,
        verifier=verifier,
        metadata=metadata or {},
        scene=scene,
        draw=partial(_draw, settings, still, tuple(frames), seed),
    )


def _draw(
    settings: VideoSettings, still: tuple[Sprite, ...], frames: tuple[tuple[Sprite, ...], ...], seed: int
) -> dict[str, bytes]:
    canvases: list[Canvas] = []
    for number, sprites in enumerate(frames):
        canvas = blank(settings.frame_size, settings.frame_size)
        for shape, color, top, left in (*still, *sprites):
            draw_shape(canvas, shape, color, top, left, settings.sprite_size)
        add_noise(canvas, settings.noise, seed + number)
        canvases.append(canvas)
    return {"mp4": mp4(canvases, settings.fps)}


def _somewhere(settings: VideoSettings, rng: random.Random) -> tuple[int, int]:
    limit = settings.frame_size - settings.sprite_size
    return rng.randint(0, limit), rng.randint(0, limit)


def _spans(settings: VideoSettings, count: int, shortest: int, rng: random.Random) -> list[tuple[int, int]]:
    """``count`` spans [first, last + 1) of frames, in order, at least one frame apart and at least
    ``shortest`` frames long. The caller has checked that they fit."""
    slack = settings.num_frames - count * shortest - (count - 1)
    # distribute the spare frames at random: before, within each span, between spans, after
    parts = [0] * (2 * count + 1)
    for _ in range(slack):
        parts[rng.randrange(len(parts))] += 1
    spans, position = [], parts[0]
    for number in range(count):
        end = position + shortest + parts[2 * number + 1]
        spans.append((position, end))
        position = end + 1 + parts[2 * number + 2]
    return spans


@dataclass(frozen=True, kw_only=True)
class DirectionSettings(VideoSettings):
    """One shape that moves in a straight line, and may turn back."""

    ask_turn: bool = True
    """Half of the shapes turn back, and the question asks about that as well."""
    diagonal: bool = False
    """Eight directions instead of four."""
    min_speed: int = 4
    """Pixels per frame."""
    max_speed: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.max_speed * (self.num_frames - 1)
        room = self.frame_size - self.sprite_size
        require(1 <= self.min_speed <= self.max_speed, "speeds must satisfy 1 <= min_speed <= max_speed")
        require(
            longest <= room,
            f"{self.num_frames - 1} steps of {self.max_speed} pixels leave the frame (room: {room} pixels); "
            "lower max_speed, num_frames or sprite_size",
        )
        require(not self.ask_turn or self.num_frames >= 5, "ask_turn needs at least 5 frames")


@visual_family("direction", "video", DirectionSettings)
def direction(settings: DirectionSettings, rng: random.Random) -> VisualTask:
    """In which direction a shape moves at first, and whether it turns back."""
    names = list(_MOVES)[: 8 if settings.diagonal else 4]
    name = rng.choice(names)
    down, right = _MOVES[name]
    speed = rng.randint(settings.min_speed, settings.max_speed)
    turns = settings.ask_turn and rng.random() < 0.5
    steps = settings.num_frames - 1
    turn_at = rng.randint(2, steps - 2) if turns else steps
    path = [min(i, 2 * turn_at - i) * speed for i in range(settings.num_frames)]
    limit = settings.frame_size - settings.sprite_size
    low, high = min(path), max(path)

    def start(sign: int) -> int:
        """A first position from which the whole path stays inside the frame."""
        if sign == 0:
            return rng.randint(0, limit)
        return rng.randint(-low, limit - high) if sign > 0 else rng.randint(high, limit + low)

    top, left = start(down), start(right)
    shape, color = rng.choice(settings.shapes), rng.choice(settings.colors)
    frames = [((shape, color, top + down * d, left + right * d),) for d in path]
    question = f"Which way does the {shape} move" + (", does it turn back?" if settings.ask_turn else "?")
    answer = f"{name}, {'yes' if turns else 'no'}" if settings.ask_turn else name
    return _video_task(settings, frames, rng, question=question, answer=answer, verifier="exact")


@dataclass(frozen=True, kw_only=True)
class OrderSettings(VideoSettings):
    """Shapes of different colours that appear one after the other."""

    num_events: int = 2
    min_event_frames: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            2 <= self.num_events <= len(self.colors),
            f"{self.num_events} events: use 2 to the number of colors",
        )
        _check_fit(self, self.num_events, self.min_event_frames)


def _check_fit(settings: VideoSettings, count: int, shortest: int) -> None:
    require(shortest >= 1, "min_event_frames is below 1")
    needed = count * shortest + count - 1
    require(
        needed <= settings.num_frames,
        f"{count} events of {shortest} frames, one apart, need {needed} of {settings.num_frames} frames",
    )


@visual_family("event_order", "video", OrderSettings)
def event_order(settings: OrderSettings, rng: random.Random) -> VisualTask:
    """In which order colours appear."""
    colors = rng.sample(settings.colors, settings.num_events)
    spans = _spans(settings, settings.num_events, settings.min_event_frames, rng)
    frames: list[tuple[Sprite, ...]] = [() for _ in range(settings.num_frames)]
    for color, (begin, end) in zip(colors, spans, strict=True):
        sprite = (rng.choice(settings.shapes), color, *_somewhere(settings, rng))
        frames[begin:end] = [(sprite,)] * (end - begin)
    question = "In which order do the colors appear?"
    return _video_task(settings, frames, rng, question=question, answer=", ".join(colors), verifier="exact")


@dataclass(frozen=True, kw_only=True)
class EventCountSettings(VideoSettings):
    """One shape that appears several times in the same place."""

    min_count: int = 1
    max_count: int = 3
    min_event_frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.min_count <= self.max_count, "counts must satisfy 1 <= min_count <= max_count")
        _check_fit(self, self.max_count, self.min_event_frames)


@visual_family("event_count", "video", EventCountSettings)
def event_count(settings: EventCountSettings, rng: random.Random) -> VisualTask:
    """How often a shape appears."""
    number = rng.randint(settings.min_count, settings.max_count)
    shape, color = rng.choice(settings.shapes), rng.choice(settings.colors)
    sprite = (shape, color, *_somewhere(settings, rng))
    frames: list[tuple[Sprite, ...]] = [() for _ in range(settings.num_frames)]
    for begin, end in _spans(settings, number, settings.min_event_frames, rng):
        frames[begin:end] = [(sprite,)] * (end - begin)
    question = f"How often does the {shape} appear?"
    return _video_task(settings, frames, rng, question=question, answer=str(number), verifier="numeric")


@dataclass(frozen=True, kw_only=True)
class GroundingSettings(VideoSettings):
    """A shape of the given colour appears for a while, and possibly others as well."""

    min_event_frames: int = 2
    num_other_events: int = 0
    """Shapes of other colours that appear before or after."""
    iou_threshold: float = 0.0
    """Overlap from which the reward is 1. With 0, the overlap itself is the reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.num_other_events < len(self.colors), "num_other_events needs as many other colors")
        require(0.0 <= self.iou_threshold <= 1.0, f"iou_threshold {self.iou_threshold} is not in 0 .. 1")
        _check_fit(self, 1 + self.num_other_events, self.min_event_frames)


@visual_family("temporal_grounding", "video", GroundingSettings)
def temporal_grounding(settings: GroundingSettings, rng: random.Random) -> VisualTask:
    """When a shape is visible, in seconds. Frame ``i`` lasts from i / fps to (i + 1) / fps."""
    colors = rng.sample(settings.colors, 1 + settings.num_other_events)
    spans = _spans(settings, len(colors), settings.min_event_frames, rng)
    rng.shuffle(spans)
    frames: list[tuple[Sprite, ...]] = [() for _ in range(settings.num_frames)]
    shape = rng.choice(settings.shapes)
    for color, (begin, end) in zip(colors, spans, strict=True):
        sprite = (shape, color, *_somewhere(settings, rng))
        frames[begin:end] = [(sprite,)] * (end - begin)
    begin, end = spans[0]
    answer = f"{begin / settings.fps:.2f}-{end / settings.fps:.2f}"
    question = f"From when to when is the {colors[0]} {shape} visible, in seconds?"
    return _video_task(
        settings,
        frames,
        rng,
        question=question,
        answer=answer,
        verifier="temporal_iou",
        metadata={"iou_threshold": settings.iou_threshold} if settings.iou_threshold else {},
    )


@dataclass(frozen=True, kw_only=True)
class DigitSequenceSettings:
    """Digits that appear one after the other, separated by empty frames."""

    frame_size: int = 32
    """Pixels per side; even."""
    min_digits: int = 2
    max_digits: int = 4
    digit_frames: int = 1
    """Frames per digit."""
    gap_frames: int = 1
    """Empty frames after each digit, so that a repeated digit can be seen."""
    fps: float = 4.0
    colors: tuple[str, ...] = ("black",)
    ask_sum: bool = True
    """Ask for the sum of the digits instead of the number they form."""
    shift: int = 2
    """Largest offset of a digit from the middle, in pixels."""
    noise: int = 0
    """Amplitude of the pixel noise, 0 .. 255, different in each frame."""

    def __post_init__(self) -> None:
        check_names(self.colors)
        require(self.frame_size % 2 == 0, f"frame_size {self.frame_size} must be even")
        require(1 <= self.min_digits <= self.max_digits, "digits must satisfy 1 <= min_digits <= max_digits")
        require(self.digit_frames >= 1, "digit_frames is below 1")
        require(self.gap_frames >= 1, "gap_frames is below 1: a repeated digit would look like one digit")
        require(self.fps > 0, f"fps {self.fps} is not positive")
        require(0 <= self.noise <= 255, f"noise {self.noise} is not in 0 .. 255")
        require(self.shift >= 0, "shift is negative")
        require(self.scale >= 1, f"a digit and a shift of {self.shift} do not fit {self.frame_size} pixels")

    @property
    def scale(self) -> int:
        """Pixels per dot."""
        return (self.frame_size - 2 * self.shift) // DIGIT_ROWS


@visual_family("digit_sequence", "video", DigitSequenceSettings)
def digit_sequence(settings: DigitSequenceSettings, rng: random.Random) -> VisualTask:
    """The sum of the digits that are shown, or the digits themselves."""
    length = rng.randint(settings.min_digits, settings.max_digits)
    shown = tuple(
        (
            rng.choice("0123456789"),
            rng.choice(settings.colors),
            rng.randint(-settings.shift, settings.shift),
            rng.randint(-settings.shift, settings.shift),
        )
        for _ in range(length)
    )
    digits = "".join(digit for digit, *_ in shown)
    seed = rng.getrandbits(32) if settings.noise else 0
    timing = (settings.digit_frames, settings.gap_frames, settings.fps)
    return VisualTask(
        question="<video>" + ("Sum of the digits?" if settings.ask_sum else "Which digits are shown?"),
        answer=str(sum(map(int, digits))) if settings.ask_sum else digits,
        verifier="numeric" if settings.ask_sum else "exact",
        scene=(settings.frame_size, settings.scale, timing, shown, settings.noise, seed),
        draw=partial(_draw_sequence, settings, shown, seed),
    )


def _draw_sequence(
    settings: DigitSequenceSettings, shown: tuple[tuple[str, str, int, int], ...], seed: int
) -> dict[str, bytes]:
    side, scale = settings.frame_size, settings.scale
    canvases: list[Canvas] = []
    for digit, color, down, right in shown:
        for number in range(settings.digit_frames + settings.gap_frames):
            canvas = blank(side, side)
            if number < settings.digit_frames:
                top = (side - DIGIT_ROWS * scale) // 2 + down
                left = (side - DIGIT_COLUMNS * scale) // 2 + right
                draw_digit(canvas, digit, color, top, left, scale)
            add_noise(canvas, settings.noise, seed + len(canvases))
            canvases.append(canvas)
    return {"mp4": mp4(canvases, settings.fps)}
