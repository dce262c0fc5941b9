"""Where libraries keep what they compile and remember, when the home folder cannot be written to.

A process in a container often has a home that does not exist, is read-only, or is somebody else's. vLLM,
Triton, FlashInfer, torch and matplotlib each keep a cache there, and each says so at length when it cannot.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_OF_THE_HOME: Final = {
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
    "TRITON_HOME": ".",
    "FLASHINFER_WORKSPACE_BASE": ".",
}
"""Variables by which libraries are told another place, and what they stand for in a home folder."""


def usable_caches() -> None:
    """Points libraries at a folder of this user's below the system's temporary one, unless the home folder
    can be written to; for this process and those that it starts. Call it before they are imported."""
    os.environ.setdefault("USER", _user())
    home = Path(os.path.expanduser("~"))
    wanted = {name: home / folder for name, folder in _OF_THE_HOME.items() if name not in os.environ}
    if not wanted or (home.is_absolute() and _can_write(home / ".cache")):
        return
    hub = wanted.get("XDG_CACHE_HOME", home) / "huggingface"
    if hub.is_dir():  # what was downloaded there can still be read
        os.environ.setdefault("HF_HOME", str(hub))
    place = _private_folder()
    for name in wanted:
        os.environ[name] = str(place / _OF_THE_HOME[name])
    logger.info("the home folder %s cannot be written to: caches are in %s", home, place)


def _user() -> str:
    """A name for the user, whom a container's list of users may not have."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder() -> Path:
    """The same one for all processes of this user; what is compiled there is run, so nobody else may write
    to it."""
    place = Path(tempfile.gettempdir()) / f"copd-caches-{os.getuid()}"
    with contextlib.suppress(FileExistsError):  # a link of somebody else's, perhaps
        place.mkdir(mode=0o700)
    status = place.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return place
    return Path(tempfile.mkdtemp(prefix="copd-caches-"))
