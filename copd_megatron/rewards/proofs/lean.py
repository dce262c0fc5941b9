"""Lean 4: the files of a proof, the commands that compile them, and what they say.

``COPD_LEAN`` in the environment names the ``lean`` to run (default: the one on the path), and ``LEAN_PATH``
the folders of compiled libraries such as Mathlib, which the sandbox may then read. ``COPD_LEAN_CHECKER``
names a program that replays compiled files through Lean's kernel (``leanchecker``, ``lean4checker``): what
Lean's elaborator accepts may have been put into the environment past the kernel. All belong to the machine,
and so are no settings of a sample.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.rewards import sandbox
from copd_megatron.rewards.fenced import last_block
from copd_megatron.rewards.proofs.compiler import Compiler, Files, check
from copd_megatron.rewards.proofs.lean_words import check_proof_words
from copd_megatron.rewards.proofs.statement import RejectedError, Statement
from copd_megatron.rewards.sandbox.limits import MIB

VARIABLE = "COPD_LEAN"
CHECKER = "COPD_LEAN_CHECKER"
UNCHECKED = "none"
"""Of ``COPD_LEAN_CHECKER``: proofs are not replayed."""
_CHECKERS = ("leanchecker", "lean4checker")
STANDARD_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})
"""Axioms of Lean's own logic, on which nearly every proof rests."""
_LANGUAGES = frozenset({"", "lean", "lean4"})
_MAX_CHARACTERS = 50_000
_ADDRESS_BYTES = 32 * 1024 * MIB
"""Address space; Lean maps whole libraries into it."""
_MEMORY_BYTES = 8 * 1024 * MIB
_COMMENT = re.compile(r"/-|-/|--[^\n]*")
_STATED = re.compile(r"\A\s*(?:theorem|lemma|example)\s+(?P<name>[\w.']+).*?:=\s*by\b", re.DOTALL)
_DEPENDS = re.compile(r"'copdCheck' depends on axioms: \[(?P<names>[^\]]*)\]\s*")
_CLOSED = "'copdCheck' does not depend on any axioms"


@dataclass(frozen=True)
class Toolchain:
    """An installed Lean 4."""

    lean: str
    prefix: str
    """The folder of the toolchain: programs, and the core library."""
    path: tuple[str, ...]
    """Folders of further compiled libraries."""
    checker: str | None
    """Program that replays compiled files through the kernel; None: the user does without."""

    @property
    def mounts(self) -> tuple[str, ...]:
        """What the sandbox may read."""
        return (self.prefix, *self.path, *([self.checker] if self.checker else []))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its commands."""
        return {"HOME": ".", "LEAN_PATH": os.pathsep.join([".", *self.path])}


@functools.cache
def toolchain() -> Toolchain | None:
    """The Lean that ``COPD_LEAN`` names, or that is on the path; None where there is none, or nothing that
    replays its proofs. A program that chooses among toolchains (elan) is asked which one it takes."""
    found = _found()
    if found is None or (found.checker is None and os.environ.get(CHECKER) != UNCHECKED):
        return None
    return found


def problem() -> str:
    """What is missing, in words, where ``toolchain`` finds nothing."""
    if _found() is None:
        return f"Lean is not installed: set {VARIABLE} to its path"
    return (
        f"Lean is installed, but no program that replays its proofs through the kernel: set {CHECKER} to the "
        f"path of leanchecker or lean4checker, or to {UNCHECKED!r} if a proof need not be checked again"
    )


def _found() -> Toolchain | None:
    command = shutil.which(os.environ.get(VARIABLE) or "lean")
    if command is None:
        return None
    found = subprocess.run(
        [command, "--print-prefix"], capture_output=True, text=True, timeout=60, check=False
    )
    prefix = Path(found.stdout.strip() or "/nowhere")
    lean = prefix / "bin" / "lean"
    if not lean.is_file():
        return None
    listed = os.environ.get("LEAN_PATH", "").split(os.pathsep)
    path = tuple(folder for folder in listed if Path(folder).is_absolute())
    return Toolchain(str(lean), str(prefix), path, _checker(prefix))


def _checker(prefix: Path) -> str | None:
    named = os.environ.get(CHECKER)
    if named:
        return None if named == UNCHECKED else shutil.which(named)
    beside = [str(prefix / "bin" / name) for name in _CHECKERS]
    return next((found for name in (*beside, *_CHECKERS) if (found := shutil.which(name))), None)


def judge(statement: Statement, response: str, *, seconds: float) -> None:
    """Checks the proof that a response holds, in three runs of so many seconds of CPU time.

    Raises RejectedError where the response holds no proof of the statement, and as ``compiler.check``.
    """
    body = read_body(response, statement.name)
    files = Files(
        given=_given(statement),
        candidate=_candidate(statement, body),
        check=_check_text(statement.name),
    )
    checker = _installed().checker
    replay = [[checker, "CopdCandidate", "CopdCheck"]] if checker else []
    for name in assumptions(check(_compiler(), files, seconds=seconds, further=replay)):
        if name not in statement.axioms | STANDARD_AXIOMS:
            raise RejectedError(f"the proof rests on {name}")


def read_body(response: str, name: str) -> str:
    """The tactics of a response's last block, without comments; the theorem may stand before them.

    Raises RejectedError: no block, or a word that no list of tactics needs.
    """
    block = last_block(response, _LANGUAGES)
    if block is None or len(block) > _MAX_CHARACTERS:
        raise RejectedError("no closed block of Lean, or too long a one")
    text = block if '"' in block else _without_comments(block)
    stated = _STATED.match(text)
    if stated is not None:
        if stated["name"] != name:
            raise RejectedError(f"the proof is of {stated['name']!r:.60}, not of {name}")
        text = text[stated.end() :]
    body = text.removeprefix("by\n").strip("\n")
    check_proof_words(body)
    return body


def _without_comments(text: str) -> str:
    """Lean's comments nest, and a line comment within another one does not count."""
    pieces, depth, start = [], 0, 0
    for match in _COMMENT.finditer(text):
        token = match.group()
        if token.startswith("--"):
            inner = token.count("-/") - token.count("/-")
            if depth == 0:
                pieces.append(text[start : match.start()])
                start = match.end()
            elif inner:
                raise RejectedError("a comment that is hard to read")
        elif token == "/-":
            if depth == 0:
                pieces.append(text[start : match.start()])
            depth += 1
        else:
            depth -= 1
            start = match.end()
            if depth < 0:
                raise RejectedError("a comment ends that did not begin")
    if depth:
        raise RejectedError("a comment does not end")
    return " ".join([*pieces, text[start:]])


def _given(statement: Statement) -> str:
    goal = f"def copdGoal : Prop := (\n  {statement.statement})"
    return "\n".join([statement.header, statement.definitions, goal, ""])


def _candidate(statement: Statement, body: str) -> str:
    lines = statement.header.split("\n")
    imports = [line for line in lines if line.startswith("import ")]
    others = [line for line in lines if not line.startswith("import ")]
    theorem = f"theorem {statement.name} : (\n  {statement.statement}) := by"
    indented = ["  " + line for line in body.split("\n")]
    return "\n".join([*imports, "import CopdGiven", *others, theorem, *indented, ""])


def _check_text(name: str) -> str:
    lines = ["import CopdGiven", "import CopdCandidate", f"theorem copdCheck : copdGoal := @{name}"]
    return "\n".join([*lines, "#print axioms copdCheck", ""])


def assumptions(printed: str) -> list[str]:
    """The axioms that ``#print axioms`` lists. Raises RejectedError for anything else that it says."""
    if printed.strip() == _CLOSED:
        return []
    match = _DEPENDS.fullmatch(printed)
    if match is None:
        raise RejectedError(f"Lean says {printed[:80]!r}")
    return [name.strip() for name in match["names"].split(",")]


def _compiler() -> Compiler:
    found = _installed()
    return Compiler(
        source=".lean",
        compiled=".olean",
        compile=lambda module: [found.lean, "-j1", "-o", f"{module}.olean", f"{module}.lean"],
        mounts=found.mounts,
        environment=found.environment,
        memory_bytes=_ADDRESS_BYTES,
        total_memory_bytes=_MEMORY_BYTES,
    )


def _installed() -> Toolchain:
    found = toolchain()
    if found is None:
        raise sandbox.SandboxError(f"{problem()}.")
    return found
