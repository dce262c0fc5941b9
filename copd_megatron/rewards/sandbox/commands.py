"""Runs commands of the host, such as a proof assistant, on files that nobody has read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence

from copd_megatron.rewards.sandbox.limits import Limits
from copd_megatron.rewards.sandbox.run import Result, run


def run_commands(
    commands: Sequence[Sequence[str]],
    files: Mapping[str, bytes],
    *,
    limits: Limits,
    mounts: Sequence[str],
    give: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """Runs commands one after the other in a sandbox of their own, up to the first that fails.

    Args:
        commands: absolute paths of programs, with their arguments. They run in the scratch folder.
        files: written to the scratch folder first.
        limits: what each command may use; the wall-clock time bounds them all together.
        mounts: the programs, and whatever else of the host they read beside ``/usr/lib``.
        give: the file whose contents are the result. None: what the commands write to stdout.
        environment: all that the commands find in theirs.

    Raises SandboxError: the sandbox could not be set up.
    """
    task = {
        "commands": [list(command) for command in commands],
        "files": {name: base64.b64encode(data).decode("ascii") for name, data in files.items()},
        "give": give,
        "environment": dict(environment or {}),
    }
    return run(json.dumps(task).encode("ascii"), mode="command", limits=limits, mounts=mounts)
