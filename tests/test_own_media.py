"""A user's own rows with images and videos: JSON lines, JSON arrays and Parquet to shards."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from copd_megatron.cli.main import main
from copd_megatron.data import DataError, Sample, check_shards
from copd_megatron.data.convert.jsonl import FieldMap, convert_jsonl
from copd_megatron.data.convert.write import WrittenDomain
from copd_megatron.tiny.tasks.encode import mp4

ROW = {"answer": "3", "verifier": "numeric"}


def picture(color: tuple[int, int, int], form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / f"photos/{number}.png").write_bytes(picture((40 * number, 10, 10)))
    (tmp_path / "photos/bitmap.bmp").write_bytes(picture((1, 2, 3), "BMP"))
    (tmp_path / "clip.mp4").write_bytes(mp4([np.full((16, 16, 3), 60 * i, np.uint8) for i in range(4)], 4.0))
    return tmp_path


def lines(folder: Path, *rows: dict[str, Any], name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows))
    return path


def convert(source: Path, **options: Any) -> WrittenDomain:
    return convert_jsonl([source], source.parent / "out", "m", FieldMap(), **options)


def samples(paths: list[Path]) -> list[tuple[Sample, dict[str, bytes]]]:
    """Samples with their media."""
    shards = check_shards([str(path) for path in paths])
    found = [shards.read(ref) for ref in shards.refs]
    return [(s, {name: shards.read_member(s.ref, name) for name in s.media}) for s in found]


def test_paths_start_at_the_file_and_placeholders_say_where(folder: Path) -> None:
    source = lines(
        folder,
        {"prompt": "<image>How many?", "image": "photos/0.png"},
        {"prompt": "Which of <image> and <image>?", "images": ["photos/1.png", "photos/bitmap.bmp"]},
        {"prompt": "Watch <video>, see <image>.", "videos": ["clip.mp4"], "image": "photos/2.png"},
        {"prompt": "In front.", "images": ["photos/3.png"]},
        {"prompt": "Text alone."},
    )
    one, two, mixed, front, text = samples(convert(source).train)
    assert one[1] == {"0.png": picture((0, 10, 10))} and one[0].prompt == "<image>How many?"
    assert list(two[1]) == ["0.png", "1.png"]
    assert Image.open(io.BytesIO(two[1]["1.png"])).getpixel((0, 0)) == (1, 2, 3), "a bitmap becomes a PNG"
    assert sorted(mixed[1]) == ["0.mp4", "0.png"] and mixed[1]["0.mp4"] == (folder / "clip.mp4").read_bytes()
    assert list(front[1]) == ["0.png"] and not text[1]


def test_parts_of_chat_messages_name_their_media(folder: Path) -> None:
    content = [
        {"type": "image", "image": "photos/1.png"},
        {"type": "text", "text": "or"},
        {"type": "image", "image": "photos/0.png"},
    ]
    plain = [{"type": "video"}, {"type": "text", "text": "What?"}]
    source = lines(
        folder,
        {"prompt": [{"role": "user", "content": content}]},
        {"prompt": [{"role": "user", "content": plain}], "video": "clip.mp4"},
    )
    named, placed = samples(convert(source).train)
    assert named[1] == {"0.png": picture((40, 10, 10)), "1.png": picture((0, 10, 10))}
    assert named[0].prompt[0]["content"][0] == {"type": "image"}  # type: ignore[index]
    assert list(placed[1]) == ["0.mp4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "image": "photos/99.png"}, "image .*99.png cannot be read"),
        ({"prompt": "p", "image": "broken.png"}, "broken.png"),
        ({"prompt": "p", "image": "short.png"}, "line 2"),
        ({"prompt": "p", "video": "photos/0.png"}, "is not an MP4"),
        ({"prompt": "p", "video": "short.mp4"}, "line 2, video short.mp4"),
        ({"prompt": "<image><image>", "images": ["photos/0.png"]}, r"2 image placeholder\(s\) for 1 image"),
        ({"prompt": "<video>", "images": ["photos/0.png"]}, r"0 image placeholder\(s\) for 1 image.*1 video"),
        ({"prompt": "p", "image": "../secret.png"}, "leads out of the media folder"),
        ({"prompt": "p", "image": 7}, "an? image is given as int"),
        ({"prompt": "p", "image": "moving.gif"}, "the GIF holds several pictures, of which only the first"),
        ({"prompt": "p", "image": "pages.tiff"}, "the TIFF holds several pictures"),
        ({"prompt": "p", "image": "moving.webp"}, "the WEBP holds several pictures"),
        ({"prompt": "p", "image": "moving.png"}, "the PNG holds several pictures"),
        ({"prompt": "p", "audio": "a.wav"}, "'audio' hold media, which would be lost"),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image", "image": "photos/0.png"}]}],
                "image": "photos/1.png",
            },
            "both by parts of the prompt and by fields",
        ),
    ],
)
def test_what_would_be_lost_or_refused_later_is_refused(
    folder: Path, row: dict[str, Any], message: str
) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    one, other = (Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (10, 200))
    for name in ("moving.gif", "pages.tiff", "moving.webp", "moving.png"):
        one.save(folder / name, save_all=True, append_images=[other])
    (folder / "short.png").write_bytes(picture((9, 9, 9))[:-20])
    (folder / "short.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:-200])
    source = lines(folder, {"prompt": "q", "image": "photos/5.png"}, row)
    with pytest.raises(DataError, match=message):
        convert(source)
    assert not (folder / "out").exists()
    written = convert(source, skip_bad=True)
    assert [sample.prompt for sample, _ in samples(written.train)] == ["q"]


def test_what_stands_beside_a_mediums_path_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (32, 32)).save(folder / "one.gif")
    image = {"path": "photos/0.png", "caption": "a red one", "url": None}
    source = lines(folder, {"prompt": "p", "image": image}, {"prompt": "q", "image": "one.gif"})
    with caplog.at_level(logging.WARNING):
        assert len(samples(convert(source).train)) == 2
    assert "nothing asks for: 'image.caption' (1 lines)" in caplog.text


def test_validation_takes_media_that_training_does_not_have(folder: Path) -> None:
    rows = [{"prompt": f"{ask}?", "image": f"photos/{i}.png"} for i in range(6) for ask in ("What", "Where")]
    written = convert(lines(folder, *rows), num_validation=2, seed=1)
    train, validation = samples(written.train), samples(written.validation)
    assert len(validation) == 2 and len(train) == 8
    assert not {m["0.png"] for _, m in train} & {m["0.png"] for _, m in validation}


def test_parquet_and_json_arrays_are_read_like_lines(folder: Path) -> None:
    rows = [
        {**ROW, "prompt": "<image>?", "images": [{"bytes": picture((7, 7, 7)), "path": "x.png"}]},
        {**ROW, "prompt": "none", "images": []},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "mine.parquet")
    one, none = samples(convert(folder / "mine.parquet").train)
    assert one[1] == {"0.png": picture((7, 7, 7))} and not none[1]
    (folder / "mine.json").write_text(json.dumps([{**ROW, "prompt": "p", "image": "photos/0.png"}]))
    written = convert(folder / "mine.json", overwrite=True)
    assert [list(media) for _, media in samples(written.train)] == [["0.png"]]


def test_the_command_takes_fields_and_a_media_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "lists").mkdir()
    source = lines(folder, {"prompt": "p", "pictures": ["0.png"]}, {"prompt": "q"}, name="lists/a.jsonl")
    words = ["data", "jsonl-to-shards", str(source), "--out", str(folder / "out"), "--name", "m"]
    assert main([*words]) == 2
    assert "--image-field" in capsys.readouterr().err
    more = ["--image-field", "pictures", "--media-root", str(folder / "photos")]
    assert main([*words, *more]) == 0
    first, second = samples(sorted((folder / "out").glob("*.tar")))
    assert list(first[1]) == ["0.png"] and not second[1]
