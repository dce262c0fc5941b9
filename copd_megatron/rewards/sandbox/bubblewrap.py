"""The command that starts a Python in bubblewrap, and whether it works on this machine."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.errors import ConfigError
from copd_megatron.rewards.sandbox.limits import Limits
from copd_megatron.rewards.sandbox.system_calls import refused_calls

SWITCH = "COPD_UNSANDBOXED_CODE"
"""Environment variable: 1 runs programs without bubblewrap. They can then read and change whatever this user
can."""
NOBODY = 65534
"""The user that programs have where the caller is root, whom the limit on processes does not bind."""
INSIDE = Path(__file__).with_name("inside.py").read_bytes()
CALLS = refused_calls()

_REMEDY = (
    "The verifier 'code' runs programs that a model wrote, and refuses to without a sandbox. Install "
    "bubblewrap 0.8 or newer (Debian 12, Ubuntu 24.04: apt-get install bubblewrap). It needs user "
    "namespaces: start a Docker container with --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined; Apptainer and Pyxis allow them where the node does; on Ubuntu 24.04 "
    "allow them with "
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0. "
    f"{SWITCH}=1 runs programs without a sandbox, which is safe only on a machine that holds nothing else."
)


class SandboxError(RuntimeError):
    """The sandbox itself failed, so that nothing is known about the program."""


@dataclass(frozen=True)
class Interpreter:
    """A Python that the sandbox can use."""

    executable: Path
    library: Path
    """The folder that holds ``pythonX.Y``."""

    @property
    def mounts(self) -> list[str]:
        """Options that make it ``/python/bin/python3`` in the sandbox, without installed packages."""
        if self.library == Path("/usr/lib"):
            return ["--ro-bind", str(self.executable), "/usr/bin/python3"]
        version = self.executable.name.removeprefix("python")
        packages = f"python{version}/site-packages"
        options = ["--ro-bind", str(self.executable), "/python/bin/python3"]
        options += ["--ro-bind", str(self.library), "/python/lib"]
        if (self.library / packages).is_dir():
            options += ["--size", "4096", "--tmpfs", f"/python/lib/{packages}"]
            options += ["--remount-ro", f"/python/lib/{packages}"]
        return options

    @property
    def inside(self) -> str:
        """Its path in the sandbox."""
        return "/usr/bin/python3" if self.library == Path("/usr/lib") else "/python/bin/python3"


def unsandboxed() -> bool:
    """Whether the environment says to do without bubblewrap."""
    return os.environ.get(SWITCH, "") == "1"


def identity() -> dict[str, Any]:
    """Arguments for ``Popen``: the unprivileged user, where the caller is root."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


@functools.cache
def interpreter() -> Interpreter:
    """This Python where the sandbox's user may read it, else the system's.

    Raises SandboxError where there is neither.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = Path(sys.base_prefix)
    found = [(own / "bin" / version, own / "lib"), (Path("/usr/bin/python3"), Path("/usr/lib"))]
    for executable, library in found:
        executable = executable.resolve()
        if executable.exists() and _readable(executable) and _readable(library):
            return Interpreter(executable, library)
    raise SandboxError(
        f"no Python for the sandbox: its user can read neither {found[0][0]} nor /usr/bin/python3. "
        "Install python3 with the system's package manager."
    )


def _readable(path: Path) -> bool:
    """Whether the sandbox's user reaches a file or folder."""
    if os.geteuid() != 0:
        return os.access(path, os.R_OK | os.X_OK)
    return all(place.stat().st_mode & 0o001 for place in (path, *path.parents)) and bool(
        path.stat().st_mode & 0o004
    )


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """Open files that the command inherits."""

    inside: int
    """``inside.py``."""
    program: int
    """The program to run."""
    calls: int
    """The filter of system calls."""
    status: int
    """Where bubblewrap reports the first process in the sandbox and how it ended."""


def command(mode: str, limits: Limits, files: Descriptors, mounts: Sequence[str] = ()) -> list[str]:
    """The command that runs a program. ``mounts`` are further files and folders of the host that the program
    may read, at the same place."""
    python = interpreter()
    options = ["-s", "-S", "-B", "-X", "utf8"]
    if unsandboxed():
        paths = [f"/proc/self/fd/{files.inside}", mode, limits.to_json(), f"/proc/self/fd/{files.program}"]
        return [str(python.executable), *options, *paths]
    return [
        shutil.which("bwrap") or "bwrap",
        *("--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--die-with-parent"),
        *(("--seccomp", str(files.calls)) if CALLS is not None else ()),
        *("--json-status-fd", str(files.status), "--hostname", "sandbox", "--cap-drop", "ALL"),
        *("--ro-bind", "/usr/lib", "/usr/lib", "--ro-bind-try", "/usr/lib64", "/usr/lib64"),
        *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        *python.mounts,
        *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/zero", "/dev/zero"),
        *("--dev-bind", "/dev/urandom", "/dev/urandom"),
        *("--perms", "0444", "--ro-bind-data", str(files.inside), "/inside.py"),
        *("--perms", "0444", "--ro-bind-data", str(files.program), "/program.py"),
        *("--size", str(limits.scratch_bytes), "--tmpfs", "/tmp"),
        *(part for path in mounts for part in ("--ro-bind", path, path)),
        *("--remount-ro", "/", "--chdir", "/tmp"),
        *("--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--setenv", "LD_LIBRARY_PATH", "/python/lib"),
        *(python.inside, *options, "/inside.py", mode, limits.to_json(), "/program.py"),
    ]


@functools.cache
def check() -> str | None:
    """Why programs cannot be run in the sandbox on this machine, None where they can. Runs one."""
    from copd_megatron.rewards.sandbox.run import Ended, run

    if shutil.which("bwrap") is None:
        return "bubblewrap (bwrap) is not installed"
    program = b"import os; print(sorted(os.listdir('/')), len(os.environ) > 4)"
    try:
        result = run(program)
    except (SandboxError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    if result.ended is not Ended.ok or b"'program.py'" not in result.output:
        return f"a program in the sandbox ended with {result.ended.value}, and wrote {result.output[:200]!r}"
    return None


def require() -> None:
    """Raises ConfigError where programs cannot be run: what is missing, and the remedy."""
    if unsandboxed():
        return
    problem = check()
    if problem is not None:
        raise ConfigError(f"the sandbox does not work here: {problem}. {_REMEDY}")
