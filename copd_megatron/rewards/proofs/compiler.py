"""Runs the three files of a proof through an assistant; what they say is up to ``coq.py`` and ``lean.py``.

**Statements are compiled once.** A sample's statement is compiled from its own text alone, before any
response is looked at, so all responses to a prompt can share the result. The processes that grade find it
in a folder that ``keep_statements`` makes before they are forked. No response can reach it: a candidate runs
in the sandbox, which holds nothing of the host but the assistant and copies of the files named here. Where
programs run without a sandbox (``COPD_UNSANDBOXED_CODE``), nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.rewards import sandbox
from copd_megatron.rewards.proofs.statement import RejectedError, limits
from copd_megatron.rewards.sandbox import Ended, bubblewrap
from copd_megatron.rewards.sandbox.limits import MIB

_MAX_KEPT = 500
_MAX_KEPT_BYTES = 256 * MIB


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """How an assistant is called."""

    source: str
    """How its files end."""
    compiled: str
    """How the files end that it makes of them."""
    compile: Callable[[str], list[str]]
    """The command that compiles a module's file."""
    mounts: tuple[str, ...]
    """What the sandbox may read."""
    environment: Mapping[str, str]
    memory_bytes: int
    """Address space of each process."""
    total_memory_bytes: int
    """Memory of all processes together."""

    def run(
        self, commands: Sequence[Sequence[str]], files: Mapping[str, bytes], give: str | None, seconds: float
    ) -> sandbox.Result:
        """``sandbox.run_commands`` within the assistant's limits."""
        return sandbox.run_commands(
            commands,
            files,
            give=give,
            limits=limits(seconds, self.memory_bytes, self.total_memory_bytes),
            mounts=self.mounts,
            environment=self.environment,
        )

    def make(self, module: str, text: str, files: Mapping[str, bytes], seconds: float) -> bytes | None:
        """The compiled file; None where the text does not compile within the limits."""
        source = {**files, module + self.source: text.encode("utf-8", "replace")}
        result = self.run([self.compile(module)], source, module + self.compiled, seconds)
        return result.output if result.ended is Ended.ok else None


@dataclass(frozen=True, kw_only=True)
class Files:
    """The texts of a proof's three files."""

    given: str
    candidate: str
    check: str


def check(compiler: Compiler, files: Files, *, seconds: float, further: Sequence[Sequence[str]] = ()) -> str:
    """Compiles the three files, and returns what the last one prints.

    Args:
        seconds: CPU time of each of the three runs.
        further: commands that must succeed after the check.

    Raises:
        RejectedError: the candidate or the check does not compile.
        ValueError: the statement itself does not compile.
        SandboxError: the sandbox could not be set up.
    """
    given = _statement(compiler, files.given, seconds)
    if given is None:
        raise ValueError("the sample's statement does not compile with the installed assistant.")
    known = {f"CopdGiven{compiler.compiled}": given}
    candidate = compiler.make("CopdCandidate", files.candidate, known, seconds)
    if candidate is None:
        raise RejectedError("the proof does not compile")
    known |= {
        f"CopdCandidate{compiler.compiled}": candidate,
        f"CopdCheck{compiler.source}": files.check.encode("utf-8"),
    }
    result = compiler.run([compiler.compile("CopdCheck"), *further], known, None, seconds)
    if result.ended is not Ended.ok:
        raise RejectedError("what was proved is not the statement")
    return result.output.decode("utf-8", "replace")


# ---- statements that are compiled already ------------------------------------------------------------------

_folder: Path | None = None


def keep_statements() -> None:
    """Makes the folder in which this process and those that it forks keep compiled statements. It lies in the
    folder for temporary files, which for grading processes ends with them."""
    global _folder
    if _folder is None or not _folder.is_dir():
        _folder = Path(tempfile.mkdtemp(prefix="statements-"))


def _statement(compiler: Compiler, text: str, seconds: float) -> bytes | None:
    """The compiled statement, None where it does not compile."""
    if _folder is None or bubblewrap.unsandboxed():
        return compiler.make("CopdGiven", text, {}, seconds)
    key = repr((compiler.compile("CopdGiven"), compiler.mounts, text)).encode("utf-8", "surrogatepass")
    path = _folder / hashlib.sha256(key).hexdigest()
    with contextlib.suppress(OSError):
        os.utime(path)  # used last
        return path.read_bytes()
    made = compiler.make("CopdGiven", text, {}, seconds)
    if made is not None:
        with contextlib.suppress(OSError):  # a full disk costs time, not the grade
            _keep(path, made)
    return made


def _keep(path: Path, data: bytes) -> None:
    """Writes a file that is there as a whole or not at all, and removes those that were used longest ago."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
    entries = [
        (entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(path.parent)
    ]
    total = 0
    for number, (_, size, name) in enumerate(sorted(entries, reverse=True)):
        total += size
        if number >= _MAX_KEPT or total > _MAX_KEPT_BYTES:
            os.unlink(name)
