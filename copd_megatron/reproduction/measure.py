"""Measures models on the held-out prompts: ``python -m copd_megatron.reproduction.measure CONFIG OUT
LABEL=FOLDER...``

A file for each model, ``OUT/<label>.json``: the rewards of every prompt by domain, and lengths. Models that
have their file are left out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from copd_megatron.config import load_config


def measure(config_path: str, out: Path, models: dict[str, str]) -> None:
    """Writes the files that are missing.

    Raises:
        ConfigError, DataError: as ``evaluate_models``.
    """
    missing = {label: path for label, path in models.items() if not (out / f"{label}.json").is_file()}
    if not missing:
        return
    from copd_megatron.evaluation.models import evaluate_models, open_models

    candidates = [
        dataclasses.replace(model, label=label)
        for label, model in zip(missing, open_models(list(missing.values())), strict=True)
    ]
    found = evaluate_models(load_config(config_path, []), candidates, out / "verdicts")
    for label, verdicts in found.items():
        domains: dict[str, dict[str, list[float]]] = {}
        for verdict in verdicts:
            domains.setdefault(verdict.domain, {})[verdict.prompt] = verdict.graded
        scratch = out / f"{label}.tmp"
        scratch.write_text(
            json.dumps({"model": missing[label], "domains": domains}, allow_nan=False) + "\n",
            encoding="utf-8",
        )
        scratch.replace(out / f"{label}.json")


def main(argv: Sequence[str]) -> int:
    config, out, *pairs = argv
    measure(config, Path(out), dict(pair.split("=", 1) for pair in pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
