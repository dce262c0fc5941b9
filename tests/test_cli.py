"""The ``copd`` command as a whole: help, examples, version, completion, exit statuses, and the scripts in
tools that are other names for its commands."""

from __future__ import annotations

import argparse
import ast
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from copd_megatron import __version__
from copd_megatron.checkpoint.manifest import CheckpointError
from copd_megatron.cli import main as cli
from copd_megatron.cli.group import Command, LazyGroup
from copd_megatron.cli.main import main
from copd_megatron.cli.parameters import Finite
from copd_megatron.config import load_config
from copd_megatron.data.pass_rates import PassRateWriter, read_pass_rates
from copd_megatron.data.shards import ShardSet
from copd_megatron.errors import EXIT_HOPELESS, ConfigError, DataError, DivergedError, RunStorageError
from copd_megatron.untrusted.whole_file import write_whole
from tests.support.shards import write
from tests.support.watched_copd import watched_copd

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {
    "convert_dataset": ("data", "convert"),
    "convert_hf_to_megatron": ("checkpoint", "to-megatron"),
    "convert_megatron_to_hf": ("checkpoint", "to-hf"),
    "inspect_checkpoint": ("checkpoint", "inspect"),
    "jsonl_to_shards": ("data", "jsonl-to-shards"),
    "make_text_data": ("data", "make-text"),
    "make_tiny_base": ("tiny-base",),
    "make_visual_data": ("data", "make-visual"),
    "merge_branches": ("merge",),
}


def commands(group: click.Group = cli.copd, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group, the top one included."""
    yield path
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if isinstance(found, click.Group):
            yield from commands(found, (*path, name))
        else:
            yield (*path, name)


COMMANDS = list(commands())


def command_of(path: tuple[str, ...]) -> click.Command:
    found: click.Command = cli.copd
    for name in path:
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), name)
        assert inner is not None
        found = inner
    return found


# --- help -------------------------------------------------------------------------------------------------


def test_there_are_the_commands_that_there_should_be() -> None:
    assert {" ".join(path) for path in COMMANDS} >= {
        *("train", "eval", "merge", "report", "logs", "timeline", "doctor", "completion", "tiny-base"),
        *("data jsonl-to-shards", "data convert", "data make-text", "data make-visual"),
        *("checkpoint inspect", "checkpoint to-hf", "checkpoint to-megatron"),
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_describes_and_gives_examples(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert re.match(rf"Usage: copd {' '.join(path)}", shown.out)
    summary = command_of(path).get_short_help_str(limit=200)
    assert summary.endswith((".", "vLLM")) and len(summary) <= 60, "one short sentence in the list"
    _, _, examples = shown.out.partition("\nExamples:\n")
    assert re.search(rf"\bcopd.* {path[-1] if path else 'train'} ?", examples), (
        "an example of this very command"
    )


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_has_a_text(path: tuple[str, ...]) -> None:
    own_name = re.compile(r"--(answer|verifier|metadata)-field")  # the name says it all
    silent = [
        option.opts[0]
        for option in command_of(path).params
        if isinstance(option, click.Option) and not option.help and not own_name.fullmatch(option.opts[0])
    ]
    assert silent == []


NUMBERS = [
    pytest.param(option, id=" ".join([*path, option.opts[0]]))
    for path in COMMANDS
    for option in command_of(path).params
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
]


@pytest.mark.parametrize("option", NUMBERS)
def test_every_number_has_a_range_and_is_finite(option: click.Option) -> None:
    """Refused with the option's name and a range or a kind; what it takes is no more than 64 bits hold."""
    context = click.Context(click.Command("it", params=[option]))
    for text in ("nan", "inf", "-inf", "1e999", "9" * 400, "-" + "9" * 400, "x", ""):
        with pytest.raises(click.BadParameter, match=r"range|finite|valid") as raised:
            option.type_cast_value(context, (text,) if option.multiple else text)
        assert option.opts[0] in raised.value.format_message()
    assert isinstance(option.type, click.IntRange | Finite)
    assert not isinstance(option.type, click.IntRange) or (option.type.max or 2**64) < 2**63


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_number_of_a_tool_has_a_range(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    options = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    kinds = {ast.unparse(word.value) for call in options for word in call.keywords if word.arg == "type"}
    assert kinds <= {"Path", "count", "count_or_none", "amount"}


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e999", "9" * 400, "x", "", "-0.5"])
def test_numbers_of_tools(text: str) -> None:
    from _numbers import amount, count, count_or_none

    for kind in (amount, count, count_or_none):
        with pytest.raises(argparse.ArgumentTypeError, match=r"at least|from"):
            kind(text)
    assert (amount("0"), amount("2.5"), count("1"), count_or_none("0")) == (0.0, 2.5, 1, 0)
    with pytest.raises(argparse.ArgumentTypeError):
        count("0")


def examples() -> list[str]:
    """Every shell line of every help that calls ``copd``, continued lines joined."""
    found = set()
    for path in COMMANDS:
        command = command_of(path)
        assert isinstance(command, Command | LazyGroup)
        for line in re.sub(r"\\\n\s*", "", command.examples).splitlines():
            shell, *_explanation = re.split(r" {3,}", line.strip())
            if match := re.match(r"(?:srun --ntasks=\d+ )?copd (.*)", shell):
                found.add(match[1])
    return sorted(found)


@pytest.mark.parametrize("example", examples())
def test_examples_are_right(example: str) -> None:
    """The command is there and takes these words: parsed as a shell and ``copd`` would, not run."""
    words = shlex.split(re.split(r" [|>] ", example)[0])
    found: click.Command = cli.copd
    used = 0
    while isinstance(found, click.Group):
        inner = found.get_command(click.Context(found), words[used])
        assert inner is not None, example
        found, used = inner, used + 1
    try:
        context = found.make_context(found.name, words[used:])
    except click.exceptions.Exit as end:
        assert end.exit_code == 0
        return
    config = context.params.get("config")
    if config is not None and Path(ROOT, str(config)).exists():
        words = context.params.get("overrides") or context.params.get("words", ())
        load_config(ROOT / str(config), [word for word in words if "=" in word])


def test_help_and_version_are_there_at_once() -> None:
    for words in (["--help"], ["data", "--help"], ["checkpoint", "inspect", "--help"], ["--version"]):
        answer = watched_copd(*words)
        assert (answer.status, answer.stderr, answer.modules) == (0, "", set()), words


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"copd {__version__}\n"


# --- how a command ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logz"], "No such command 'logz'"),
        (["train"], "Missing argument 'CONFIG'. Try: copd train --help"),
        (["train", "a.yaml", "--dry-rn"], "Did you mean '--dry-run'?"),
        (["merge", "a", "--shard-size", "5X"], "'--shard-size': '5X' is not a size; write 500MB or 2GiB"),
        (["data", "convert", "a.json", "--layout", "nope"], "'nope' is not one of 'mmfinereason'"),
        (["data", "jsonl-to-shards", "a", "--out", "b", "--name", "c", "--shard-size", "0"], "1<=x"),
        (["logs", "run", "--level", "LOUD"], "'--level': 'LOUD' is not one of"),
        (["timeline", "run", "--steps", "x"], "--steps x: write 3, or 3-5. Try: copd timeline --help"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err and shown.err.startswith("copd: ") and shown.err.count("\n") == 1


def test_overrides_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("{}")
    for words in (
        ["train", path, "a.b=1", "--dry-run"],
        ["train", path, "--dry-run", "a.b=1"],
        ["train", "--dry-run", path, "a.b=1"],
        ["eval", path, "model", "a.b=1"],
    ):
        assert main([*map(str, words)]) == 2
        assert "override 'a.b=1'" in capsys.readouterr().err


def test_an_override_of_a_negative_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    assert main(["train", str(tmp_path / "empty.yaml"), "nope=-1"]) == 2
    assert "override 'nope=-1'" in capsys.readouterr().err


def _fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("fails")
    def command() -> int:
        raise error

    monkeypatch.setattr(cli.copd, "_modules", {"fails": "tests.fails"})
    monkeypatch.setitem(sys.modules, "tests.fails", type(sys)("tests.fails"))
    monkeypatch.setattr(sys.modules["tests.fails"], "command", command, raising=False)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("a setting; the remedy"), 2, "copd: a setting; the remedy\n"),
        (FileNotFoundError("no such thing; give another"), 2, "copd: no such thing; give another\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "copd: /x/y: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", "/x"), 2, "copd: /x: Is a directory\n"),
        (
            OSError(28, "full", "/x/y"),
            1,
            "copd: /x/y: full; free some room there, or write to another folder\n",
        ),
        (OSError(30, "Read-only", "/x"), 1, "copd: /x: Read-only; write to another folder\n"),
        (CheckpointError("x is damaged"), 1, "copd: x is damaged\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_told_and_have_their_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _fail_with(error, monkeypatch)
    assert main(["fails"]) == status
    assert capsys.readouterr().err == message


def test_a_command_that_was_a_world_of_its_own_is_no_rank_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command("fails")
    def command() -> int:
        from copd_megatron.topology.single import single_process

        with single_process():
            assert os.environ["RANK"] == "0"
            raise OSError(28, "No space left on device", "/x/verdicts.jsonl")

    _fail_with(OSError(), monkeypatch)
    monkeypatch.setattr(sys.modules["tests.fails"], "command", command)
    before = set(os.environ)
    assert main(["fails"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("copd: /x/verdicts.jsonl: No space left on device; free") and said.count("\n") == 1
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & (set(os.environ) - before)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """An error of an open file says nothing of which one it is."""
    shards = ShardSet.open([write(tmp_path, 3)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = PassRateWriter(tmp_path / "rates.jsonl", {"num_samples": 1}, shards, "toy")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with writer, pytest.raises(OSError, match="File too large") as raised:
            writer.append({"prompt": f"{i}", "num_correct": 1, "num_samples": 1} for i in range(200))
        assert raised.value.filename == str(tmp_path / "rates.jsonl")
        with pytest.raises(OSError, match="File too large") as raised:
            write_whole(tmp_path / "table.json", b"x" * 8192)
        assert raised.value.filename == str(tmp_path / "table.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not read_pass_rates(tmp_path / "rates.jsonl").num_correct, "whole or not at all"
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("variable", ["RANK", "COPD_TRACEBACK"])
@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError(5, "x")])
def test_a_rank_gives_its_traceback(
    variable: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    _fail_with(error, monkeypatch)
    with pytest.raises(type(error)):
        main(["fails"])


def test_ctrl_c_needs_no_traceback_of_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_with(KeyboardInterrupt(), monkeypatch)
    monkeypatch.setenv("RANK", "1")
    assert main(["fails"]) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("COPD_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        main(["fails"])


def test_a_rank_that_a_restart_cannot_mend_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its traceback, and the status that no launcher restarts."""
    monkeypatch.setenv("RANK", "1")
    for error in (
        *(ConfigError("run.seed: no"), DataError("no shards"), DivergedError("too many")),
        *(CheckpointError("all are damaged"), RunStorageError("no metrics"), OSError(28, "disk full")),
    ):
        _fail_with(error, monkeypatch)
        assert main(["fails"]) == EXIT_HOPELESS
        said = capsys.readouterr().err
        assert "Traceback" in said and str(error) in said


def test_what_nobody_expected_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(KeyError("a fault of ours"), monkeypatch)
    with pytest.raises(KeyError):
        main(["fails"])


# --- logs -------------------------------------------------------------------------------------------------


def _write_log(run_dir: Path, rank: int, branch: str, num_lines: int = 1) -> None:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    line = f"2026-01-31 12:00:00.000000 INFO    [{branch} 0/1, rank {rank}] copd.test: said\n"
    (run_dir / "logs" / f"rank_{rank:05d}.log").write_text(line * num_lines)


def test_logs_of_an_unknown_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_log(tmp_path, 0, "text")
    _write_log(tmp_path, 1, "image", num_lines=0)
    assert main(["logs", str(tmp_path), "--branch", "image"]) == 0, "a rank that has not spoken may be of any"
    (tmp_path / "config.yaml").write_text("branches: {text: {}, image: {}}")
    assert main(["logs", str(tmp_path), "--branch", "image"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["logs", str(tmp_path), "--branch", "nope"]) == 2
    assert capsys.readouterr().err == f"copd: --branch nope: {tmp_path} has the branches text, image\n"


def test_a_reader_may_leave(tmp_path: Path) -> None:
    _write_log(tmp_path, 0, "text", num_lines=20_000)
    command = f"{shlex.quote(sys.executable)} -m copd_megatron.cli logs {shlex.quote(str(tmp_path))}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


def test_a_reader_that_has_left_keeps_no_command_from_its_work(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": "a", "verifier": "exact"}\n')
    words = ["data", "jsonl-to-shards", "a.jsonl", "--out", "out", "--name", "n", "--no-check-golds"]
    command = f"{shlex.quote(sys.executable)} -m copd_megatron.cli {shlex.join(words)}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0\n" and done.stderr == ""
    assert (tmp_path / "out/n-train-000000.tar").exists()


# --- completion -------------------------------------------------------------------------------------------


@pytest.fixture
def shell_path(tmp_path: Path) -> str:
    """A PATH on which ``copd`` is this tree's."""
    script = tmp_path / "bin" / "copd"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m copd_megatron.cli "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["copd", "me"], ["merge"]),
        (
            ["copd", "data", ""],
            ["jsonl-to-shards", "convert", "benchmark", "make-text", "make-visual", "difficulty"],
        ),
        (["copd", "checkpoint", "to-hf", "--mo"], ["--model"]),
        (["copd", "merge", "a", "--method", "dare"], ["dare_linear", "dare_ties"]),
    ],
)
def test_bash_completes(shell_path: str, typed: list[str], expected: list[str]) -> None:
    """A real bash, with the script that the command prints."""
    words = " ".join(map(shlex.quote, typed))
    script = (
        'eval "$(copd completion bash)"\n'
        f"COMP_WORDS=({words}) COMP_CWORD={len(typed) - 1}\n"
        'function=$(complete -p copd | sed "s/.*-F \\([^ ]*\\).*/\\1/")\n'
        '"$function" copd\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PATH": shell_path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"_COPD_COMPLETE={shell}_complete" in capsys.readouterr().out


# --- scripts in tools -------------------------------------------------------------------------------------


def test_scripts_are_names_and_nothing_more() -> None:
    for name in TOOLS:
        text = (ROOT / "tools" / f"{name}.py").read_text()
        assert len(text.splitlines()) < 10 and "sys.path" not in text, name


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_a_script_is_its_command_from_a_bare_tree(name: str, tmp_path: Path) -> None:
    """Without the package on the path, from another folder; the code is that of the script's own tree."""
    tree = tmp_path / "a tree"
    shutil.copytree(ROOT / "tools", tree / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "copd_megatron").mkdir()
    (tree / "copd_megatron" / "__init__.py").write_text("")
    (tree / "copd_megatron" / "cli").mkdir()
    (tree / "copd_megatron" / "cli" / "__init__.py").write_text("")
    (tree / "copd_megatron" / "cli" / "main.py").write_text(
        "def main(words):\n    print(*words, sep='|')\n    return 7\n"
    )
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(tree / "tools" / f"{name}.py"), "--help", "a b"],
        cwd=tmp_path,
        env=bare,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == "|".join([*TOOLS[name], "--help", "a b"]) + "\n"
