"""Runs a program that nobody has read, in bubblewrap (``bwrap``).

**What the program sees.** Python's standard library and the C library, read-only; an empty folder ``/tmp`` of
bounded size; its input. No other file of the host, no ``/proc``, no ``/dev`` beyond ``null``, ``zero`` and
``urandom``, no environment, no network, no other process. It has an unprivileged user, and a session and a
process namespace of its own, and may create no further namespaces.

**What it may use** is in ``limits.py``. Whatever is left when it ends, or when its time is up, is killed.

**What decides its grade stays outside.** The caller gets what the program wrote, as bytes, and compares.

``batch.py`` runs one program on several inputs; ``commands.py`` runs other programs than Python's, such as a
proof assistant. ``bubblewrap.py`` builds the command and checks whether it works here; ``system_calls.py``
filters what the program may ask of the kernel; ``run.py`` runs one program; ``inside.py`` is the file that
runs in the sandbox ahead of the program. ``COPD_UNSANDBOXED_CODE=1`` in the environment runs programs without
bubblewrap, with resource limits alone: only for a machine that you can throw away.
"""

from copd_megatron.rewards.sandbox.batch import run_batch
from copd_megatron.rewards.sandbox.bubblewrap import SandboxError, check, require
from copd_megatron.rewards.sandbox.commands import run_commands
from copd_megatron.rewards.sandbox.limits import Limits
from copd_megatron.rewards.sandbox.run import Ended, Result, run

__all__ = [
    "Ended",
    "Limits",
    "Result",
    "SandboxError",
    "check",
    "require",
    "run",
    "run_batch",
    "run_commands",
]
