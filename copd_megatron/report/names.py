"""Names from a run's files, as text in a figure.

Matplotlib reads what stands between two ``$`` as a formula, leaves names out of legends that begin with
``_``, and cannot draw halves of surrogate pairs; a name of a thousand letters would leave no room for the
curves.
"""

from __future__ import annotations

from typing import Final

from copd_megatron.untrusted.visible import visible

_MAX_LETTERS: Final = 60


def figure_text(name: str) -> str:
    """The name so that matplotlib shows it as it is written: one line, its middle left out if it is long."""
    text = visible(" ".join(name.split()))
    if len(text) > _MAX_LETTERS:
        text = f"{text[: _MAX_LETTERS // 2]}...{text[-_MAX_LETTERS // 2 + 3 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") or not text else text
