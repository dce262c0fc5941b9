"""Units of measure: which stand behind a number, and how one converts to another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_BASE: dict[str, tuple[str, Fraction | int]] = {
    **{"m": ("length", 1), "cm": ("length", Fraction(1, 100)), "mm": ("length", Fraction(1, 1000))},
    **{"km": ("length", 1000), "dm": ("length", Fraction(1, 10)), "in": ("length", Fraction(254, 10000))},
    **{"ft": ("length", Fraction(3048, 10000)), "yd": ("length", Fraction(9144, 10000))},
    **{"mi": ("length", Fraction(1609344, 1000)), "nm": ("length", Fraction(1, 10**9))},
    **{"g": ("mass", Fraction(1, 1000)), "kg": ("mass", 1), "mg": ("mass", Fraction(1, 10**6))},
    **{"lb": ("lb", 1)},
    **{"s": ("time", 1), "min": ("time", 60), "h": ("time", 3600), "ms": ("time", Fraction(1, 1000))},
    **{"day": ("time", 86400), "week": ("time", 604800), "month": ("month", 1), "year": ("month", 12)},
    **{"L": ("volume", 1), "mL": ("volume", Fraction(1, 1000)), "N": ("force", 1), "J": ("energy", 1)},
    **{"kJ": ("energy", 1000), "W": ("power", 1), "kW": ("power", 1000), "V": ("voltage", 1)},
    **{"A": ("ampere", 1)},
    **{"Hz": ("frequency", 1), "Pa": ("pressure", 1), "K": ("kelvin", 1), "mol": ("mol", 1)},
    **{"C": ("celsius", 1)},
    **{"dollar": ("dollar", 1), "cent": ("dollar", Fraction(1, 100)), "euro": ("euro", 1)},
    **{"pound": ("pound", 1)},
    **{"degree": ("degree", 1), "radian": ("radian", 1), "mph": ("mph", 1), "unit": ("unit", 1)},
    **{"T": ("tesla", 1)},
    **{"F": ("farad", 1), "gal": ("gal", 1), "oz": ("oz", 1), "acre": ("acre", 1), "eV": ("eV", 1)},
}  # fmt: skip
_NAMES = {
    **dict.fromkeys(("meter", "metre"), "m"), **dict.fromkeys(("centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("millimeter", "millimetre"), "mm"), **dict.fromkeys(("kilometer", "kilometre"), "km"),
    **dict.fromkeys(("inch", "inche"), "in"), **dict.fromkeys(("foot", "feet"), "ft"),
    "yard": "yd", "mile": "mi",
    "gram": "g", "kilogram": "kg", "milligram": "mg", **dict.fromkeys(("second", "sec"), "s"),
    "minute": "min",
    **dict.fromkeys(("hour", "hr"), "h"), **dict.fromkeys(("liter", "litre", "l"), "L"), "ml": "mL",
    **dict.fromkeys(("milliliter", "millilitre"), "mL"), "newton": "N", "joule": "J",
    "watt": "W", "volt": "V",
    "amp": "A", "ampere": "A", "hertz": "Hz", "pascal": "Pa", "kelvin": "K", "deg": "degree", "rad": "radian",
    "gallon": "gal", "ounce": "oz", "$": "dollar", "usd": "dollar", "buck": "dollar",
    "yr": "year", "mole": "mol",
}  # fmt: skip
SINGLE = frozenset("mgshLlNJWVAKF")
"""Units of one letter, which could be variables as well."""
_WORD = re.compile(r"([A-Za-z$]+)\.?\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


@dataclass(frozen=True)
class Unit:
    """A unit as dimensions with exponents, and its size in the units of the table."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)

    @property
    def is_angle(self) -> bool:
        """Degrees or radians."""
        return self.dimensions in ((("degree", 1),), (("radian", 1),))


NONE = Unit(())


def base_name(word: str) -> str | None:
    """The table's name of a unit; None for other words."""
    for candidate in (word, word.casefold(), word.casefold().removesuffix("s"), word.removesuffix("s")):
        name = _NAMES.get(candidate, candidate)
        if name in _BASE:
            return name
    return None


def parse_unit(text: str) -> Unit:
    """The unit that words stand for. A noun that is no unit ("apples") is a dimension of its own."""
    powers: dict[str, int] = {}
    factor, sign, next_power = Fraction(1), 1, 1
    for part in re.split(r"(/|\bper\b|\\cdot|\*)", text):
        if part.strip() in ("/", "per"):
            sign = -1
            continue
        for word, exponent in _WORD.findall(part):
            if word.casefold() in _POWERS:
                next_power = _POWERS[word.casefold()]
                continue
            name = base_name(word)
            dimension, size = _BASE[name] if name else (word.casefold().removesuffix("s"), 1)
            power = sign * (int(exponent) if exponent else next_power)
            if word.casefold() == "squared" or word.casefold() == "cubed":
                continue
            powers[dimension] = powers.get(dimension, 0) + power
            factor *= Fraction(size) ** power
            next_power = 1
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), factor)
