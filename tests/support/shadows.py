"""A folder whose files have the names of modules that are imported: whoever imports from it fails."""

from __future__ import annotations

from pathlib import Path

_NAMES = ("click", "multiprocessing", "numpy", "omegaconf", "statistics", "torch", "vllm", "yaml")


def shadowing_folder(folder: Path) -> Path:
    """Makes the folder."""
    folder.mkdir()
    for name in _NAMES:
        (folder / f"{name}.py").write_text(
            f"raise RuntimeError('{name} was imported from the working folder')\n"
        )
    return folder
