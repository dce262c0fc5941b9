"""Lean 4: the files of a proof, the commands that compile them, and what they say.

``COPD_LEAN`` in the environment names the ``lean`` to run (default: the one on the path), and ``LEAN_PATH``
the folders of compiled libraries such as Mathlib, which the sandbox may then read. Both belong to the
machine, and so are no settings of a sample.
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
from copd_megatron.rewards.proofs.statement import RejectedError, Statement
from copd_megatron.rewards.sandbox.limits import MIB

VARIABLE = "COPD_LEAN"
STANDARD_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})
"""Axioms of Lean's own logic, on which nearly every proof rests."""
_LANGUAGES = frozenset({"", "lean", "lean4"})
_MAX_CHARACTERS = 50_000
_ADDRESS_BYTES = 32 * 1024 * MIB
"""Address space; Lean maps whole libraries into it."""
_MEMORY_BYTES = 8 * 1024 * MIB
_COMMENT = re.compile(r"/-|-/|--[^\n]*")
_REFUSED = re.compile(
    r"(?<![\w.'])(?:sorry|admit|axiom|theorem|lemma|example|def|abbrev|instance|opaque|structure|inductive|class"
    r"|macro|macro_rules|syntax|notation|infix[lr]?|prefix|postfix|elab|elab_rules|declare_syntax_cat"
    r"|run_tac|run_cmd|run_meta|by_elab|eval_expr|native_decide|unsafe|partial|attribute|set_option|open|export"
    r"|namespace|section|end|import|universe|variable|local|scoped|private|protected|noncomputable"
    r"|initialize|builtin_initialize|mutual|deriving|include|omit|reduce_bool|ofReduceBool|IO|Lean)(?![\w'])"
    r"|#|@\[|\u00ab"
)
"""Words that begin a command, change how the rest is read, run a program, or leave the kernel out."""
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

    @property
    def mounts(self) -> tuple[str, ...]:
        """What the sandbox may read."""
        return (self.prefix, *self.path)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its commands."""
        return {"HOME": ".", "LEAN_PATH": os.pathsep.join([".", *self.path])}


@functools.cache
def toolchain() -> Toolchain | None:
    """The Lean that ``COPD_LEAN`` names, or that is on the path; None where there is none. A program that
    chooses among toolchains (elan) is asked which one it takes."""
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
    return Toolchain(str(lean), str(prefix), tuple(path for path in listed if Path(path).is_absolute()))


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
    for name in assumptions(check(_compiler(), files, seconds=seconds)):
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
    refused = _REFUSED.search(text)
    if refused is not None:
        raise RejectedError(f"{refused.group()!r} in a proof")
    return text.removeprefix("by\n").strip("\n")


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
        raise sandbox.SandboxError(f"Lean is not installed: set {VARIABLE} to its path.")
    return found
