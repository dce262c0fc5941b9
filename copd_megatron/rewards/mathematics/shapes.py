r"""The structure of a mathematical answer: numbers, lists, sets, intervals, matrices, equations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from copd_megatron.rewards.mathematics.notation import closing, split_outside
from copd_megatron.rewards.mathematics.units import NONE, SINGLE, Unit, base_name, parse_unit

_OR = re.compile(r"\\lor\s|\\text\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])", re.IGNORECASE)
_AND = re.compile(
    r",|;|\\land\s|(?:,\s*)?\\text\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|&", re.IGNORECASE
)
_COMMA = re.compile(r",|;")
_CUP = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]}])\s*U\s*(?=[(\[\\])")
_MINUS_SET = re.compile(r"\\setminus(?![A-Za-z])|(?<=\})\s*\\\\?\s*(?=\\\{)")
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
_APPROX = re.compile(r"\\approx(?![A-Za-z])")
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_IN = re.compile(r"\\in(?![A-Za-z])")
_NOT_EQUAL = re.compile(r"\\ne(?![A-Za-z])")
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\s?\(\s?[a-z](?:\s?,\s?[a-z])*\s?\))?")
_VARIABLE = re.compile(r"\\(?:theta|alpha|beta|lambda|phi)|[A-Za-z](?:_\{?\w+\}?)?")
_DISTANCE = re.compile(r"\|\s*[A-Za-z]\s*\|")
_NAMES = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")
_MATRIX = re.compile(r"\s*\\begin\{([pbBvV]?)matrix\*?\}(.*)\\end\{\1matrix\*?\}\s*", re.DOTALL)
_ARRAY = re.compile(r"\(?\[?\s*\\begin\{array\}\s*(?:\{[^{}]*\})?(.*)\\end\{array\}\s*\)?\]?", re.DOTALL)
_UNIT_TEXT = re.compile(r"(.*[^\s\\])\s*\\(?:text\{([^{}]*)\}|dollar)\s*(?:\^\s*\{?(-?\d)\}?)?", re.DOTALL)
_UNIT_COMPOUND = re.compile(
    r"(.*?[^\s\\/])\s*((?:\\text\{[^{}]*\}\s*(?:\^\s*\{?-?\d\}?)?\s*(?:/|\\cdot)?\s*){2,})"
)
_UNIT_WORDS = re.compile(
    r"(.*[\d})!])(\s*)((?:[A-Za-z]+\.?(?:\s?\^\s?\{?-?\d\}?)?)(?:(?:\s?/\s?|\s)[A-Za-z]+\.?(?:\s?\^\s?\{?-?\d\}?)?){0,4})"
)
_DEGREES = re.compile(r"(.*[^\s^])\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*([CFK]?)\s*")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z]).*\\circ")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_PREFIX = re.compile(
    r"^\s*(?:\\text\{\s*)?(?:the (?:final )?answer is|answer:?|approximately|about|exactly|roughly"
    r"|option)\s*:?\s*\}?\s*",
    re.IGNORECASE,
)
MAX_ITEMS = 200


@dataclass(frozen=True)
class Scalar:
    """One expression."""

    text: str
    unit: Unit = NONE
    percent: bool = False
    approximate: str | None = None
    """What is given after an approximation sign."""


@dataclass(frozen=True)
class Items:
    """Several answers: ``list`` (1, 2), ``set`` (braces), ``tuple`` (parentheses)."""

    items: tuple[Shape, ...]
    kind: str
    is_choice: bool = False
    """They are joined by "or"."""


@dataclass(frozen=True)
class Span:
    """An interval; ends of infinity are open."""

    low: Scalar
    high: Scalar
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals and finite sets on the real line, minus a finite set."""

    pieces: tuple[Shape, ...]
    without: tuple[Scalar, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """Rows of entries. ``fence`` is "v" for a determinant."""

    rows: tuple[tuple[Scalar, ...], ...]
    is_determinant: bool = False


@dataclass(frozen=True)
class Named:
    """``x = ...`` or ``f(x) = ...``"""

    name: str
    value: Shape


@dataclass(frozen=True)
class Equation:
    """An equation whose left side is no single name."""

    left: Scalar
    right: Scalar


@dataclass(frozen=True)
class Words:
    """No mathematics: "Yes", "no solution"."""

    text: str


Shape = Scalar | Items | Span | Region | Matrix | Named | Equation | Words


class UnreadableError(ValueError):
    """A text whose structure is not understood."""


def read(text: str) -> Shape:
    """The structure of a text in canonical notation. Raises UnreadableError."""
    text = _unwrapped(_PREFIX.sub("", text).strip())
    if not text:
        raise UnreadableError("nothing is written")
    matrix = _matrix(text)
    if matrix is not None:
        return matrix
    if (alternatives := _split(text, _OR)) is not None:
        return _alternatives(alternatives)
    if (parts := _split(text, _AND)) is not None:
        return Items(tuple(read(part) for part in parts), "list")
    for reader in (_member, _difference, _union, _inequality, _not_equal, _equation, _bracketed, _plus_minus):
        shape = reader(text)
        if shape is not None:
            return shape
    return _words(text) or _scalar(text)


def _split(text: str, pattern: re.Pattern[str]) -> list[str] | None:
    parts = split_outside(text, pattern)
    if len(parts) < 2:
        return None
    kept = [part.strip() for part in parts if part.strip(" {}")]
    if len(kept) < len([part for part in parts if part.strip()]) or len(kept) > MAX_ITEMS:
        raise UnreadableError("a list with gaps, or too long")
    return kept if len(kept) > 1 else None


def _alternatives(parts: list[str]) -> Shape:
    shapes = [read(part) for part in parts]
    if any(isinstance(shape, Span | Region) for shape in shapes):
        return Region(tuple(shapes))
    names = {shape.name for shape in shapes if isinstance(shape, Named)}
    if len(names) == 1 and isinstance(shapes[0], Named):
        values = tuple(shape.value if isinstance(shape, Named) else shape for shape in shapes)
        return Named(names.pop(), Items(_flattened(values), "list", is_choice=True))
    return Items(_flattened(tuple(shapes)), "list", is_choice=True)


def _flattened(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """``1, 2 or 3`` as three items."""
    flat: list[Shape] = []
    for shape in shapes:
        flat.extend(shape.items if isinstance(shape, Items) and shape.kind == "list" else (shape,))
    return tuple(flat)


def _unwrapped(text: str) -> str:
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        inner = text[1:-1].strip()
        if "," in inner or ";" in inner:
            return rf"\{{{inner}\}}"  # plain braces around a list are a set
        text = inner
    return text


def _member(text: str) -> Shape | None:
    parts = split_outside(text, _IN)
    if len(parts) != 2 or not _VARIABLE.fullmatch(parts[0].strip()):
        return None
    return read(parts[1])


def _difference(text: str) -> Shape | None:
    parts = split_outside(text, _MINUS_SET)
    if len(parts) != 2:
        return None
    removed = read(parts[1])
    if not isinstance(removed, Items) or removed.kind != "set":
        raise UnreadableError("only finite sets are taken away")
    return Region((_region_of(read(parts[0])),), tuple(_only_scalars(removed.items)))


def _region_of(shape: Shape) -> Shape:
    if isinstance(shape, Scalar) and shape.text.replace(" ", "") == r"\mathbb{R}":
        return Span(Scalar(r"-\infty"), Scalar(r"\infty"), True, True)
    return shape


def _union(text: str) -> Shape | None:
    parts = split_outside(text, _CUP)
    return None if len(parts) < 2 else Region(tuple(_region_of(read(part)) for part in parts))


def _inequality(text: str) -> Shape | None:
    parts = split_outside(text, _RELATION)
    signs = [found.strip() for found in _RELATION.findall(text)]
    if len(parts) < 2 or len(signs) != len(parts) - 1 or "=" in text:
        return None
    infinity = Scalar(r"\infty")
    below = Scalar(r"-\infty")
    if len(parts) == 2:
        left, right = (part.strip() for part in parts)
        if _DISTANCE.fullmatch(left):
            return _distance(_pure(right), signs[0])
        if _VARIABLE.fullmatch(left):
            up = signs[0] in (">", r"\ge")
            end, is_open = _pure(right), signs[0] in "<>"
            return Span(end, infinity, is_open, True) if up else Span(below, end, True, is_open)
        if _VARIABLE.fullmatch(right):
            return _inequality(f"{right} {_MIRRORED[signs[0]]} {left}")
        raise UnreadableError("an inequality that is not solved for its variable")
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[1].strip()):
        low, high = _pure(parts[0]), _pure(parts[2])
        opens = [sign in "<>" for sign in signs]
        if all(sign in ("<", r"\le") for sign in signs):
            return Span(low, high, opens[0], opens[1])
        if all(sign in (">", r"\ge") for sign in signs):
            return Span(high, low, opens[1], opens[0])
    raise UnreadableError("an inequality that is not solved for its variable")


_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def _distance(end: Scalar, sign: str) -> Shape:
    """``|x| < 3`` as an interval, ``|x| > 3`` as two."""
    if end.text.startswith("-") or _has_letters(end.text):
        raise UnreadableError("an absolute value that is compared with no positive number")
    is_open, mirrored = sign in "<>", Scalar(f"-({end.text})")
    if sign in ("<", r"\le"):
        return Span(mirrored, end, is_open, is_open)
    low = Span(Scalar(r"-\infty"), mirrored, True, is_open)
    return Region((low, Span(end, Scalar(r"\infty"), is_open, True)))


def _not_equal(text: str) -> Shape | None:
    parts = split_outside(text, _NOT_EQUAL)
    if len(parts) != 2 or not _VARIABLE.fullmatch(parts[0].strip()):
        return None
    return Region((Span(Scalar(r"-\infty"), Scalar(r"\infty"), True, True),), (_pure(parts[1]),))


def _equation(text: str) -> Shape | None:
    parts = [part.strip() for part in split_outside(text, _EQUALS)]
    if len(parts) == 1:
        return None
    if not all(parts):
        raise UnreadableError("an equation with an empty side")
    if _NAME.fullmatch(parts[0]):
        return Named(re.sub(r"\s|\(.*\)", "", parts[0]), read("=".join(parts[1:])))
    if len(parts) == 2 and _NAMES.fullmatch(parts[0]):
        return _named_tuple(parts[0], read(parts[1]))
    if len(parts) > 2 or not _has_letters(text):
        return _chain(parts)
    return Equation(_pure(parts[0]), _pure(parts[1]))


def _named_tuple(names: str, value: Shape) -> Shape:
    """``(x, y) = (1, 2)`` as ``x = 1, y = 2``."""
    listed = [name.strip() for name in names[1:-1].split(",")]
    if not isinstance(value, Items) or value.kind != "tuple" or len(value.items) != len(listed):
        raise UnreadableError("names without as many values")
    return Items(tuple(Named(name, one) for name, one in zip(listed, value.items, strict=True)), "list")


@dataclass(frozen=True)
class Chain(Scalar):
    """``2 + 3 = 5``: the last part is the answer if the others equal it."""

    earlier: tuple[Scalar, ...] = ()


def _chain(parts: list[str]) -> Shape:
    last = _scalar(parts[-1])
    earlier = tuple(_scalar(part) for part in parts[:-1])
    return Chain(last.text, last.unit, last.percent, last.approximate, earlier)


def _has_letters(text: str) -> bool:
    bare = re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", "", text)
    return re.search(r"[A-Za-z]", bare) is not None


def _bracketed(text: str) -> Shape | None:
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2].strip()
        if not inner:
            return Items((), "set")
        if "|" in inner or ":" in inner:
            raise UnreadableError("a set that is described and not listed")
        items = read(inner)
        return Items(items.items if isinstance(items, Items) and items.kind == "list" else (items,), "set")
    if text[0] not in "([" or closing(text, 0) != len(text) - 1:
        return None
    parts = [part.strip() for part in split_outside(text[1:-1], _COMMA)]
    if len(parts) == 1:
        return read(parts[0]) if text[0] + text[-1] == "()" else Items((read(parts[0]),), "list")
    if not all(parts):
        raise UnreadableError("a list with gaps")
    if text[0] + text[-1] == "[]" and all(part.startswith("[") for part in parts):
        return Matrix(tuple(_row(part[1:-1], _COMMA) for part in parts))
    if len(parts) == 2 and (text[0] + text[-1] != "()" or any(r"\infty" in part for part in parts)):
        low, high = _pure(parts[0]), _pure(parts[1])
        return Span(low, high, text[0] == "(", text[-1] == ")")
    if text[0] + text[-1] in ("(]", "[)"):
        raise UnreadableError("an interval has two ends")
    return Items(tuple(read(part) for part in parts), "tuple" if text[0] == "(" else "list")


def _plus_minus(text: str) -> Shape | None:
    if text.count(r"\pm") != 1:
        return None
    return Items((_scalar(text.replace(r"\pm", "+")), _scalar(text.replace(r"\pm", "-"))), "list")


def _matrix(text: str) -> Matrix | None:
    found = _MATRIX.fullmatch(text)
    body, fence = (found.group(2), found.group(1)) if found else ("", "")
    if found is None:
        array = _ARRAY.fullmatch(text)
        if array is None:
            return None
        body = array.group(1)
    rows = [row for row in re.split(r"\\\\", body) if row.strip()]
    return Matrix(tuple(_row(row, re.compile("&")) for row in rows), fence in ("v", "V"))


def _row(text: str, separator: re.Pattern[str]) -> tuple[Scalar, ...]:
    return tuple(_pure(part) for part in split_outside(text, separator))


def _words(text: str) -> Words | None:
    """Words alone, such as ``\text{Yes}`` or "no solution"."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    has_words = re.search(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", bare)) is not None
    if r"\text{" in text and not re.sub(r"\\text\{[^{}]*\}|[\s,.]", "", text):
        return Words(" ".join(bare.split()))
    if has_words and re.fullmatch(r"[A-Za-z][A-Za-z' ,.-]*", bare.strip()):
        return Words(" ".join(bare.split()))
    return None


def _scalar(text: str) -> Scalar:
    """An expression with its unit, percent sign and approximation."""
    parts = [part.strip() for part in split_outside(text, _APPROX)]
    if len(parts) == 2 and all(parts):
        first, second = _scalar(parts[0]), _scalar(parts[1])
        return Scalar(first.text, first.unit or second.unit, first.percent, second.text)
    text = _without_wrapping(text.strip())
    percent = re.fullmatch(r"(.*\S)\s*(?:%|\\text\{\s*(?:percent|per cent|%)\s*\}|percent)", text, re.DOTALL)
    if percent:
        return Scalar(percent.group(1), percent=True)
    currency = re.fullmatch(r"(-?)\s*\\(?:dollar|text\{(?:euro|pound|USD|\$)\})\s*(\S.*)", text, re.DOTALL)
    if currency:
        name = "euro" if "euro" in text else "pound" if "pound" in text else "dollar"
        inner = _scalar(currency.group(1) + currency.group(2))
        return Scalar(inner.text, parse_unit(name) if inner.unit == NONE else inner.unit)
    return _with_unit(text)


def _without_wrapping(text: str) -> str:
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _with_unit(text: str) -> Scalar:
    if _TRIGONOMETRIC.search(text):
        return _pure(_IN_DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text))
    if degrees := _DEGREES.fullmatch(text):
        unit = parse_unit(degrees.group(2) or "degree")
        return Scalar(degrees.group(1).strip(), unit)
    if found := _UNIT_COMPOUND.fullmatch(text):
        return Scalar(
            found.group(1).strip(), parse_unit(re.sub(r"\\text\{([^{}]*)\}", r"\1 ", found.group(2)))
        )
    if found := _UNIT_TEXT.fullmatch(text):
        value, words, power = found.groups()
        if words is not None and re.search(r"\b(?:or|and|not|base)\b", words):
            raise UnreadableError("words that are no unit")
        unit = parse_unit((words or "dollar") + (f"^{power}" if power else ""))
        return Scalar(_pure(value).text, unit)
    if (found := _UNIT_WORDS.fullmatch(text)) and _is_unit(found.group(3), bool(found.group(2))):
        return Scalar(found.group(1).strip(), parse_unit(found.group(3)))
    return _pure(text)


def _is_unit(words: str, has_space: bool) -> bool:
    """Whether bare words after a number are a unit and not variables."""
    first = re.split(r"[^A-Za-z]", words, maxsplit=1)[0]
    if re.search(r"\b(?:mod|and|or|not|choose)\b", words):
        return False
    if len(first) == 1:
        return first in SINGLE and has_space
    return has_space or base_name(first) is not None


def _pure(text: str) -> Scalar:
    """An expression without words. Raises UnreadableError."""
    text = _without_wrapping(text.strip())
    if not text or r"\text" in text or r"\dollar" in text or "%" in text:
        raise UnreadableError("words inside an expression")
    if re.search(r"(?<![\\A-Za-z{])[A-Za-z]{4,}(?![A-Za-z}])", text):
        raise UnreadableError("words inside an expression")
    return Scalar(text)


def _only_scalars(shapes: tuple[Shape, ...]) -> list[Scalar]:
    scalars = [shape for shape in shapes if isinstance(shape, Scalar)]
    if len(scalars) != len(shapes):
        raise UnreadableError("a set of something else than numbers")
    return scalars
