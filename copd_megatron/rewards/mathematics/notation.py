r"""One notation for what LaTeX, Unicode and plain text write in many ways."""

from __future__ import annotations

import re
import unicodedata

from copd_megatron.untrusted.unicode_text import nfkc

_FUNCTIONS = (
    *("sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "pi", "theta", "alpha", "beta", "infty", "lambda", "phi", "pm"),
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = {
    **dict.fromkeys("−–—‐‑", "-"),  # noqa: RUF001
    **{"×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/"},  # noqa: RUF001
    **{"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "∞": r"\infty "},  # noqa: RUF001
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∪": r"\cup ",  # noqa: RUF001
        "∩": r"\cap ",
    },
    **{
        "∅": r"\emptyset ",
        "∈": r"\in ",
        "ℝ": r"\mathbb{R}",  # noqa: RUF001
        "ℤ": r"\mathbb{Z}",  # noqa: RUF001
        "°": r"^\circ ",
        "…": r"\ldots ",
    },
    **{"∨": r"\lor ", "∧": r"\land ", "＝": "=", "，": ",", "（": "(", "）": ")", "％": "%", "′": "'"},  # noqa: RUF001
    **{"€": r"\text{euro}", "£": r"\text{pound}", "∖": r"\setminus ", "√": r"\sqrt "},  # noqa: RUF001
}
_LITERAL = (
    (r"\left\{", r"\{"), (r"\right\}", r"\}"), (r"\lbrace", r"\{"), (r"\rbrace", r"\}"),
    (r"\{,\}", ","), ("{,}", r"\,"), (r"\%", "%"), (r"\$", r"\dollar "), ("**", "^"), ("<=", r"\le "),
    (">=", r"\ge "), ("!=", r"\ne "), (r"\lvert", "|"), (r"\rvert", "|"), (r"\vert", "|"), (r"\mid", "|"),
    (r"\langle", "("), (r"\rangle", ")"), (r"\colon", ":"), (r"\degree", r"^\circ "), (r"\\[1ex]", r"\\"),
)  # fmt: skip
_RENAMED = {
    **dict.fromkeys(("leq", "leqslant", "leqq"), r"\le "),
    **dict.fromkeys(("geq", "geqslant", "geqq"), r"\ge "),
    **{
        "lt": "<",
        "gt": ">",
        "neq": r"\ne ",
        "times": r"\cdot ",
        "ast": r"\cdot ",
        "div": "/",
        "dfrac": r"\frac",
    },
    **{"tfrac": r"\frac", "cfrac": r"\frac", "varnothing": r"\emptyset ", "to": r"\to ", "dbinom": r"\binom"},
    **{"simeq": r"\approx ", "sim": r"\approx ", "vee": r"\lor ", "wedge": r"\land ", "tbinom": r"\binom"},
    **{
        "dots": r"\ldots ",
        "cdots": r"\ldots ",
        "backslash": r"\setminus ",
        "exponentialE": "e",
        "ne": r"\ne ",
    },
    **{"lparen": "(", "rparen": ")", "lbrack": "[", "rbrack": "]", "arcsin": r"\arcsin", "iff": r"\iff "},
}
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|Biggl?|Biggr?"
    r"|quad|qquad|hfill|medspace|thinspace|boldsymbol|mathstrut|nolimits)(?![A-Za-z])\.?|(?<!\\)\\[;:]|\\phantom\{[^{}]*\}"
)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|operatorname|mbox|hbox|rm|bf)"
    r"\s*\{([^{}]*)\}"
)
_VULGAR = re.compile("([0-9]?)([\u00bc-\u00be\u2150-\u215e])")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:(?:\\,|,|~|\\ )\d{3})+|\d{1,3}(?: \d{3})+)(?![\d,~]|\\,| \d)")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+)\\,(\d+)(?![\d,])")
_CURRENCY = re.compile(r"(?<!\\)\$\s?(?=-?\d)")


def canonical(text: str) -> str:
    """The text in one notation: ASCII, LaTeX commands for functions and relations, no delimiters or spacing.

    What it means is not checked; the readers after this one refuse what they do not know.
    """
    text = _plain_letters(text)
    text = _without_dollars(text)
    for written, plain in _LITERAL:
        text = text.replace(written, plain)
    text = re.sub(r"(?<!\\)\\!", "", text)
    text = _DROPPED.sub(" ", text)
    text = re.sub(r"\\(?:dot|bar|overline)\s*\{?(\d+)\}?(?!\w)", r"\\overline{\1}", text)
    text = _COMMAND.sub(lambda found: _RENAMED.get(found.group(1), found.group()), text)
    text = re.sub(r"\\[()\[\]](?!\d+ex)", " ", text) if "matrix" not in text else text
    text = _TEXT.sub(_text, text)
    text = _numbers(text)
    text = re.sub(r"(?<!\\)\\[, ]|~", " ", text)
    text = _functions(text)
    text = re.sub(r"\s+", " ", text).strip()
    return text[:-1].rstrip() if text.endswith((".", ";")) and not text.endswith("..") else text


def _plain_letters(text: str) -> str:
    text = _VULGAR.sub(_vulgar, text)
    text = re.sub("√\\s*(\\d+(?:\\.\\d+)?|[a-z])", r"\\sqrt{\1}", text)
    text = re.sub("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+", lambda found: f"^{{{found.group().translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda found: f"_{{{found.group().translate(_SUBSCRIPTS)}}}", text)
    if text.isascii():
        return text
    text = "".join(_SYMBOLS.get(letter, letter) for letter in text)
    text = "".join(str(unicodedata.decimal(letter, letter)) for letter in text)
    return nfkc(text)


def _vulgar(found: re.Match[str]) -> str:
    whole, fraction = found.groups()
    written = nfkc(fraction).replace("⁄", "/")  # noqa: RUF001
    return f"{whole} {written}" if whole else written


def _without_dollars(text: str) -> str:
    """Dollar signs are delimiters in pairs and a currency alone."""
    count = len(re.findall(r"(?<!\\)\$", text))
    if count % 2:
        text = _CURRENCY.sub(r"\\dollar ", text)
    return re.sub(r"(?<!\\)\$", " ", text)


def _text(found: re.Match[str]) -> str:
    """What stands in a text command: a letter, a function, or words."""
    words = found.group(1).strip()
    if re.fullmatch(r"[A-Za-z]", words):
        is_symbol = not found.group().startswith((r"\text{", r"\mbox", r"\hbox")) or words in "ei"
        return words if is_symbol else rf"\text{{{words}}}"
    if words in _FUNCTIONS:
        return rf"\{words} "
    if re.fullmatch(r"[-+]?[\d.,]+%?", words):
        return words
    if re.fullmatch(r"[-+]?\d[\d.,]*%?\s[A-Za-z].*", words):
        number, _, unit = words.partition(" ")
        return rf"{number} \text{{{unit}}}"
    return rf" \text{{{words}}} "


def _numbers(text: str) -> str:
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found.group()), text)
    text = _DECIMAL_COMMA.sub(lambda found: f"{found.group(1)}.{found.group(2)}", text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.])", r"\1 \\cdot 10^{\2}", text)
    return re.sub(r"(?<=\d)\s?[xX]\s?(?=10\^)", r" \\cdot ", text)


def _functions(text: str) -> str:
    names = "|".join(sorted(_FUNCTIONS, key=len, reverse=True))
    outside = re.split(r"(\\text\{[^{}]*\})", text)
    for index in range(0, len(outside), 2):
        part = re.sub(rf"(?<![\\A-Za-z])({names})(?![A-Za-z])", r"\\\1 ", outside[index])
        part = re.sub(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty ", part)
        outside[index] = re.sub(r"\*", r" \\cdot ", part)
    return _arguments("".join(outside))


def _arguments(text: str) -> str:
    r"""Braces around the arguments of ``\sqrt``, ``\frac`` and exponents that are written without."""
    text = re.sub(r"\\(sqrt|frac|binom) +", r"\\\1", text)
    for name in (r"\sqrt", "^"):
        text = _braced(text, name)
    text = re.sub(r"\\sqrt(\d|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
    text = re.sub(r"\\log\s?_\s?(\d)", r"\\log_{\1}", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d|[a-z])\s?(?=\{)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\d|[a-z])", r"\1{\2}", text)
    text = re.sub(r"\\frac(\d|\\pi ?)(\d|\\pi)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^\s*([-+]\d+)", r"^{\1}", text)
    return re.sub(r"\^\s*(\d{2,})", r"^{\1}", text) if re.search(r"\^\s*\d{2}", text) else text


def _braced(text: str, name: str) -> str:
    """``name(...)`` as ``name{...}``, where the parentheses balance."""
    start = text.find(name + "(")
    while start >= 0:
        opening = start + len(name)
        end = closing(text, opening)
        if end is None:
            return text
        text = f"{text[:opening]}{{{text[opening + 1 : end]}}}{text[end + 1 :]}"
        start = text.find(name + "(", opening)
    return text


_PAIRS = {"(": ")", "[": "]", "{": "}"}


def closing(text: str, opening: int) -> int | None:
    """Where the bracket at ``opening`` is closed, brackets of any kind counted; None where it is not."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "([{":
            depth += 1
        elif text[position] in ")]}":
            depth -= 1
            if depth == 0:
                return position
    return None


def split_outside(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The text split where the pattern matches outside of all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if depth == 0 and (found := pattern.match(text, position)) and found.end() > position:
            parts.append(text[start:position])
            start = position = found.end()
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        position += 1
    return [*parts, text[start:]]
