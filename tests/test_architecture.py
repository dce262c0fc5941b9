"""Which room may import which: read off the source, so that a forgotten branch of the code counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from copd_megatron.cli.main import MODULES as COMMANDS
from copd_megatron.config import load_config, validate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "copd_megatron"

MAY_IMPORT: dict[str, set[str]] = {
    # ground floor: what everybody shares
    "errors": set(),
    "plugins": {"errors"},
    "records": set(),
    "model": set(),
    "untrusted": set(),
    # settings, files of models, pure functions
    "hf": {"errors", "model", "untrusted"},
    "config": {"errors", "hf", "model", "plugins", "untrusted"},
    "objectives": {"config", "errors", "records"},
    "rewards": {"config", "errors", "records", "untrusted"},
    "metrics": {"config", "errors", "untrusted"},
    "topology": {"config", "errors", "untrusted"},
    "planner": {"config", "errors", "model", "records", "untrusted"},
    # what a branch is made of
    "data": {"config", "errors", "model", "records", "rewards", "untrusted"},
    "samples": {"config", "data", "errors", "records", "rewards", "untrusted"},
    "opd": {"config", "errors", "records", "topology", "untrusted"},
    "policy": {"config", "errors", "hf", "model", "objectives", "records", "topology"},
    "rollout": {"config", "data", "errors", "records", "topology"},
    "weight_sync": {"config", "errors", "hf", "model", "policy", "rollout"},
    "checkpoint": {"config", "errors", "policy", "topology", "untrusted"},
    # weights outside a job, and what is told of a run
    "formats": {"checkpoint", "hf", "model", "untrusted"},
    "evaluation": {
        *("config", "data", "errors", "formats", "hf", "metrics", "model", "policy", "records", "rewards"),
        *("rollout", "topology", "untrusted"),
    },
    "merge": {"checkpoint", "config", "errors", "formats", "hf", "model", "untrusted"},
    "report": {
        *("config", "data", "errors", "evaluation", "formats", "hf", "launch", "merge", "metrics"),
        *("planner", "samples", "untrusted"),
    },
    "tiny": {"config", "data", "errors", "policy", "rewards", "untrusted"},
    # before the ranks start
    "launch": {
        *("checkpoint", "config", "data", "errors", "metrics", "model", "planner", "rewards", "topology"),
        "untrusted",
    },
    # what a step consists of
    "recipes": {"branch", "config", "errors", "plugins"},
    # the paper's comparison, made of whole runs
    "reproduction": {
        *("config", "data", "errors", "evaluation", "recipes", "report", "tiny", "topology", "untrusted"),
    },
    # what a process holds and does
    "branch": {
        "plugins",
        *("checkpoint", "config", "data", "errors", "evaluation", "hf", "launch", "merge", "metrics"),
        *("model", "objectives", "opd", "policy", "records", "report", "rewards", "rollout", "topology"),
        *("samples", "untrusted", "weight_sync"),
    },
}
"""Room to the other rooms it builds on. A room not named here (the loop, the command line) may use all, and
none of these may use it."""

ONLY_IN: dict[str, set[str]] = {
    "megatron": {"policy", "weight_sync", "checkpoint"},
    "vllm": {"rollout", "weight_sync"},
    "transformer_engine": {"policy"},
    "safetensors": {"hf"},
}
"""Engine, or file format, to the rooms that may import it."""

WITHOUT_TORCH = [
    "copd_megatron.errors",
    "copd_megatron.config",
    "copd_megatron.model.shape",
    "copd_megatron.model.slots",
    "copd_megatron.model.fused",
    "copd_megatron.model.places",
    "copd_megatron.hf.companions",
    "copd_megatron.hf.model_config",
    "copd_megatron.hf.appear",
    "copd_megatron.records",
    "copd_megatron.objectives.denominators",
    "copd_megatron.objectives.mismatch",
    "copd_megatron.plugins",
    "copd_megatron.recipes.experiments.base",
    "copd_megatron.recipes.experiments.copd",
    "copd_megatron.recipes.experiments.opd",
    "copd_megatron.recipes.experiments.experts_mean",
    "copd_megatron.recipes.experiments.mixed",
    "copd_megatron.config.graph",
    "copd_megatron.opd.plan",
    "copd_megatron.topology.layout",
    "copd_megatron.planner.memory",
    "copd_megatron.planner.disk",
    "copd_megatron.planner.traffic",
    "copd_megatron.planner.search",
    "copd_megatron.planner.calibrate",
    "copd_megatron.planner.show",
    "copd_megatron.branch.schedule",
    "copd_megatron.launch.placement",
    "copd_megatron.launch.switches",
    "copd_megatron.topology.who_waits",
    "copd_megatron.topology.slurm",
    "copd_megatron.launch.slurm",
    "copd_megatron.launch.preflight",
    "copd_megatron.metrics.packages",
    "copd_megatron.metrics.rank_log",
    "copd_megatron.metrics.timeline",
    "copd_megatron.merge.flags",
    "copd_megatron.launch.run_dir",
    "copd_megatron.launch.dry_run",
    "copd_megatron.launch.doctor",
    "copd_megatron.launch.torchrun",
    "copd_megatron.launch.rank_process",
    "copd_megatron.cli.main",
    *COMMANDS.values(),
]
HEAVY = ("torch", "vllm", "megatron", "transformers")


@dataclass(frozen=True)
class Import:
    file: str
    """Relative to the package."""
    line: int
    module: str

    @property
    def room(self) -> str:
        """Where it stands."""
        return self.file.split("/")[0].removesuffix(".py")

    @property
    def target_room(self) -> str | None:
        """The room of ours that it names; None for other packages."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "copd_megatron" and len(parts) > 1 else None

    def __str__(self) -> str:
        return f"copd_megatron/{self.file}:{self.line} imports {self.module}"


def imports_of(file: str, source: str) -> Iterator[Import]:
    """Every import, in functions as well; not those for type checkers only."""
    package = ["copd_megatron", *Path(file).parent.parts]
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            base = (prefix + (node.module or "")).rstrip(".")
            if base == "copd_megatron":
                for alias in node.names:
                    yield Import(file, node.lineno, f"{base}.{alias.name}")
            else:
                yield Import(file, node.lineno, base)
        pending.extend(ast.iter_child_nodes(node))


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        found.extend(imports_of(name, path.read_text(encoding="utf-8")))
    assert len(found) > 50
    return found


def breaks_direction(found: Import) -> bool:
    """A room that builds on a room it may not know."""
    allowed, target = MAY_IMPORT.get(found.room), found.target_room
    if allowed is None or target is None or target == found.room or target.startswith("__"):
        return False
    return target not in allowed


def breaks_engines(found: Import) -> bool:
    rooms = ONLY_IN.get(found.module.split(".")[0])
    return rooms is not None and found.room not in rooms


def test_rooms_build_only_on_the_rooms_below() -> None:
    broken = [str(found) for found in all_imports() if breaks_direction(found)]
    assert not broken, "\n".join(broken)


def test_engines_are_imported_only_in_their_rooms() -> None:
    broken = [str(found) for found in all_imports() if breaks_engines(found)]
    assert not broken, "\n".join(broken)


def test_the_rules_have_no_circle() -> None:
    order: list[str] = []
    waiting = {room: set(below) for room, below in MAY_IMPORT.items()}
    while waiting:
        free = sorted(room for room, below in waiting.items() if below <= set(order))
        assert free, f"these rooms import each other in a circle: {waiting}"
        order.extend(free)
        for room in free:
            del waiting[room]


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("objectives/grpo.py", "import megatron.core", "engine"),
        ("opd/router.py", "def f():\n    from vllm import LLM", "engine"),
        ("weight_sync/export.py", "from safetensors.torch import save_file", "engine"),
        ("data/stream.py", "from copd_megatron.policy.actor import Actor", "direction"),
        ("data/stream.py", "from ..policy.actor import Actor", "direction"),
        ("records.py", "from copd_megatron import config", "direction"),
        ("rewards/grader.py", "from copd_megatron.train import main", "direction"),
        ("policy/actor.py", "from megatron.core import tensor_parallel", None),
        ("objectives/grpo.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm", None),
        ("opd/router.py", "from copd_megatron.opd.plan import Plan\nfrom .graph import Graph", None),
        ("train.py", "from copd_megatron.policy import actor", None),
    ],
)
def test_the_rules_see_what_they_should(file: str, source: str, expected: str | None) -> None:
    found = list(imports_of(file, source))
    broken = {"engine" for i in found if breaks_engines(i)} | {
        "direction" for i in found if breaks_direction(i)
    }
    assert broken == ({expected} if expected else set())


SOURCES = sorted(
    path for top in ("copd_megatron", "launchers", "tools", "tests") for path in (ROOT / top).rglob("*.py")
)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ROOT_MODULES = 600, 100, 6


def test_files_and_functions_fit_a_readers_head() -> None:
    too_long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            too_long.append(f"{name} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{name}:{node.lineno} {node.name} has {lines} lines")
    assert not too_long, too_long


MAY_WRITE_NAN: dict[str, str] = {
    "topology/messages.py": "from rank to rank, which read it with json.loads",
    "rewards/": "what a verifier returns, which the grader judges",
    "hf/companions.py": "somebody's config.json, whose infinities are its own",
    "evaluation/models.py": "a digest of the same",
    "merge/merger.py": "a digest",
    "data/convert/": "answers as text",
    "cli/data/make_visual.py": "defaults in a help text",
}
"""Files or rooms whose JSON may hold NaN, which ``untrusted/json_text.py`` does not read, and why."""


def test_no_file_is_written_that_its_reader_refuses() -> None:
    """Everything else is written by ``dumped``, which has null for NaN, or refuses it."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            writes = isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")
            if not writes or name.startswith(tuple(MAY_WRITE_NAN)):
                continue
            assert isinstance(node, ast.Call)
            if not any(ast.unparse(k) == "allow_nan=False" for k in node.keywords):
                found.append(f"{name}:{node.lineno}")
    assert not found, f"these may write NaN: {found}"


def test_the_root_holds_the_front_door_only() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_MODULES
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - set(MAY_IMPORT) == {"cli"}, "every room but the command line says what it may import"


def test_light_modules_leave_torch_and_the_engines_alone() -> None:
    script = "\n".join(
        [
            "import importlib, sys",
            f"for name in {WITHOUT_TORCH!r}:",
            "    importlib.import_module(name)",
            f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]",
            "    if heavy: sys.exit(f'{name} imports {heavy}')",
        ]
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


# Merge recipes are no runs; tests/test_merge_recipe.py reads them.
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "merge")


def test_there_are_configs() -> None:
    assert ROOT / "configs" / "two_branch_tiny.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses_and_validates(path: Path) -> None:
    config = load_config(path)
    validate(config, sum(branch.parallel.world_size for branch in config.branches.values()), None)
