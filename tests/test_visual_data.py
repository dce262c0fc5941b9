"""Procedural image and video tasks: answers re-derived from decoded pixels, splits, bytes, errors."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copd_megatron.config.schema import MediaConfig
from copd_megatron.data import DataError, Sample, ShardSet, check_shards
from copd_megatron.data.decode import VideoFrames, decode_image, decode_video
from copd_megatron.rewards import registry
from copd_megatron.tiny.tasks.canvas import COLORS, DIGIT_COLUMNS, DIGIT_ROWS, blank, draw_digit
from copd_megatron.tiny.tasks.families import VisualTask, families, family
from copd_megatron.tiny.tasks.visual import VisualShare, write_visual_domain
from tests.support.commands import run_script

ALL_FRAMES = MediaConfig(frame_rate=1000.0)
IMAGES = ["count", "count_arithmetic", "compare", "locate", "read_digits", "read_chart"]
VIDEOS = ["direction", "event_order", "event_count", "temporal_grounding", "digit_sequence"]


def tasks(name: str, count: int = 40, seed: int = 0, **settings: Any) -> list[VisualTask]:
    kind = family(name)
    configured, rng = kind.configure(settings), random.Random(seed)
    return [kind.make(configured, rng) for _ in range(count)]


def image_of(task: VisualTask) -> np.ndarray:
    return decode_image(task.draw()["0.png"], "task", max_pixels=10**7)


def video_of(task: VisualTask) -> VideoFrames:
    return decode_video(task.draw()["mp4"], "task", ALL_FRAMES)


def grid_colors(image: np.ndarray, grid: int = 4) -> dict[tuple[int, int], str]:
    """Colour at the middle of each cell that is not white."""
    cell = image.shape[0] // grid
    names = {rgb: name for name, rgb in COLORS.items()}
    found = {}
    for row in range(grid):
        for column in range(grid):
            rgb = tuple(image[row * cell + cell // 2, column * cell + cell // 2].tolist())
            if rgb != (255, 255, 255):
                found[row, column] = names[rgb]
    return found


def test_all_families_are_covered_here() -> None:
    assert sorted(families()) == sorted(IMAGES + VIDEOS)


def test_counts_are_in_the_pixels() -> None:
    answers = set()
    for task in tasks("count"):
        color = task.question.split()[2]
        assert list(grid_colors(image_of(task)).values()).count(color) == int(task.answer)
        answers.add(task.answer)
    assert answers == {"1", "2", "3", "4", "5", "6"}


def test_arithmetic_over_counts_is_in_the_pixels() -> None:
    for task in tasks("count_arithmetic", operations=["plus", "minus", "times"]):
        *_, color, _, operation, operand = task.question.rstrip("?").split()
        number, other = list(grid_colors(image_of(task)).values()).count(color), int(operand)
        expected = {"plus": number + other, "minus": number - other, "times": number * other}[operation]
        assert int(task.answer) == expected


def test_comparisons_are_in_the_pixels() -> None:
    answers = set()
    for task in tasks("compare", 80):
        words = task.question.replace(",", "").split()
        colors = list(grid_colors(image_of(task)).values())
        a, b = colors.count(words[1]), colors.count(words[3])
        assert task.answer == ("equal" if a == b else words[1] if a > b else words[3])
        answers.add("equal" if a == b else "other")
    assert answers == {"equal", "other"}


def test_locations_are_in_the_pixels() -> None:
    for task in tasks("locate"):
        color = task.question.rstrip("?").split()[-2]
        places = [place for place, found in grid_colors(image_of(task)).items() if found == color]
        assert [f"{row + 1}, {column + 1}" for row, column in places] == [task.answer]


def test_digits_are_in_the_pixels() -> None:
    for task in tasks("read_digits", min_digits=1, shift=0):
        image, read = image_of(task), ""
        scale, count = 5, len(task.answer)
        top = (32 - DIGIT_ROWS * scale) // 2
        left = (64 - (count * (DIGIT_COLUMNS + 1) - 1) * scale) // 2
        for position in range(count):
            x = left + position * (DIGIT_COLUMNS + 1) * scale
            seen = image[top : top + DIGIT_ROWS * scale, x : x + DIGIT_COLUMNS * scale]
            matching = []
            for digit in "0123456789":
                wanted = blank(DIGIT_ROWS * scale, DIGIT_COLUMNS * scale)
                draw_digit(wanted, digit, "black", 0, 0, scale)
                matching += [digit] if np.array_equal(wanted, seen) else []
            assert len(matching) == 1
            read += matching[0]
        assert read == task.answer
    for plain, summed in zip(tasks("read_digits"), tasks("read_digits", ask_sum=True), strict=True):
        assert sum(map(int, plain.answer)) == int(summed.answer)


def test_charts_are_in_the_pixels() -> None:
    asked = set()
    for task in tasks("read_chart", 80, questions=["value", "highest", "sum", "difference"]):
        image = image_of(task)
        heights = {
            color: int((image == COLORS[color]).all(-1).any(-1).sum()) // 8
            for color in ("red", "blue", "green", "purple", "orange")
        }
        named = [word for word in task.question.rstrip("?").split() if word in heights]
        if not named:
            expected: Any = max(heights, key=lambda color: heights[color])
        elif len(named) == 1:
            expected = heights[named[0]]
        elif "plus" in task.question:
            expected = heights[named[0]] + heights[named[1]]
        else:
            expected = abs(heights[named[0]] - heights[named[1]])
        assert task.answer == str(expected)
        asked.add((len(named), "plus" in task.question))
    assert len(asked) == 4


def visible(video: VideoFrames) -> list[str | None]:
    """The colour of each frame's shape; None for an empty frame."""
    result = []
    for frame in video.frames:
        found = [name for name, rgb in COLORS.items() if (frame == rgb).all(-1).any()]
        assert len(found) <= 1
        result.append(found[0] if found else None)
    return result


def runs(values: list[str | None]) -> list[tuple[str, int, int]]:
    """Stretches (colour, first, last + 1) of frames that are not empty."""
    found: list[tuple[str, int, int]] = []
    for i, value in enumerate(values):
        if value is None:
            continue
        if i and values[i - 1] == value:
            found[-1] = (value, found[-1][1], i + 1)
        else:
            found.append((value, i, i + 1))
    return found


@pytest.mark.parametrize("diagonal", [False, True])
def test_directions_are_in_the_pixels(diagonal: bool) -> None:
    answers = set()
    for task in tasks("direction", diagonal=diagonal):
        frames = video_of(task).frames
        centers = []
        for frame in frames:
            y, x = np.nonzero((frame != 255).any(-1))
            assert len(y) == 16 * 16  # the whole shape is inside
            centers.append((y.mean(), x.mean()))
        steps = np.sign(np.diff(np.array(centers), axis=0))
        vertical = {1: "down", -1: "up", 0: ""}[int(steps[0, 0])]
        horizontal = {1: "right", -1: "left", 0: ""}[int(steps[0, 1])]
        turned = bool((steps[-1] == -steps[0]).all())
        name = f"{vertical} {horizontal}".strip()
        assert task.answer == f"{name}, {'yes' if turned else 'no'}"
        answers.add(task.answer)
    assert len(answers) >= 8


def test_event_orders_are_in_the_pixels() -> None:
    for task in tasks("event_order", num_events=3):
        assert ", ".join(color for color, _, _ in runs(visible(video_of(task)))) == task.answer


def test_event_counts_are_in_the_pixels() -> None:
    answers = set()
    for task in tasks("event_count", max_count=4):
        assert len(runs(visible(video_of(task)))) == int(task.answer)
        answers.add(task.answer)
    assert answers == {"1", "2", "3", "4"}


def test_groundings_are_in_the_pixels() -> None:
    for task in tasks("temporal_grounding", num_other_events=1, num_frames=12, iou_threshold=0.5):
        video = video_of(task)
        color = task.question.split()[6]
        (_, first, end), *more = [run for run in runs(visible(video)) if run[0] == color]
        assert not more
        assert task.answer == f"{first / video.fps:.2f}-{end / video.fps:.2f}"
        verify = registry.get(task.verifier).verify
        off = f"{end / video.fps}-{end / video.fps + 1}"
        assert verify(off, task.answer, task.metadata) == 0.0


@pytest.mark.parametrize("ask_sum", [False, True])
def test_digit_sequences_are_in_the_pixels(ask_sum: bool) -> None:
    names = {}
    for digit in "0123456789":
        canvas = blank(10, 6)
        draw_digit(canvas, digit, "black", 0, 0, 2)
        names[canvas.tobytes()] = digit
    lengths = set()
    settings = {"frame_size": 16, "shift": 3, "max_digits": 5, "digit_frames": 2}
    for task in tasks("digit_sequence", ask_sum=ask_sum, **settings):
        frames = video_of(task).frames
        digits = ""
        for first, same, gap in zip(*(iter(frames),) * 3, strict=True):
            assert np.array_equal(first, same) and (gap == 255).all()
            y, x = (axis.min() for axis in np.nonzero((first != 255).any(-1)))
            digits += names[first[y : y + 10, x : x + 6].tobytes()]
        lengths.add(len(digits))
        assert task.answer == (str(sum(map(int, digits))) if ask_sum else digits)
    assert lengths == {2, 3, 4, 5}


@pytest.mark.parametrize("name", IMAGES + VIDEOS)
def test_drawing_is_reproducible_and_noise_is_seeded(name: str) -> None:
    plain = tasks(name, 5)
    assert [task.draw() for task in plain] == [task.draw() for task in tasks(name, 5)]
    noisy = tasks(name, 5, noise=20)
    assert [task.draw() for task in noisy] == [task.draw() for task in tasks(name, 5, noise=20)]
    assert noisy[0].draw() != plain[0].draw()


def test_videos_keep_every_pixel_and_their_timing() -> None:
    task = tasks("event_order", 1, noise=60, num_frames=10, fps=2.5, frame_size=48, sprite_size=12)[0]
    video = video_of(task)
    assert video.frames.shape == (10, 48, 48, 3) and video.fps == 2.5 and video.duration == 4.0
    again = decode_video(task.draw()["mp4"], "task", ALL_FRAMES)
    assert np.array_equal(video.frames, again.frames)
    # noise of 60 around white: a lossy codec would have smoothed it
    corner = video.frames[:, :4, :4].astype(int)
    assert corner.min() < 220 and corner.max() == 255


def samples_of(paths: list[Path]) -> list[tuple[Sample, ShardSet]]:
    shards = check_shards([str(path) for path in paths])
    return [(shards.read(ref), shards) for ref in shards.refs]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_splits_are_disjoint_and_gradable(tmp_path: Path) -> None:
    shares = [
        VisualShare(name="locate", settings={"grid": 3}, weight=2),
        VisualShare(name="temporal_grounding", weight=1),
    ]
    written = write_visual_domain(
        tmp_path, "toy", shares, num_train=60, num_validation=15, seed=1, shard_size=25
    )
    assert [path.name for path in written.train] == [f"toy-train-{i:06d}.tar" for i in range(3)]
    train, validation = samples_of(written.train), samples_of(written.validation)
    assert (len(train), len(validation)) == (60, 15)
    contents = [
        (sample.prompt, *(shards.read_member(sample.ref, name) for name in sample.media))
        for sample, shards in train + validation
    ]
    assert len(set(contents)) == 75
    names = [sample.metadata["dataset"] for sample, _ in train]
    assert names.count("locate") == 40 and len(set(names[:12])) == 2
    for sample, _ in train + validation:
        assert sample.media == (("0.png",) if sample.metadata["dataset"] == "locate" else ("mp4",))
        verify = registry.get(sample.verifier).verify
        assert verify(f"Answer: {sample.answer}", sample.answer, sample.metadata) == 1.0
        assert verify("Answer: something else", sample.answer, sample.metadata) == 0.0


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (VisualShare(name="coutn"), "no visual family 'coutn'. Did you mean count"),
        (VisualShare(name="count", settings={"max_cuont": 3}), "Did you mean 'max_count'"),
        (VisualShare(name="count", settings={"max_count": "3"}), "max_count must be of type int"),
        (VisualShare(name="count", settings={"max_count": 30}), "do not fit 16 cells"),
        (VisualShare(name="count", settings={"colors": ["red", "mauve"]}), "unknown color.*mauve"),
        (VisualShare(name="compare", settings={"colors": ["red"]}), "needs two kinds"),
        (VisualShare(name="direction", settings={"max_speed": 20}), "leave the frame"),
        (VisualShare(name="event_order", settings={"num_events": 3, "min_event_frames": 4}), "need 14 of 8"),
        (VisualShare(name="locate", settings={"max_others": 0, "colors": ["red"]}), "distinct tasks"),
        (VisualShare(name="count", weight=0), "every weight must be positive"),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, share: VisualShare, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_visual_domain(tmp_path / "out", "toy", [share], num_train=40, num_validation=0, seed=1)
    assert not (tmp_path / "out").exists()


def test_tool_writes_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    arguments = ["--name", "mix", "--train", "20", "--validation", "5", "--seed", "7", "--shard-size", "10"]
    arguments += ["--family", "count:2", "--family", "direction", "--set", "count.max_count=4"]
    arguments += ["--set", 'direction.colors=["red", "blue"]']
    for folder, hash_seed in (("1", "1"), ("2", "2")):
        done = run_script(
            "make_visual_data.py", "--out", str(tmp_path / folder), *arguments, hash_seed=hash_seed
        )
        assert done.returncode == 0, done.stderr
        assert "20 training samples in 2 shard(s)" in done.stdout
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert len(hashes(tmp_path / "1")) == 3


def test_tool_lists_families_and_names_errors(tmp_path: Path) -> None:
    listed = run_script("make_visual_data.py", "--list")
    assert listed.returncode == 0
    for name in IMAGES + VIDEOS:
        assert f"{name} (" in listed.stdout
    assert f"min_speed={json.dumps(4)}" in listed.stdout
    base = ["--out", str(tmp_path), "--name", "n", "--train", "5"]
    for extra, message in (
        (["--family", "count", "--set", "grid"], "write setting=value"),
        (["--family", "count:x"], "'x' is not a weight"),
        ([], "Missing option '--family'"),
    ):
        done = run_script("make_visual_data.py", *base, *extra)
        assert done.returncode == 2
        assert message in done.stderr and "Traceback" not in done.stderr


def test_members_can_be_drawn_in_any_order() -> None:
    """Drawing keeps no state: a task drawn late is the task drawn early."""
    drawn: list[Callable[[], Any]] = [task.draw for task in tasks("count", 6, jitter=2)]
    early = [draw() for draw in drawn]
    assert [draw() for draw in reversed(drawn)] == early[::-1]
    assert len({data["0.png"] for data in early}) == 6
