"""Small inputs that would grow without bounds, never end, or do something to whoever looks at them."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from copd_megatron.checkpoint.compatible import check_compatible
from copd_megatron.cli.main import main
from copd_megatron.cli.output import say
from copd_megatron.config import Config, ConfigError, load_config, to_yaml
from copd_megatron.config.schema import BranchConfig
from copd_megatron.data.convert.media import MediaSource, load_medium
from copd_megatron.data.media import IMAGE, MAX_BYTES, VIDEO, content_hash
from copd_megatron.errors import BadSampleError
from copd_megatron.merge.recipe import read_recipe
from copd_megatron.metrics.rank_log import ConsoleFormatter, RankFormatter, RankPlace
from copd_megatron.report.thumbnails import Thumbnails
from copd_megatron.rewards.final_answer import normalize
from copd_megatron.rewards.mathematics.notation import _plain_letters
from copd_megatron.rewards.parsing.magnitude import is_evaluable
from copd_megatron.rewards.parsing.symbolic import formula, sympy
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError
from copd_megatron.rewards.verifiers.math import math
from copd_megatron.untrusted.unicode_text import nfkc
from copd_megatron.untrusted.visible import show_traceback, visible, visible_json
from copd_megatron.untrusted.yaml_text import load_yaml
from tests.support.commands import python


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns; it must end soon, in processor time."""
    begin = time.process_time()
    try:
        return call()
    finally:
        assert time.process_time() - begin < seconds


# ---- settings --------------------------------------------------------------------------------------------

LISTS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
CIRCLE = "a: &a [*a]\n"


@pytest.mark.parametrize("text", [LISTS, MERGES, CIRCLE], ids=["lists", "merges", "circle"])
def test_no_alias_stands_for_more_than_a_bound(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(yaml.YAMLError, match=r"100000 values|holds itself"):
        within(2.0, lambda: load_yaml(text))
    with pytest.raises(ConfigError, match=r"bomb\.yaml.*(aliases|holds itself)"):
        within(2.0, lambda: load_config(path))
    with pytest.raises(ConfigError, match=r"bomb\.yaml.*not valid YAML"):
        within(2.0, lambda: read_recipe(path))
    config = Config(branches={"a": BranchConfig()})
    with pytest.raises(ConfigError, match=r"step_000001.*cannot be read"):
        within(2.0, lambda: check_compatible(text, config, where="step_000001"))


def test_aliases_in_use_still_work() -> None:
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")["b"] == {"x": 1, "y": 2}
    assert load_yaml("") is None


def settings(tmp_path: Path, lines: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: m}}\nrun: {{name: r, seed: 3}}\nbranches:\n{lines}")
    return path


def prompt_lines(count: int, value: Callable[[int], str]) -> str:
    return "".join(f"  b{i}: {{model_path: '{value(i)}'}}\n" for i in range(count))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda i: f"${{branches.b{i + 1}.model_path}}" * 2, "grow beyond"),
        (lambda i: f"${{..b{i + 1}.model_path}}" * 2, "grow beyond"),
        (lambda i: f"${{oc.select:branches.b{i + 1}.model_path,x}}" * 2, "grow beyond"),
        (lambda i: "${branches.b0.model_path}", "circle"),
        (lambda i: "${branches.${run.name}.model_path}", "holds another"),
    ],
    ids=["absolute", "relative", "resolver", "circle", "nested"],
)
def test_no_interpolation_grows_beyond_a_bound(
    value: Callable[[int], str], told: str, tmp_path: Path
) -> None:
    lines = prompt_lines(40, value) + "  b40: {model_path: ''}\n"
    with pytest.raises(ConfigError, match=rf"run\.yaml: branches\.b\d+\.model_path: .*{told}"):
        within(2.0, lambda: load_config(settings(tmp_path, lines)))


def test_interpolations_in_use_still_work(tmp_path: Path) -> None:
    path = settings(tmp_path, "  a: {model_path: 'm/${run.name}-${run.seed}/${.frozen}'}\n")
    config = load_config(path)
    assert config.branches["a"].model_path == "m/r-3/False"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert load_config(path, ["run.name=\\${a}"]).run.name == "${a}"


# ---- what is shown ---------------------------------------------------------------------------------------

EVIL = "a\x1b]0;title\x07\x1b[2Jb\r\x9bc\u202ed\udcff\u2028e"


def harmless(text: str) -> bool:
    return visible(text) == text and text.encode() != b""


def test_logs_show_what_they_do_not_send() -> None:
    place = RankPlace(rank=0, branch="text", branch_rank=0, branch_size=1)
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.LogRecord("copd_megatron.x", logging.ERROR, "f", 1, "%s", (EVIL,), sys.exc_info())
    for formatter in (RankFormatter(place), ConsoleFormatter(place)):
        text = formatter.format(record)
        assert harmless(text) and "\\x1b[2J" in text and text.count("\\u202e") == 2


def test_commands_show_what_they_do_not_send(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    assert harmless(capsys.readouterr().out)
    for arguments in (["report", f"{tmp_path}/a\x1b[2J"], ["\x1b[2J"], ["train", f"{tmp_path}/\x1b[2J.yaml"]):
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert harmless(told.err) and "\\x1b[2J" in told.err
    (tmp_path / "logs").mkdir()
    line = f"2026-01-31 12:00:00.000000 INFO    [text 0/1, rank 0] x: {EVIL!s}".replace("\udcff", "")
    (tmp_path / "logs" / "rank_00000.log").write_text(line.replace("\r", "").replace("\u2028", "") + "\n")
    assert main(["logs", str(tmp_path)]) == 0
    assert harmless(capsys.readouterr().out)


ENDS = {
    "main": "fail()",
    "thread": "thread = threading.Thread(target=fail, name=EVIL); thread.start(); thread.join()",
    "rank": "place = RankPlace(rank=0, branch='a', branch_rank=0, branch_size=1)\n"
    "start_logging(place, 'INFO', folder=None)\n"
    "fail()",
}
"""How an exception that nobody foresaw can end a process."""


@pytest.mark.parametrize("where", ENDS)
def test_tracebacks_show_what_they_do_not_send(where: str) -> None:
    script = (
        "import threading\n"
        "from copd_megatron.metrics.rank_log import RankPlace, start_logging\n"
        "from copd_megatron.untrusted.visible import show_tracebacks_visibly\n"
        f"EVIL = {EVIL!a}\nshow_tracebacks_visibly()\n"
        f"def fail():\n    raise ValueError(EVIL) from OSError(EVIL)\n{ENDS[where]}\n"
    )
    done = python("-c", script)
    assert "Traceback" in done.stderr and "\\x1b[2J" in done.stderr
    assert harmless(done.stderr)
    assert done.returncode == (where != "thread")


def test_every_command_shows_tracebacks_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    assert main(["--version"]) == 0
    assert sys.excepthook is show_traceback


def test_json_for_other_programs_keeps_its_value() -> None:
    line = json.dumps({"a": EVIL}, ensure_ascii=False)
    assert harmless(visible_json(line)) and json.loads(visible_json(line)) == {"a": EVIL}


# ---- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [normalize, _plain_letters, nfkc])
def test_combining_marks_are_sorted_in_time(read: Callable[[str], str]) -> None:
    within(5.0, lambda: read("e" + "\u0301\u0316" * 100_000))


def test_the_compatibility_form_is_unchanged_where_marks_are_few() -> None:
    import unicodedata

    for text in ("ﬁ²Å e\u0316\u0301 한", "a" + "\u0316\u0301" * 15, "x = ½", "plain"):
        assert nfkc(text) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize(
    "text", ["(x+y+z+w+v)**999", "(x+y)**500*(z+w)**500", "((x+y+1)**120)**2", "1/(x+y+z)**900"]
)
def test_no_formula_expands_beyond_a_bound(text: str) -> None:
    with pytest.raises(NotUnderstoodError, match="terms"):
        within(5.0, lambda: formula(text))


def test_formulas_in_use_still_work() -> None:
    x = sympy().Symbol("x")
    assert formula("(x + 1)**200") == (x + 1) ** 200
    assert is_evaluable((x + 1) ** 200 * (x + 2) ** 20)
    assert not is_evaluable((x + 1) ** 900 * (x + sympy().Symbol("y")) ** 900)


@pytest.mark.parametrize(
    "answer",
    [
        r"\binom{1000000}{500000}",
        r"\binom{10^9}{999 \cdot 999}",
        r"\binom{2^{30}}{\binom{30}{10}}",
        r"\prod_{n=1}^{10000000} n",
        "+".join(f"x_{{{number}}}" for number in range(400)),
        "+".join(rf"\sin({number}x)" for number in range(300)),
        "(" * 45 + "1" + ")" * 45,
        "|x|" * 400,
        "x^" * 1900 + "2",
        "x²³" * 1000,
    ],
    ids=range(10),
)
def test_no_answer_costs_the_parser_many_seconds(answer: str) -> None:
    for gold in ("2", "x+1"):
        assert within(5.0, lambda: math(rf"\boxed{{{answer}}}", gold, {})) == 0.0  # noqa: B023


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("252", r"\binom{10}{5}"),
        ("4999950000", r"\binom{100000}{2}"),
        ("120", r"\prod_{n=1}^{5} n"),
        ("x_{1}+x_{2}", "x_{2}+x_{1}"),
        ("3", "((((((((3))))))))"),
        ("|x-1|+|x+2|", "|x+2|+|x-1|"),
    ],
)
def test_answers_in_use_are_still_read(gold: str, answer: str) -> None:
    assert math(rf"\boxed{{{answer}}}", gold, {}) == 1.0


# ---- own media -------------------------------------------------------------------------------------------


def test_media_stay_in_their_folder_and_are_files(tmp_path: Path) -> None:
    outside, root = tmp_path / "secret.png", tmp_path / "media"
    root.mkdir()
    outside.write_bytes(b"x")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "here.png").mkdir()
    os.mkfifo(root / "pipe.png")
    with (root / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES[IMAGE] + 1)
    for name, told in (
        *((name, "leads out") for name in ("link.png", "folder/secret.png", "zero.png")),
        ("here.png", "directory"),
        ("pipe.png", "FIFO"),
        ("huge.png", "limit"),
        ("nothing.png", "cannot be read"),
    ):
        with pytest.raises(BadSampleError, match=told):
            within(2.0, lambda name=name: load_medium(MediaSource(kind=IMAGE, path=name), root, "here"))
    assert MAX_BYTES[VIDEO] > MAX_BYTES[IMAGE]


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert load_medium(MediaSource(kind=IMAGE, path="b.png"), tmp_path, "here")[0] == "png"


def test_a_compressed_shard_is_not_expanded_for_a_thumbnail(tmp_path: Path) -> None:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, format="PNG")
    data = picture.getvalue()
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for name, content in (("k.json", b"{}"), ("k.0.png", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    config = Config(branches={"text": BranchConfig()})
    config.branches["text"].data.train = [str(tmp_path / "s.tar")]
    medium = {"source": "text/train", "shard": "s", "key": "k", "extension": "0.png", "kind": "image"}
    medium["content_hash"] = content_hash(data)
    for content, seen in ((shard.getvalue(), True), (gzip.compress(shard.getvalue()), False), (b"x", False)):
        (tmp_path / "s.tar").write_bytes(content)
        assert (Thumbnails(config).uri(medium) is not None) == seen
