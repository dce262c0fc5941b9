"""The process in which verifiers run that might hang or crash: one request a line, one answer a line.

Started by ``isolation.py`` as ``python -m copd_megatron.rewards.worker <watchdog seconds>``. Imports only
what the verifiers need. Requests and answers are JSON objects on standard input and output:

``{"load": target}`` -> ``{"loaded": true}`` or ``{"error": ...}``
``{"target": ..., "response": ..., "answer": ..., "metadata": {...}}`` -> ``{"value": ...}`` or the same error
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
from typing import IO, Any

from copd_megatron.rewards import registry

MAX_DATA_BYTES = 4 * 2**30
"""A verifier that asks for more memory gets a MemoryError and its sample scores 0."""


def main() -> None:
    """Serve until standard input closes."""
    watchdog_seconds = float(sys.argv[1])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MAX_DATA_BYTES if hard == resource.RLIM_INFINITY else min(MAX_DATA_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    # What a verifier prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # The parent kills a verifier that takes too long. Should the parent itself be killed meanwhile,
            # this thread, which needs no interpreter lock, ends the orphan.
            faulthandler.dump_traceback_later(watchdog_seconds, exit=True, file=nowhere)
            answer = _serve(json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            _send(answers, answer)


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "load" in request:
            verifier = registry.get(request["load"])
            if verifier.prepare is not None:
                verifier.prepare()
            return {"loaded": True}
        verify = registry.get(request["target"]).verify
        value = verify(request["response"], request["answer"], request["metadata"])
        return {"value": float(value)}
    except (Exception, SystemExit) as error:  # whatever a verifier raises is its sample's failure, reported
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _send(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
