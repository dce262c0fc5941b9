"""Libraries have a place for what they compile, whatever the home folder is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from copd_megatron.launch import caches

NAMES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME", "FLASHINFER_WORKSPACE_BASE", "HF_HOME", "USER")


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A temporary folder of the test's own, and none of the variables."""
    for name in NAMES:
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_a_home_that_can_be_written_to_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    caches.usable_caches()
    assert not {*NAMES[:5]} & {*os.environ}


@pytest.mark.parametrize("home", ["/proc/nobody", "/dev/null", "~"])
def test_without_a_usable_home_caches_are_elsewhere(
    home: str, monkeypatch: pytest.MonkeyPatch, variables: Path
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("TRITON_HOME", "/mine")
    caches.usable_caches()
    place = variables / f"copd-caches-{os.getuid()}"
    assert os.environ["XDG_CACHE_HOME"] == str(place / ".cache")
    assert os.environ["TRITON_HOME"] == "/mine", "what somebody has chosen stays"
    assert place.stat().st_mode & 0o777 == 0o700
    before = dict(os.environ)
    caches.usable_caches()
    assert dict(os.environ) == before, "ranks find what their launcher has found"


def test_downloads_in_a_home_that_is_read_only_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = tmp_path / ".cache/huggingface"
    hub.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(caches, "_can_write", lambda folder: False)
    caches.usable_caches()
    assert os.environ["HF_HOME"] == str(hub)


@pytest.mark.parametrize("trap", ["link", "file", "open to all"])
def test_a_folder_that_others_can_write_to_is_not_used(
    trap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: Path
) -> None:
    """What is compiled there is run."""
    place = variables / f"copd-caches-{os.getuid()}"
    if trap == "link":
        place.symlink_to(tmp_path)
    elif trap == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    monkeypatch.setenv("HOME", "/proc/nobody")
    caches.usable_caches()
    chosen = Path(os.environ["XDG_CACHE_HOME"]).parent
    assert chosen != place and chosen.parent == variables and chosen.stat().st_mode & 0o777 == 0o700


def test_a_user_whom_nobody_has_listed_has_a_name() -> None:
    """``getpass.getuser``, which torch asks, fails without one."""
    script = "import getpass; from copd_megatron.launch.caches import _user; print(_user())"
    bare = {name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME", "LNAME")}
    done = subprocess.run(
        [sys.executable, "-c", f"import pwd; pwd.getpwuid = {{}}.__getitem__; {script}"],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in bare.items() if name != "USERNAME"},
    )
    assert done.stdout.strip() == str(os.getuid())
