"""results.json, which keeps what was measured in other places.

The folder of all runs is large and stays on the machine where they ran. So a page is drawn from what is below
the folder at hand, and from what results.json already says of comparisons of which that folder has nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copd_megatron.untrusted.json_text import load_file
from copd_megatron.untrusted.whole_file import write_whole

_ENDS = {"low": -math.inf, "high": math.inf, "value": math.nan}


def read_results(path: Path) -> dict[str, Any]:
    """The results of that file, whose intervals have their infinite ends again; empty if there is no file.

    Raises:
        DataError: the file is not JSON.
    """
    return dict(_restored(load_file(path))) if path.is_file() else {}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """JSON has no infinities: an end that an interval does not have is null."""
    text = json.dumps(_finite(results), indent=1, sort_keys=True, default=str, allow_nan=False)
    write_whole(path, text + "\n")


def with_kept(results: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The results, with the comparisons and the choice of the setting that only ``before`` has.

    Comparisons of another setting are dropped: they say nothing about this one.
    """
    found = {**results, "selection": {**before.get("selection", {}), **results["selection"]}}
    then, now = before.get("setting", {}), _plain(results["setting"])
    if any(then.get(key, value) != value for key, value in now.items()):  # what is new is at its default
        return found
    found["comparisons"] = {**before.get("comparisons", {}), **results["comparisons"]}
    found["criteria"] = results["criteria"] or before.get("criteria", [])
    return found


def _plain(value: Any) -> Any:
    """The value as it is read from JSON."""
    return json.loads(json.dumps(_finite(value), default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _ENDS[key] if inner is None and key in _ENDS else _restored(inner)
            for key, inner in value.items()
        }
    return [_restored(inner) for inner in value] if isinstance(value, list) else value
