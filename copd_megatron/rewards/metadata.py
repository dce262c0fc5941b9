"""Settings of a verifier that travel with a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting[T](metadata: Mapping[str, Any], name: str, default: T) -> T:
    """The setting, or the default where it is absent or null.

    Tables in columns (Parquet) give every row every field, null where a row has none.
    """
    value = metadata.get(name)
    return default if value is None else value
