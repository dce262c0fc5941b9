"""The pages keep up with the code: the files, functions, commands, settings and messages they name exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from copd_megatron.cli.main import main
from copd_megatron.config import load_config
from copd_megatron.rewards import registry
from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "copd_megatron"
README = ROOT / "README.md"
MAP = PACKAGE / "README.md"
VERIFIERS = PACKAGE / "rewards/verifiers/README.md"
PAGES = [README, *sorted(PACKAGE.rglob("README.md"))]
ids = [page.relative_to(ROOT).as_posix() for page in PAGES]

_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"[\w./-]+\.(?:py|sh|yaml|toml)")
_FOLDER = re.compile(r"(?:copd_megatron|launchers|configs|tools|tests)/[\w/-]*")
_TOP_LEVEL = ("copd_megatron/", "launchers/", "configs/", "tools/", "tests/")
_NOT_OURS = ("my.yaml", "my_rewards.py", "run.yaml", "my_package/", "config.yaml")
"""The reader's own files, and those of a run."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return [body for name, body in _FENCE.findall(text_of(page)) if name == language]


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks, outside fenced blocks."""
    return _CODE.findall(_FENCE.sub("", text_of(page)))


def table(page: Path, heading: str) -> list[list[str]]:
    """The rows of the table whose header starts with ``heading``."""
    lines = text_of(page).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, f"{page}: the table {heading!r} has no rows"
    return rows


# ---- files, links, functions ------------------------------------------------------------------------------


def files_named(page: Path) -> Iterator[str]:
    """Files and folders of this repository that a page names."""
    shell = " ".join(blocks(page, "bash"))
    for text in [*inline_code(page), *shell.split()]:
        for word in text.split():
            if word.startswith(_NOT_OURS) or "<" in word:
                continue
            if _FILE.fullmatch(word) or (_FOLDER.fullmatch(word) and word.startswith(_TOP_LEVEL)):
                yield word


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_pages_name_exist(page: Path) -> None:
    names = set(files_named(page))
    assert names
    missing = [
        name for name in names if not any((base / name).exists() for base in (page.parent, PACKAGE, ROOT))
    ]
    assert not missing, f"{page.relative_to(ROOT)} names what does not exist: {missing}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", text_of(page))):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target), (
                f"{page.relative_to(ROOT)}: {link} is no heading of {target.name}"
            )


def test_the_readmes_pages_are_linked() -> None:
    """Whoever opens the README finds every page."""
    reached: set[Path] = set()
    pending = [README]
    while pending:
        page = pending.pop()
        if page not in reached:
            reached.add(page)
            targets = [link.partition("#")[0] for link in _LINK.findall(text_of(page))]
            pending += [(page.parent / t).resolve() for t in targets if t.endswith("README.md")]
    assert reached == set(PAGES)


@cache
def functions_of(path: Path) -> set[str]:
    """Functions, methods and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_functions_named_beside_a_file_are_there(page: Path) -> None:
    """In a table row that names Python files and then functions, the files define the functions."""
    for line in text_of(page).splitlines():
        words = _CODE.findall(line)
        paths = [word for word in words if re.fullmatch(r"[\w./]+\.py", word)]
        names = [word for word in words if re.fullmatch(r"[a-z_]+", word) and "." not in word]
        if not line.startswith("|") or not paths or page == VERIFIERS:
            continue
        found = [base / p for p in paths for base in (page.parent, PACKAGE, ROOT) if (base / p).is_file()]
        defined = set().union(*(functions_of(path) for path in found)) | {path.stem for path in found}
        last_cell = _CODE.findall(line.strip("|").rsplit("|", 1)[-1])
        wanted = [name for name in names if name in last_cell]
        assert set(wanted) <= defined, f"{page.relative_to(ROOT)}: {line}"


def test_the_map_says_what_rooms_may_import() -> None:
    rows = {row[0].strip("`"): row[2] for row in table(MAP, "room") if "," not in row[0]}
    expected = {room: ", ".join(sorted(below)) or "nothing" for room, below in MAY_IMPORT.items()}
    assert rows == expected


def test_the_map_knows_every_room() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    named = {name for row in table(MAP, "room") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == rooms | modules


# ---- commands and settings --------------------------------------------------------------------------------


def commands_of(page: Path) -> list[str]:
    """Every ``copd ...`` of a page: lines of shell blocks, without comments, and inline code."""
    lines = [line for body in blocks(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    lines += inline_code(page)
    found = (re.search(r"^(?:PYTHONPATH=\S+ |srun (?:-\S+ )*)?(copd [a-z-].*)", line) for line in lines)
    return sorted({match[1].partition("  #")[0].strip() for match in found if match})


@cache
def help_of(path: tuple[str, ...]) -> str:
    """What ``copd <path> --help`` prints."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main([*path, "--help"])
        except SystemExit as end:
            status = int(end.code or 0)
    assert status == 0, f"copd {' '.join(path)} --help: {out.getvalue()}"
    return out.getvalue()


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_commands_of_the_pages_exist_with_their_options(page: Path, command: str) -> None:
    _, *words = shlex.split(command)
    depth = 2 if words[0] in ("data", "checkpoint") and not words[1].startswith("-") else 1
    shown = help_of(tuple(words[:depth])) if not words[0].startswith("-") else help_of(())
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        assert option in shown, f"{page.name}: {command}: no option {option}"


@pytest.mark.parametrize(
    ("page", "command"),
    [c for c in COMMANDS if c[1].startswith("copd train")],
    ids=lambda value: str(value)[-60:],
)
def test_settings_in_training_commands_are_settings(page: Path, command: str) -> None:
    """Overrides fit the schema, on top of the quickstart's configuration."""
    overrides = [word for word in shlex.split(command) if re.match(r"[a-z_.]+=", word)]
    overrides = [word for word in overrides if "my_package" not in word and "branches.mine" not in word]
    load_config(ROOT / "configs/three_branch_tiny.yaml", overrides)


def test_the_branch_of_the_readme_is_a_branch(tmp_path: Path) -> None:
    (section,) = blocks(README, "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text("model: {path: models/some}\n" + section)
    config = load_config(path)
    assert config.branches["mine"].reward.verifiers == ["math"]


SECTIONS = {
    *(
        "advantage",
        "branches",
        "checkpoint",
        "data",
        "evaluation",
        "logging",
        "loss",
        "media",
        "native",
        "opd",
    ),
    *("optimizer", "parallel", "profiling", "reward", "rollout", "run", "schedule", "training"),
}


def setting_names() -> set[str]:
    """Dotted names of all settings, those of a branch also without ``branches.<name>``."""
    import dataclasses
    import typing

    from copd_megatron.config import schema

    found: set[str] = set()

    def visit(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            name = f"{prefix}{item.name}"
            found.add(name)
            if dataclasses.is_dataclass(hints[item.name]):
                visit(hints[item.name], f"{name}.")

    visit(schema.Config, "")
    visit(schema.BranchConfig, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_settings_that_pages_name_exist(page: Path) -> None:
    known = setting_names()
    for code in inline_code(page):
        name = code.partition("=")[0]
        if name.partition(".")[0] in SECTIONS and re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name):
            if name.endswith((".py", ".txt")):
                continue
            assert name in known, f"{page.relative_to(ROOT)}: there is no setting {name}"


# ---- messages ---------------------------------------------------------------------------------------------


@cache
def messages() -> str:
    """All text of the package and the launchers, string literals put together as Python does."""
    parts = [path.read_text(encoding="utf-8") for path in (ROOT / "launchers").glob("*.sh")]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_messages_of_the_troubleshooting_table_are_the_codes_own() -> None:
    rows = table(README, "you see")
    assert len(rows) >= 10
    for seen, _ in rows:
        for message in _CODE.findall(seen):
            if message == "copd: command not found":  # the shell's
                continue
            for fragment in re.split(r"\.\.\.\??", message):
                wanted = fragment.strip(" :;,`")
                assert len(wanted) < 3 or wanted in messages(), f"nothing says {wanted!r}"


# ---- verifiers --------------------------------------------------------------------------------------------


def test_the_example_verifier_works() -> None:
    example, _ = blocks(VERIFIERS, "python")
    names: dict[str, object] = {}
    exec(compile(example, str(VERIFIERS), "exec"), names)
    verify = names["length_of"]
    assert callable(verify)
    assert verify("I think.\nAnswer: nine", "four", {}) == 1.0
    assert verify("Answer: seven", "four", {}) == 0.0


def test_the_page_lists_the_built_in_verifiers() -> None:
    listed = [row[0].strip("`") for row in table(VERIFIERS, "name")]
    built_in = sorted(path.stem for path in VERIFIERS.parent.glob("*.py") if path.stem != "__init__")
    assert sorted(listed) == built_in
    registry.resolve(listed)
