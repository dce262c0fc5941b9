"""Benchmarks with pictures and videos, from small files in their published layouts."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from copd_megatron.data import DataError, Sample, check_shards
from copd_megatron.data.convert.benchmarks.table import BENCHMARKS
from copd_megatron.data.convert.benchmarks.video import MVBENCH_FOLDERS
from copd_megatron.data.convert.benchmarks.write import convert_benchmark
from copd_megatron.rewards import registry
from tests.support.hostile_media import noise_video

Rows = Sequence[Mapping[str, Any]]


def picture(shade: int = 0) -> dict[str, Any]:
    """An image as Hugging Face's columns hold it."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 40, 90)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "a.png"}


def in_json(image: Mapping[str, Any]) -> dict[str, Any]:
    return {**image, "bytes": base64.b64encode(image["bytes"]).decode()}


def table(path: Path, rows: Rows) -> Path:
    parquet.write_table(arrow.Table.from_pylist(list(map(dict, rows))), path)
    return path


def listing(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def small(monkeypatch: pytest.MonkeyPatch, name: str, count: int, **parts: int) -> None:
    """The benchmark with fewer questions."""
    changed = dataclasses.replace(BENCHMARKS[name], count=count, parts=parts)
    monkeypatch.setitem(BENCHMARKS, name, changed)


def converted(name: str, sources: Sequence[Path], out: Path, root: Path | None = None) -> list[Sample]:
    shards = check_shards([str(p) for p in convert_benchmark(name, sources, out, media_root=root)])
    return [shards.read(ref) for ref in shards.refs]


def reward(sample: Sample, response: str) -> float:
    return registry.get(sample.verifier).verify(response, sample.answer, sample.metadata)


def mmmu_row(number: int, **changes: Any) -> dict[str, Any]:
    images = {f"image_{i}": picture(i) if i <= 2 else None for i in range(1, 8)}
    return {
        **{"id": f"validation_Art_Theory_{number}", "question": "<image 2> or <image 1>? See <image 2>."},
        **{"options": "['one', '<image 1>']", "answer": "B", "question_type": "multiple-choice"},
        **{"explanation": "", "img_type": "['Paintings']", "topic_difficulty": "Easy", "subfield": "X"},
        **images,
        **changes,
    }


def test_mmmu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "mmmu", 3, subject=1)
    several = mmmu_row(2, question_type="open", options="[]", answer="['f(4)', '4']")
    number = mmmu_row(3, question_type="open", options="[]", answer="6.25", question="Where?", image_2=None)
    found = converted("mmmu", [table(tmp_path / "v.parquet", [mmmu_row(1), several, number])], tmp_path / "o")
    assert found[0].prompt == (
        "<image> or <image>? See image 2.\nOptions:\nA. one\nB. image 1\n"
        "Put the letter of the right option in \\boxed{}."
    )
    assert found[0].metadata["subject"] == "Art_Theory" and found[0].metadata["choices"] == ["one", "image 1"]
    assert found[0].media == ("0.png", "1.png")
    assert [reward(found[1], answer) for answer in ("Answer: 4", "\\boxed{f(4)}", "f(5)")] == [1.0, 1.0, 0.0]
    assert found[2].verifier == "numeric" and str(found[2].prompt).startswith("<image>Where?")


def test_mmmu_keeps_the_order_in_which_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, "mmmu", 1)
    source = table(tmp_path / "v.parquet", [mmmu_row(1)])
    shards = check_shards(list(map(str, convert_benchmark("mmmu", [source], tmp_path / "o"))))
    first = shards.read_member(shards.refs[0], "0.png")
    assert Image.open(io.BytesIO(first)).getpixel((0, 0)) == (2, 40, 90), "image 2 is named first"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "dev_Art_1"}, "mmmu, .*v.parquet, row 0: 'dev_Art_1' is not of the validation split"),
        ({"answer": "C"}, "row 0: the answer 'C' is the letter of none of the 2 options"),
        ({"image_2": None}, "row 0: needs an image in 'image_2'"),
        ({"options": "['one'"}, "row 0: 'options' is no list"),
        ({"question_type": "essay"}, "'question_type' is 'essay', not one of"),
        ({"image_1": {"bytes": b"no picture", "path": "a.png"}}, "row 0, image"),
    ],
)
def test_what_mmmu_does_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, message: str
) -> None:
    small(monkeypatch, "mmmu", 1)
    source = table(tmp_path / "v.parquet", [mmmu_row(1, **changes)])
    with pytest.raises(DataError, match=message):
        convert_benchmark("mmmu", [source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_given_twice_in_place_of_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, "mmmu", 2, subject=1)
    source = table(tmp_path / "v.parquet", [mmmu_row(1)])
    with pytest.raises(DataError, match="id validation_Art_Theory_1 occurs 2 times in mmmu"):
        convert_benchmark("mmmu", [source, source], tmp_path / "out")
    small(monkeypatch, "mmmu", 2, subject=2)
    source = table(tmp_path / "w.parquet", [mmmu_row(1), mmmu_row(2)])
    with pytest.raises(DataError, match=r"1 questions of each subject, but here it is Art_Theory \(2\)"):
        convert_benchmark("mmmu", [source], tmp_path / "out")


def test_mmmu_pro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "mmmu_pro", 1)
    small(monkeypatch, "mmmu_pro_vision", 1)
    row = {
        **{"id": "test_Art_1", "subject": "Art", "options": str(list("qrstuvwxyz")), "answer": "J"},
        **{f"image_{i}": picture() if i == 1 else None for i in range(1, 8)},
    }
    standard = {**row, "question": "Which? <image 1>"}
    found = converted("mmmu_pro", [table(tmp_path / "s.parquet", [standard])], tmp_path / "o")[0]
    assert "J. z\n" in str(found.prompt) and reward(found, "\\boxed{J}") == 1.0
    vision = {"id": "test_Art_1", "image": picture(), "subject": "Art"} | {
        name: row[name] for name in ("options", "answer")
    }
    found = converted("mmmu_pro_vision", [table(tmp_path / "v.parquet", [vision])], tmp_path / "o")[0]
    assert "Options" not in str(found.prompt) and len(found.metadata["choices"]) == 10


def mathvista_row(pid: str, **changes: Any) -> dict[str, Any]:
    return {
        **{"pid": pid, "question": "How much?", "image": "images/1.jpg", "decoded_image": picture()},
        **{"choices": None, "unit": None, "precision": None, "question_type": "free_form"},
        **{"metadata": {"task": "figure question answering", "source": "X"}, "query": "Hint: ..."},
        **changes,
    }


def test_mathvista(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "mathvista", 4)
    rows = [
        mathvista_row("1", answer="1.2", answer_type="float", precision=1.0, unit="cm"),
        mathvista_row("2", answer="4", answer_type="integer"),
        mathvista_row("3", answer="B", answer_type="text", question_type="multi_choice", choices=["C", "B"]),
        mathvista_row("4", answer="[2, 4]", answer_type="list"),
    ]
    number, whole, option, several = converted(
        "mathvista", [table(tmp_path / "testmini.parquet", rows)], tmp_path / "o"
    )
    assert str(number.prompt).startswith("How much?\nUnit: cm\nGive 1 decimal place(s).")
    assert [reward(number, f"Answer: {x}") for x in ("1.24", "1.16", "1.26")] == [1.0, 1.0, 0.0]
    assert reward(whole, "Answer: 4") == 1.0 and reward(whole, "Answer: 4.3") == 0.0
    assert (option.answer, option.verifier) == ("B", "choice"), "the second option, which is the text B"
    assert several.verifier == "math"
    assert number.metadata["task"] == "figure question answering"


def test_mathvision_from_json_lines_and_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, "mathvision", 2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(picture()["bytes"])
    row = {
        "id": "1",
        "question": "Which?\n<image1>",
        "image": "images/1.png",
        "level": 3,
        "subject": "algebra",
    }
    rows = [
        {**row, "options": list("ABCDE"), "answer": "E"},
        {**row, "id": "2", "options": [], "answer": "\\frac{1}{2}"},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = converted("mathvision", [tmp_path / "test.jsonl"], tmp_path / "o")
    assert [sample.verifier for sample in found] == ["choice", "math"]
    assert found[0].metadata["level"] == 3
    rows[0]["image"] = "../secret.png"
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"line 1, image \.\./secret\.png: the path .* leads out"):
        converted("mathvision", [tmp_path / "test.jsonl"], tmp_path / "p")


def test_mathverse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "mathverse", 2, problem_version=2)
    row = {
        **{"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant"},
        **{"question": "Find x.\nChoices:\nA:1\nB:2", "answer": "B", "question_type": "multi-choice"},
        **{"image": picture(), "query_wo": "Q", "query_cot": "Q"},
    }
    hidden = {**row, "sample_index": "2", "problem_version": "Vision Only", "question": ""}
    hidden |= {"question_type": "free-form", "answer": "2\\sqrt{3}"}
    found = converted("mathverse", [table(tmp_path / "testmini.parquet", [row, hidden])], tmp_path / "o")
    assert reward(found[0], "Answer: B") == 1.0
    assert str(found[1].prompt).startswith("Answer the question that the image shows.")
    assert found[1].verifier == "math"


def test_wemath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "wemath", 1)
    row = {
        **{
            "ID": "1",
            "split": "testmini",
            "knowledge concept": "Area",
            "question": "How big?",
            "answer": "C",
        },
        **{"option": "A. 2; B. 3 cm; C. none", "image_path": picture(), "key": "2steps_1"},
    }
    found = converted("wemath", [table(tmp_path / "t.parquet", [row])], tmp_path / "o")[0]
    assert found.metadata["choices"] == ["2", "3 cm", "none"] and found.metadata["key"] == "2steps_1"
    for changes, message in [({"option": "2 or 3"}, "'option' '2 or 3'"), ({"key": "4steps"}, "'key'")]:
        with pytest.raises(DataError, match=message):
            converted("wemath", [table(tmp_path / "t.parquet", [{**row, **changes}])], tmp_path / "p")


def test_zerobench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "zerobench", 2)
    rows = [
        {
            **{"question_id": str(i), "question_text": "Count.", "question_answer": answer},
            **{"question_images": ["a.png"], "question_images_decoded": [picture(1), picture(2)]},
        }
        for i, answer in enumerate(["12", "blue, red"])
    ]
    found = converted("zerobench", [table(tmp_path / "t.parquet", rows)], tmp_path / "o")
    assert [sample.verifier for sample in found] == ["numeric", "exact"]
    assert found[0].media == ("0.png", "1.png")


def videos(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise_video("mp4"))


def test_video_holmes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "video_holmes", 1)
    videos(tmp_path, "videos_cropped/abc.mp4")
    row = {
        **{"video ID": "abc", "Question ID": 1, "Question Type": "TCI", "Question": "Why?"},
        **{"Options": {"B": "fear", "A": "joy"}, "Answer": "B", "Explanation": "E"},
    }
    found = converted("video_holmes", [listing(tmp_path / "test.json", [row])], tmp_path / "o")[0]
    assert found.media == ("0.mp4",) and "A. joy\nB. fear" in str(found.prompt)
    assert found.metadata["Question Type"] == "TCI"


def test_mvbench_from_a_file_per_task_and_from_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, "mvbench", 2, task=2)
    videos(tmp_path / "video", f"{MVBENCH_FOLDERS['object_shuffle']}/v.mp4", "vlnqa/w.mp4")
    row = {"video": "v.mp4", "question": "Where?", "candidates": ["left", "right"], "answer": "right"}
    sources = [
        listing(tmp_path / "object_shuffle.json", [row]),
        listing(tmp_path / "egocentric_navigation.json", [{**row, "video": "w.mp4"}]),
    ]
    found = converted("mvbench", sources, tmp_path / "o", tmp_path / "video")
    assert [sample.metadata["task"] for sample in found] == ["object_shuffle", "egocentric_navigation"]
    assert found[0].answer == "B"
    table_file = tmp_path / "MVBench.tsv"
    table_file.write_text(
        "index\ttask_type\tvideo\tquestion\tanswer\tcandidates\n"
        "0\tObject Shuffle\tv.mp4\tWhere?\tright\t\"['left', 'right']\"\n"
        "1\tEgocentric Navigation\tw.mp4\tWhere?\tright\t\"['left', 'right']\"\n"
    )
    again = converted("mvbench", [table_file], tmp_path / "p", tmp_path / "video")
    assert [(s.prompt, s.answer, s.metadata) for s in again] == [
        (s.prompt, s.answer, s.metadata) for s in found
    ]
    with pytest.raises(DataError, match="'test' is none of MVBench's 20 tasks"):
        converted("mvbench", [listing(tmp_path / "test.json", [row])], tmp_path / "q", tmp_path / "video")


def test_mmvu_and_videomathqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, "mmvu", 2)
    small(monkeypatch, "videomathqa", 1)
    videos(tmp_path, "videos/Art/0.mp4", "videos/xyz.mp4")
    address = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/0.mp4"
    row = {
        **{"id": "validation_0", "video": address, "question": "Which?", "metadata": {"subject": "Art"}},
        **{"question_type": "multiple-choice", "choices": dict(zip("ABCDE", "vwxyz", strict=True))},
        "answer": "E",
    }
    free = {**row, "id": "validation_1", "question_type": "open-ended", "answer": "merge sort"}
    found = converted("mmvu", [listing(tmp_path / "validation.json", [row, free])], tmp_path / "o")
    assert [sample.verifier for sample in found] == ["choice", "exact"]
    assert found[0].metadata["subject"] == "Art"
    row = {
        **{"question_id": 1, "videoID": "xyz", "question": "What angle?", "category": "Geometry Angle"},
        **{"options": ["A. 10", "B. 20", "C. 30", "D. 40", "E. 50"], "answer": "B", "length": "short"},
    }
    found = converted("videomathqa", [table(tmp_path / "mcq.parquet", [row])], tmp_path / "o")
    assert found[0].metadata["choices"] == ["10", "20", "30", "40", "50"]
    (tmp_path / "videos/xyz.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    with pytest.raises(DataError, match=r"row 0, video videos/xyz\.mp4"):
        converted("videomathqa", [table(tmp_path / "mcq.parquet", [row])], tmp_path / "p")


def test_a_table_with_tabs_that_is_torn_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "MVBench.tsv"
    source.write_text("task_type\tvideo\nObject Shuffle\n")
    with pytest.raises(DataError, match="another number of values"):
        convert_benchmark("mvbench", [source], tmp_path / "out")
