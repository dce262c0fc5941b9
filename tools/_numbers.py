"""Numbers on the command lines of the tools: what is no number of its kind is a usage error, and no
traceback or endless run later."""

import argparse
import math

_LARGEST = 2**31 - 1


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    """A whole number of at least 0: a seed too."""
    return _whole(text, 0)


def amount(text: str) -> float:
    """A finite number of at least 0: seconds, shares, sizes."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return number


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not least <= number <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {_LARGEST}")
    return number
