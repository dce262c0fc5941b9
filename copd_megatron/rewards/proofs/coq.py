"""Coq: the files of a proof, the commands that compile them, and what they say."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.rewards import sandbox
from copd_megatron.rewards.fenced import last_block
from copd_megatron.rewards.final_answer import after_thinking
from copd_megatron.rewards.proofs.compiler import Compiler, Files, check
from copd_megatron.rewards.proofs.coq_script import Proof, check_header, read_proof, sentences
from copd_megatron.rewards.proofs.statement import RejectedError, Statement
from copd_megatron.rewards.sandbox.limits import MIB

_LANGUAGES = frozenset({"", "coq", "rocq", "v", "gallina"})
_UNFENCED = re.compile(r"\bProof\s*\.\s(?P<body>(?:(?!\bProof\s*\.\s).)*?)\bQed\s*\.", re.DOTALL)
_MAX_CHARACTERS = 50_000
_MEMORY_BYTES = 2048 * MIB
_FINDLIB = (Path("/etc/ocamlfind.conf"), Path("/etc/ocamlfind.conf.d"))
"""Where Debian says which plugins of Coq are where."""
_CLOSED = "Closed under the global context"
_AXIOM = re.compile(r"(?P<name>[^\s:]+)(?:\s:\s.*)?")
_CHECK = """Require Copd.CopdGiven.
Require Copd.CopdCandidate.
Definition copd_check : Copd.CopdGiven.copd_goal := @Copd.CopdCandidate.{name}.
Print Assumptions copd_check.
"""


@dataclass(frozen=True)
class Toolchain:
    """An installed Coq."""

    coqc: str
    coqchk: str
    mounts: tuple[str, ...]


@functools.cache
def toolchain() -> Toolchain | None:
    """The Coq on the path; None where there is none, or no ``coqchk`` beside it."""
    coqc, coqchk = shutil.which("coqc"), shutil.which("coqchk")
    if coqc is None or coqchk is None:
        return None
    found = subprocess.run([coqc, "-where"], capture_output=True, text=True, timeout=60, check=False)
    library = Path(found.stdout.strip() or "/usr/lib")
    paths = [str(Path(path).resolve()) for path in (coqc, coqchk)]
    mounts = [*paths, *(str(path) for path in _FINDLIB if path.exists())]
    if not library.is_relative_to("/usr/lib"):
        mounts.append(str(library.parent))
    return Toolchain(paths[0], paths[1], tuple(mounts))


def judge(statement: Statement, response: str, *, seconds: float) -> None:
    """Checks the proof that a response holds, in three runs of so many seconds of CPU time.

    Raises RejectedError where the response holds no proof of the statement, and as ``compiler.check``.
    """
    check_header(statement.header)
    proof = read_proof(_proof_text(response), statement.name, statement.header)
    files = Files(
        given=_given(statement),
        candidate=_candidate(statement, proof),
        check=_CHECK.format(name=statement.name),
    )
    recheck = [_installed().coqchk, "-silent", "-norec", "Copd.CopdCandidate", "-Q", ".", "Copd"]
    for name in assumptions(check(_compiler(), files, seconds=seconds, further=[recheck])):
        if not _is_allowed(name, statement.axioms):
            raise RejectedError(f"the proof rests on {name}")


def _proof_text(response: str) -> str:
    block = last_block(response, _LANGUAGES)
    if block is None:
        found = list(_UNFENCED.finditer((after_thinking(response) or "")[-_MAX_CHARACTERS:]))
        block = found[-1]["body"] if found else None
    if block is None:
        raise RejectedError("no closed block, and no text between Proof. and Qed.")
    if len(block) > _MAX_CHARACTERS:
        raise RejectedError(f"a proof of more than {_MAX_CHARACTERS} characters")
    return block


def _given(statement: Statement) -> str:
    goal = f"Definition copd_goal : Type := ({statement.statement}\n)."
    return "\n".join([statement.header, statement.definitions, goal, ""])


def _candidate(statement: Statement, proof: Proof) -> str:
    lines = [*sentences(statement.header), "Require Import Copd.CopdGiven.", *proof.helpers]
    theorem = f"Theorem {statement.name} : {statement.statement}\n."
    return "\n".join([*lines, theorem, "Proof.", *proof.body, "Qed.", ""])


def assumptions(printed: str) -> list[str]:
    """The axioms that ``Print Assumptions`` lists.

    Raises RejectedError for anything else that it says: a check that was switched off, or nothing at all.
    """
    text = printed.strip()
    if text == _CLOSED:
        return []
    first, _, rest = text.partition("\n")
    if first != "Axioms:":
        raise RejectedError(f"Coq says {text[:80]!r}")
    names = []
    for line in rest.split("\n"):
        if line.startswith(" "):  # the type goes on
            continue
        match = _AXIOM.fullmatch(line)
        if match is None:
            raise RejectedError(f"Coq says {line[:80]!r}")
        names.append(match["name"])
    return names


def _is_allowed(name: str, allowed: frozenset[str]) -> bool:
    """Names are printed as short as they are unique; those of the candidate always begin with its module."""
    if "CopdCandidate" in name.split("."):
        return False
    if name.split(".")[0] == "CopdGiven":
        return True
    return any(f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}") for one in allowed)


def _compiler() -> Compiler:
    return Compiler(
        source=".v",
        compiled=".vo",
        compile=_coqc,
        mounts=_installed().mounts,
        environment={"HOME": "."},
        memory_bytes=_MEMORY_BYTES,
        total_memory_bytes=_MEMORY_BYTES,
    )


def _coqc(module: str) -> list[str]:
    return [_installed().coqc, "-q", "-noglob", "-w", "none", "-Q", ".", "Copd", f"{module}.v"]


def _installed() -> Toolchain:
    found = toolchain()
    if found is None:
        raise sandbox.SandboxError("Coq is not installed: no coqc and coqchk on the path.")
    return found
