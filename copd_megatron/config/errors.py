"""The one exception that a bad configuration raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot run: says where, what, and the remedy."""
