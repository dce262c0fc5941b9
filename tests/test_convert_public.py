"""Public data sets to shards, on small files in the sets' own layouts."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from copd_megatron.data import DataError, Sample, ShardSet, check_shards
from copd_megatron.data.convert.public import Conversion, PublicDomain, convert_public
from copd_megatron.data.convert.public_sets import INSTRUCTIONS
from copd_megatron.data.decode import decode_image
from copd_megatron.data.decode.containers import video_container
from copd_megatron.rewards import registry
from copd_megatron.rewards.verifiers.box_iou import box_iou, iou
from copd_megatron.tiny.tasks.encode import mp4, png
from tests.support.commands import run_script
from tests.support.hostile_media import NOT_IMAGES, NOT_VIDEOS, encoded


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def write_json(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def put(path: Path, data: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def convert(source: Path, out: Path, layout: str, **options: Any) -> PublicDomain:
    split = {name: options.pop(name) for name in ("num_validation", "seed") if name in options}
    return convert_public([source], out, "toy", Conversion(layout=layout, num_workers=1, **options), **split)


def read(paths: list[Path]) -> tuple[list[Sample], ShardSet]:
    shards = check_shards([str(path) for path in paths])
    return [shards.read(ref) for ref in shards.refs], shards


POLARIS = [
    {"problem": "What is $1+1$?", "answer": "2", "difficulty": "5/8"},
    {"problem": "Simplify $\\frac{2}{4}$.", "answer": "\\frac{1}{2}", "difficulty": "1/8"},
    {"problem": "How many?", "answer": 7},
]


def test_polaris(tmp_path: Path) -> None:
    rows = [*POLARIS, {"problem": "", "answer": "1"}, "{broken", [1]]
    source = write_json(tmp_path / "polaris.jsonl", rows)
    domain = convert(source, tmp_path / "out", "polaris")
    samples, _ = read(domain.written.train)
    assert [sample.answer for sample in samples] == ["2", "\\frac{1}{2}", "7"]
    assert samples[0].prompt == "What is $1+1$?" + INSTRUCTIONS["math"]
    assert samples[0].metadata == {"dataset": "polaris", "difficulty": "5/8"}
    assert {sample.verifier for sample in samples} == {"math"}
    assert domain.skipped == {"missing_field": 1, "not_json": 1, "bad_type": 1}
    verify = registry.get("math").verify
    assert verify("So \\boxed{0.5}", samples[1].answer, samples[1].metadata) == 1.0


def test_mmfinereason(tmp_path: Path) -> None:
    image = png(picture(1))
    bitmap = encoded(Image.fromarray(picture(2)), "BMP")
    put(tmp_path / "media" / "a.jpg", encoded(Image.fromarray(picture(3)), "JPEG"))

    def entry(data: bytes) -> dict[str, Any]:
        return {"bytes": base64.b64encode(data).decode(), "path": None}

    common = {"source": "MMK12", "id": "x7", "pass_rate": 0.0, "caption": "long"}
    rows = [
        {"question": "<image>How many?", "answer": "12", "image": entry(image), **common},
        {"question": "Which?", "answer": "(B)", "image": [entry(image), entry(bitmap)], **common},
        {"question": "Angle?", "answer": "$30^\\circ$", "image": "a.jpg"},
        {"question": "Lost?", "answer": "1", "image": {"bytes": None, "path": "absent.png"}},
        {"question": "Torn?", "answer": "1", "image": entry(image[:200])},
        {"question": "<image><image>Two?", "answer": "1", "image": entry(image)},
        {"question": "None?", "answer": "1", "image": None},
        {"question": "Code?", "answer": "1", "image": {"bytes": "*not base64*"}},
    ]
    source = write_json(tmp_path / "rows.json", rows)
    domain = convert(source, tmp_path / "out", "mmfinereason", media_root=tmp_path / "media")
    samples, shards = read(domain.written.train)
    assert [(s.answer, s.verifier, s.media) for s in samples] == [
        ("12", "math", ("0.png",)),
        ("B", "choice", ("0.png", "1.png")),
        ("$30^\\circ$", "math", ("0.jpg",)),
    ]
    assert samples[0].metadata == {"dataset": "mmfinereason", "source": "MMK12", "id": "x7", "pass_rate": 0.0}
    assert shards.read_member(samples[0].ref, "0.png") == image
    turned = decode_image(shards.read_member(samples[1].ref, "1.png"), "x", max_pixels=10**6)
    assert np.array_equal(turned, picture(2))
    assert domain.skipped == {
        "missing_media": 1,
        "corrupt_image": 1,
        "media_mismatch": 1,
        "no_media": 1,
        "bad_type": 1,
    }


VIDEO_R1 = {
    "problem_id": 2,
    "problem": "What appears on the screen?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. A bird", "B. A fish"],
    "solution": "<answer>B</answer>",
    "path": "./clips/1.mp4",
    "data_source": "LLaVA-Video-178K/30_60_s_youtube_v0_1",
}


def test_video_r1(tmp_path: Path) -> None:
    clip = put(tmp_path / "clips" / "1.mp4", mp4([picture(i) for i in range(4)], 2.0))
    put(tmp_path / "Chart" / "1.png", png(picture()))
    chart = {**VIDEO_R1, "data_type": "image", "path": "./Chart/1.png", "options": []}
    rows = [
        VIDEO_R1,
        {**chart, "problem_type": "numerical", "solution": "<answer>3.14</answer>"},
        {**chart, "problem_type": "regression", "solution": "<answer>3.1</answer>"},
        {**chart, "problem_type": "free-form", "solution": "<answer>a bird</answer>"},
        {**chart, "problem_type": "OCR", "solution": "<answer>EXIT</answer>"},
        {**VIDEO_R1, "solution": "<answer>a whale</answer>"},
        {**VIDEO_R1, "path": "./clips/2.mp4"},
        {**VIDEO_R1, "data_type": "audio"},
    ]
    source = write_json(tmp_path / "Video-R1-260k.json", rows)
    domain = convert(source, tmp_path / "out", "video_r1", media_root=tmp_path)
    (video, image), shards = read(domain.written.train)
    assert (
        video.prompt == "What appears on the screen?\nOptions:\nA. A bird\nB. A fish" + INSTRUCTIONS["choice"]
    )
    assert (video.answer, video.verifier, video.media) == ("B", "choice", ("0.mp4",))
    assert video.metadata["choices"] == ["A bird", "A fish"]
    assert shards.read_member(video.ref, "0.mp4") == clip
    verify = registry.get("choice").verify
    assert [verify(text, video.answer, video.metadata) for text in ("\\boxed{B}", "a fish", "A")] == [1, 1, 0]
    assert (image.answer, image.verifier, image.media) == ("3.14", "numeric", ("0.png",))
    assert registry.get("numeric").verify("3.1449", image.answer, image.metadata) == 1.0
    assert domain.skipped == {
        "unverifiable_regression": 1,
        "unverifiable_free_form": 1,
        "unverifiable_ocr": 1,
        "ungradable": 1,
        "missing_media": 1,
        "bad_type": 1,
    }


def onethinker_rows(folder: Path) -> list[dict[str, Any]]:
    put(folder / "v" / "1.mp4", mp4([picture(i) for i in range(4)], 2.0))
    put(folder / "i" / "1.png", png(picture(1)))
    put(folder / "i" / "2.png", png(picture(2)))
    video = {
        "data_type": "video",
        "videos": ["v/1.mp4"],
        "images": [],
        "options": [],
        "data_source": "HiREST",
    }
    image = {
        "data_type": "image",
        "images": ["i/1.png"],
        "videos": [],
        "options": [],
        "data_source": "RefCOCO",
    }
    return [
        {
            **video,
            "problem": "<video>When?",
            "problem_type": "temporal grounding",
            "answer": '<answer>{"time": [1.5, 3.0]}</answer>',
        },
        {
            **image,
            "problem": "<image>Where?",
            "problem_type": "spatial grounding",
            "answer": '<answer>{"boxes": [10, 20, 110, 220]}</answer>',
        },
        {
            **image,
            "problem": "<image><image>Sum?",
            "images": ["i/1.png", "i/2.png"],
            "problem_type": "math",
            "answer": "<answer>$\\frac{1}{2}$</answer>",
        },
        {**video, "problem": "<video>Track", "problem_type": "tracking", "answer": "{}"},
        {**video, "problem": "<video>When?", "problem_type": "temporal grounding", "answer": "soon"},
        {**video, "problem": "<video>?", "problem_type": "temporal grounding", "answer": '{"time": [3, 1]}'},
    ]


def test_onethinker(tmp_path: Path) -> None:
    source = write_json(tmp_path / "onethinker_rl_train.json", onethinker_rows(tmp_path))
    domain = convert(source, tmp_path / "out", "onethinker", media_root=tmp_path)
    (when, where, total), _ = read(domain.written.train)
    assert (when.answer, when.verifier, when.media) == ("1.5-3", "temporal_iou", ("0.mp4",))
    verify = registry.get("temporal_iou").verify
    assert verify('<answer>{"time": [1.5, 3.0]}</answer>', when.answer, when.metadata) == 1.0
    assert (where.answer, where.verifier) == ("[10, 20, 110, 220]", "box_iou")
    assert (total.answer, total.media) == ("$\\frac{1}{2}$", ("0.png", "1.png"))
    assert domain.skipped == {"unverifiable_tracking": 1, "bad_answer": 1, "ungradable": 1}
    only = convert(source, tmp_path / "videos", "onethinker", media_root=tmp_path, kind="video")
    assert [sample.media for sample in read(only.written.train)[0]] == [("0.mp4",)]


def test_validation_shares_no_medium_with_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(6):
        put(tmp_path / f"{i}.png", png(picture(i)))
    rows = [
        {"question": f"{i}: which?", "answer": "ABCDEFGHI"[i], "image": [f"{j % 6}.png" for j in pair]}
        for i, pair in enumerate([(0,), (1,), (2, 3), (3,), (4,), (5,), (0,), (1,), (4, 2)])
    ]
    source = write_json(tmp_path / "rows.jsonl", rows)
    seen = []
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        domain = convert(source, out, "mmfinereason", media_root=tmp_path, num_validation=2, seed=seed)
        media: dict[str, set[bytes]] = {}
        for split in ("train", "validation"):
            samples, shards = read(getattr(domain.written, split))
            assert len(samples) == getattr(domain.written, f"num_{split}")
            media[split] = {shards.read_member(s.ref, name) for s in samples for name in s.media}
        assert not media["train"] & media["validation"]
        assert domain.written.num_validation == 2
        seen.append(sorted(media["validation"]))
    assert len({tuple(chosen) for chosen in seen}) > 1
    text = write_json(tmp_path / "text.jsonl", [{"problem": f"{i % 5}", "answer": "1"} for i in range(20)])
    domain = convert(text, tmp_path / "text", "polaris", num_validation=6)
    counts = {
        split: Counter(sample.prompt for sample in read(getattr(domain.written, split))[0])
        for split in ("train", "validation")
    }
    assert not counts["train"].keys() & counts["validation"].keys()
    assert (counts["train"].total(), counts["validation"].total()) == (12, 6)
    assert "left out 2 row(s) that share a medium or the question" in caplog.text


def test_conversion_is_reproducible_and_limited(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        put(tmp_path / f"{i}.png", png(picture(i)))
        rows.append({"question": f"{i}?", "answer": "ABC"[i % 3], "image": f"{i}.png"})
    source = write_json(tmp_path / "a.jsonl", rows)
    options: dict[str, Any] = {"layout": "mmfinereason", "media_root": tmp_path}
    for folder in ("1", "2"):
        convert(source, tmp_path / folder, **options, num_validation=5, seed=2)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    few = convert(source, tmp_path / "3", **options, limit=4, instruction=" Go.")
    samples, _ = read(few.written.train)
    assert [sample.prompt for sample in samples] == [f"{i}? Go." for i in range(4)]


def test_requests_that_cannot_work_are_refused(tmp_path: Path) -> None:
    good = write_json(tmp_path / "good.jsonl", POLARIS)
    put(tmp_path / "held" / "toy-train-000000.tar", b"")
    for source, layout, out, message in (
        (good, "polarisation", "a", "unknown layout"),
        (good, "video_r1", "a", "no usable row.*missing_field"),
        (tmp_path / "absent.json", "polaris", "a", "cannot be read"),
        (write_json(tmp_path / "object.json", {"rows": []}), "polaris", "a", "not an array"),  # type: ignore[arg-type]
        (write_json(tmp_path / "rows.csv", []), "polaris", "a", "unknown kind of file"),
        (good, "polaris", "held", "already holds"),
    ):
        with pytest.raises(DataError, match=message):
            convert(source, tmp_path / out, layout)
    with pytest.raises(DataError, match="leave none"):
        convert(good, tmp_path / "b", "polaris", num_validation=3)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_parquet_with_images_inside_is_read(tmp_path: Path) -> None:
    """As Hugging Face's image columns are stored: {"bytes", "path"}, the bytes as they are."""
    images = [png(picture(seed)) for seed in (1, 2)]
    rows = [
        {
            "question": "<image>How many?",
            "answer": str(number),
            "image": {"bytes": data, "path": f"{number}.png"},
        }
        for number, data in enumerate(images)
    ]
    source = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    samples, shards = read(convert(source, tmp_path / "out", "mmfinereason").written.train)
    assert [shards.read_member(sample.ref, "0.png") for sample in samples] == images
    assert [sample.answer for sample in samples] == ["0", "1"]


def test_parquet_is_read(tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "answer": str(row["answer"])} for row in POLARIS]), source
    )
    assert convert(source, tmp_path / "out", "polaris").written.num_train == 3
    source.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not readable as Parquet"):
        convert(source, tmp_path / "again", "polaris")


def test_tool_reports_what_it_skipped(tmp_path: Path) -> None:
    source = write_json(tmp_path / "onethinker_rl_train.json", onethinker_rows(tmp_path))
    arguments = ["--layout", "onethinker", str(source), "--out", str(tmp_path / "out"), "--name", "video"]
    done = run_script("convert_dataset.py", *arguments, "--media-root", str(tmp_path), "--kind", "video")
    assert done.returncode == 0, done.stderr
    assert "1 training samples in 1 shard(s)" in done.stdout
    assert "skipped 1: unverifiable_tracking" in done.stdout
    done = run_script("convert_dataset.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("copd: ") and "already holds" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer>[0, 0, 10, 10]</answer>", 1.0),
        ('<answer>{"boxes": [0, 0, 10, 5]}</answer>', 0.5),
        ("[5, 0, 15, 10]", 1 / 3),
        ("(20.5, 0, 30, 10)", 0.0),
        ("[10, 10, 0, 0]", 0.0),
        ("upper left", 0.0),
    ],
)
def test_boxes(response: str, reward: float) -> None:
    assert box_iou(response, "[0, 0, 10, 10]", {}) == pytest.approx(reward)
    assert box_iou(response, "[0, 0, 10, 10]", {"iou_threshold": 0.5}) == float(reward >= 0.5)


def test_box_edges() -> None:
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    for answer in ("nowhere", "[1, 1, 1, 5]"):
        with pytest.raises(ValueError, match="holds no box"):
            box_iou("[0, 0, 1, 1]", answer, {})


@pytest.mark.parametrize(
    "name", ["/etc/hostname.png", "../secret.png", "a/../../secret.png", "..", "x\0.png", "x" * 5000 + ".png"]
)
def test_paths_do_not_lead_out_of_the_media_folder(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret.png", png(picture()))
    put(tmp_path / "media" / "a" / "b.png", png(picture(1)))
    rows = [{"question": "Q?", "answer": "1", "image": path} for path in (name, "a/../a/./b.png")]
    source = write_json(tmp_path / "rows.json", rows)
    domain = convert(source, tmp_path / "out", "mmfinereason", media_root=tmp_path / "media")
    assert domain.written.num_train == 1 and domain.skipped == {"missing_media": 1}


def test_media_that_samples_cannot_have_are_skipped_or_converted(tmp_path: Path) -> None:
    files = {**NOT_IMAGES, "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"}
    for kind, data in files.items():
        put(tmp_path / f"{kind}.png", data)
    # what begins like a container is stored, and judged by whoever decodes it
    videos_of = {kind: data for kind, data in NOT_VIDEOS.items() if video_container(data) is None}
    assert len(videos_of) > 5
    for kind, data in videos_of.items():
        put(tmp_path / f"{kind}.mp4", data)
    put(tmp_path / "text.txt", b"x")
    images = [{"question": "Q?", "answer": "1", "image": f"{kind}.png"} for kind in files]
    domain = convert(
        write_json(tmp_path / "i.json", images), tmp_path / "i", "mmfinereason", media_root=tmp_path
    )
    samples, shards = read(domain.written.train)
    assert len(samples) == 2 and domain.skipped == {"corrupt_image": len(files) - 2}  # GIF and TIFF
    for sample in samples:
        assert decode_image(shards.read_member(sample.ref, "0.png"), "x", max_pixels=99).shape == (4, 4, 3)
    videos = [{**VIDEO_R1, "path": f"{kind}.mp4"} for kind in videos_of]
    videos += [{**VIDEO_R1, "path": "text.txt"}, VIDEO_R1]
    put(tmp_path / "clips" / "1.mp4", mp4([picture(i) for i in range(4)], 2.0))
    domain = convert(write_json(tmp_path / "v.json", videos), tmp_path / "v", "video_r1", media_root=tmp_path)
    assert domain.written.num_train == 1
    assert domain.skipped == {"unknown_format": len(videos) - 1}


def test_rows_that_nobody_foresaw_are_skipped(tmp_path: Path) -> None:
    grounding = {**VIDEO_R1, "problem_type": "temporal grounding"}
    put(tmp_path / "clips" / "1.mp4", mp4([picture(i) for i in range(4)], 2.0))
    rows = [
        {**grounding, "solution": '{"time": [1, ' + "9" * 400 + "]}"},
        {**grounding, "solution": '{"time": ' + "[" * 5000 + "]" * 5000 + "}"},
        {**VIDEO_R1, "path": ["a", {"bytes": 3}]},
        VIDEO_R1,
    ]
    source = write_json(tmp_path / "v.json", rows)
    domain = convert(source, tmp_path / "out", "video_r1", media_root=tmp_path)
    assert domain.written.num_train == 1
    assert domain.skipped == {"bad_answer": 2, "bad_type": 1}
