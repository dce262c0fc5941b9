"""``proof``: a proof of a given statement, checked by a proof assistant in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copd_megatron.errors import ConfigError
from copd_megatron.rewards import sandbox
from copd_megatron.rewards.metadata import setting
from copd_megatron.rewards.proofs import Assistant, RejectedError, coq, lean, read_statement
from copd_megatron.rewards.proofs.compiler import keep_statements
from copd_megatron.rewards.registry import register


def missing() -> str | None:
    """What this machine lacks to check proofs, None where Coq or Lean is here."""
    if coq.toolchain() is None and lean.toolchain() is None:
        return f"Coq (coqc and coqchk) is not installed, and {lean.problem()}"
    return None


def _require() -> None:
    sandbox.require()
    problem = missing()
    if problem is not None:
        raise ConfigError(
            f"the verifier 'proof' cannot work here: {problem}. Install Coq (Debian and Ubuntu: apt-get "
            f"install coq), or set {lean.VARIABLE} to the path of Lean 4's program 'lean' and {lean.CHECKER} "
            "to that of a program that replays its proofs."
        )


@register("proof", gold_is_a_response=False, requires=_require, prepare=keep_statements)
def proof(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if the response proves the sample's statement.

    ``answer``: the statement as JSON (``proofs.read_statement``), for Coq or Lean 4. The response's last
    closed block, or with Coq the text between its last ``Proof.`` and ``Qed.``, holds tactics; with Coq also
    lemmas that they use, each proved. The proof may rest on no axioms but those that the sample's
    ``definitions`` assume or its ``axioms`` name, and with Lean on those of its logic. ``rewards/proofs``
    says how a proof is checked. metadata: ``time_limit`` (CPU seconds of each of the three runs, 5, plus as
    much again for a busy machine).

    Raises ValueError for a statement that cannot be read or does not compile, SandboxError and ConfigError
    where the sandbox fails or the assistant is not installed.
    """
    statement = read_statement(answer)
    sandbox.require()
    judge = lean.judge if statement.assistant is Assistant.lean else coq.judge
    try:
        judge(statement, response, seconds=float(setting(metadata, "time_limit", 5.0)))
    except RejectedError:
        return 0.0
    return 1.0
