"""Questions about a video: Video-Holmes, MVBench, MMVU, VideoMathQA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from copd_megatron.data.convert.benchmarks.layout import (
    AS_PUBLISHED,
    choice_task,
    gold_letter,
    kept,
    letter_of,
    listed,
    one_of,
    open_task,
    text,
    with_options,
)
from copd_megatron.data.convert.media import MediaSource
from copd_megatron.data.convert.public_sets import PublicTask, option_texts
from copd_megatron.data.convert.rows import Row
from copd_megatron.data.media import VIDEO
from copd_megatron.errors import BadSampleError

MVBENCH_FOLDERS: Mapping[str, str] = {
    "action_antonym": "ssv2_video_mp4",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
"""MVBench's tasks, and the folder of each one's videos below the folder of media."""
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def video_holmes(row: Row, source: Path, where: str) -> PublicTask:
    """Video-Holmes: ``videos_cropped/<video ID>.mp4``."""
    options = _lettered(row, "Options", where)
    question = with_options(text(row, ("Question",), where), options)
    metadata = {
        "video": text(row, ("video ID",), where),
        **kept(row, ("Question ID", "Question Type")),
    }
    media = [_video(f"videos_cropped/{metadata['video']}.mp4")]
    return choice_task(question, text(row, ("Answer",), where), options, media, metadata, where)


def mvbench(row: Row, source: Path, where: str) -> PublicTask:
    """MVBench: a JSON file per task, or one table with ``task_type``. Videos are those cut to the part
    that is asked about; a published folder of frames has to be made an MP4 file beside it."""
    named = row.get("task_type") or source.stem
    task = str(named).strip().lower().replace(" ", "_").replace("-", "_")
    if task not in MVBENCH_FOLDERS:
        problem = f"{named!r} is none of MVBench's {len(MVBENCH_FOLDERS)} tasks"
        raise BadSampleError(where, "bad_type", problem, "Keep the names of the files: action_antonym.json.")
    options = listed(row, "candidates", where)
    video = text(row, ("video",), where)
    if PurePosixPath(video).suffix.lower() not in _VIDEO_SUFFIXES:
        video += ".mp4"  # a folder of frames as published, which has to be made a video
    return choice_task(
        with_options(text(row, ("question",), where), options),
        gold_letter(text(row, ("answer",), where), options, where),
        options,
        [_video(f"{MVBENCH_FOLDERS[task]}/{video}")],
        {"task": task, "video": video},
        where,
    )


def mmvu(row: Row, source: Path, where: str) -> PublicTask:
    """MMVU, validation: multiple choice, and open questions that are compared as numbers or texts."""
    details = row.get("metadata") or {}
    address = text(row, ("video_path", "video"), where)
    path = address.rpartition("/main/")[2]  # of an address, what follows the branch
    metadata = {**kept(row, ("id", "question_type")), **kept(details, ("subject",))}
    question, answer = text(row, ("question",), where), text(row, ("answer",), where)
    if one_of(row, "question_type", ("multiple-choice", "open-ended"), where) == "open-ended":
        return open_task(question, answer, [_video(path)], metadata)
    options = _lettered(row, "choices", where)
    shown = with_options(question, options)
    return choice_task(shown, answer, options, [_video(path)], metadata, where)


def videomathqa(row: Row, source: Path, where: str) -> PublicTask:
    """VideoMathQA with five options: ``videos/<videoID>.mp4``."""
    options = option_texts(listed(row, "options", where))
    video = text(row, ("videoID",), where)
    return choice_task(
        with_options(text(row, ("question",), where), options),
        text(row, ("answer",), where),
        options,
        [_video(f"videos/{video}.mp4")],
        kept(row, ("question_id", "category", "length", "videoID")),
        where,
    )


def _video(path: str) -> MediaSource:
    return MediaSource(kind=VIDEO, path=path)


def _lettered(row: Row, name: str, where: str) -> list[str]:
    """The options of an object ``{"A": ..., "B": ...}`` in the order of their letters."""
    options: Any = row.get(name)
    held = {key: str(value) for key, value in options.items() if value is not None} if options else {}
    if len(held) < 2 or sorted(held) != [letter_of(number) for number in range(len(held))]:
        problem = f"{name!r} holds no options A, B and so on"
        raise BadSampleError(where, "bad_type", problem, AS_PUBLISHED)
    return [held[letter].strip() for letter in sorted(held)]
