"""Scores of the reasoning-gym families whose own scorer must not be used, and the list of those that may.

In version 0.1.25 nine families hand the response to ``eval`` or to sympy's ``parse_expr``, which ends in
``eval`` too: whatever a model writes runs in the grading process. Two more evaluate the gold answer or the
metadata of the sample, which come from a file. One gives every answer that is not empty a full score. Their
scores are computed here, from parsed text (``parsing/``); a family that is neither here nor in
``SCORED_BY_LIBRARY`` has not been read, and is refused.

A right or wrong answer scores as in the library, partial credit included, with four exceptions, all of them
holes that a policy would find: ``puzzle24`` accepts its own four numbers only (the library: any four from 1
to 10) and only a result of exactly 24 (the library: 24.9, too); ``countdown`` and ``puzzle24`` accept the
operators that the task names (the library: ``**`` and factorials, too); the integration families do not
accept ``Integral(<the integrand>, x)``; ``game_of_life_halting`` compares.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from copd_megatron.rewards.parsing.arithmetic import calculate, calculate_integer
from copd_megatron.rewards.parsing.literals import literal
from copd_megatron.rewards.parsing.symbolic import formula, sympy
from copd_megatron.rewards.parsing.syntax import NotUnderstoodError, reading

Entry = Mapping[str, Any]
"""A task as reasoning-gym makes it: ``question``, ``answer``, ``metadata``."""
Score = Callable[[str, Entry], float]
"""(answer, entry) -> score from 0 to 1. May raise NotUnderstoodError for answers that it cannot read."""

AS_A_LIST = 0.1
"""For the right cells in the wrong form: a Python list."""


class UnreadFamilyError(ValueError):
    """A family whose scorer nobody has read: it might evaluate the response."""


def _string_insertion(answer: str, entry: Entry) -> float:
    if answer == entry["answer"]:
        return 1.0
    return AS_A_LIST * (_joined("", literal(answer)) == entry["answer"])


def _spiral_matrix(answer: str, entry: Entry) -> float:
    gold, answer = entry["answer"].strip(), answer.strip()
    if answer == gold:
        return 1.0
    return AS_A_LIST * (" ".join(str(item) for item in _items(literal(answer))) == gold)


def _binary_matrix(answer: str, entry: Entry) -> float:
    if answer == entry["answer"]:
        return 1.0
    rows = [" ".join(str(cell) for cell in _items(row)) for row in _items(literal(answer))]
    return AS_A_LIST * ("\n".join(rows) == entry["answer"])


def _n_queens(answer: str, entry: Entry) -> float:
    valid = entry["metadata"]["valid_answers"]
    if answer in valid:
        return 1.0
    board = "\n".join(_joined(" ", row) for row in _items(literal(answer)))
    return 0.5 * (board in valid)


def _countdown(answer: str, entry: Entry) -> float:
    result = calculate(answer.strip())
    if sorted(result.numbers) != sorted(entry["metadata"]["numbers"]):
        return 0.05
    return 1.0 if result.value == entry["metadata"]["target"] else 0.05


def _puzzle24(answer: str, entry: Entry) -> float:
    result = calculate(answer.strip())
    return float(result.value == 24 and sorted(result.numbers) == sorted(entry["metadata"]["numbers"]))


def _integration(answer: str, entry: Entry) -> float:
    library = sympy()
    integrand = formula(entry["metadata"]["integrand"])
    with reading():
        derivative = library.diff(formula(answer), library.Symbol(entry["metadata"]["variable"]))
        return float(library.simplify(derivative - integrand) == 0)


def _polynomial_multiplication(answer: str, entry: Entry) -> float:
    return float(bool(formula(answer) == formula(entry["answer"])))


def _number_sorting(answer: str, entry: Entry) -> float:
    gold = [float(number) for number in _items(literal(entry["answer"]))]
    with reading():
        found = [float(number) for number in _items(json.loads(answer.replace("'", '"')))]
    ordered = sorted(found, reverse=entry["metadata"]["direction"] != "ascending")
    near = len(found) == len(gold) and all(abs(a - b) <= 1 for a, b in zip(found, gold, strict=True))
    return float(near and found == ordered)


def _bitwise_arithmetic(answer: str, entry: Entry) -> float:
    gold = calculate_integer(entry["metadata"]["problem"])
    with reading():
        return float(int(answer, 0) == gold)


def _game_of_life_halting(answer: str, entry: Entry) -> float:
    return float(answer.strip().casefold() == str(entry["answer"]).casefold())


def _items(value: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise NotUnderstoodError(f"{type(value).__name__} where a list is expected")
    return value


def _joined(separator: str, value: object) -> str:
    """Strings of a list, or the characters of a string, put together."""
    parts = list(value) if isinstance(value, str) else _items(value)
    if not all(isinstance(part, str) for part in parts):
        raise NotUnderstoodError("a list of strings is expected")
    return separator.join(parts)


SCORED_HERE: Mapping[str, Score] = {
    "binary_matrix": _binary_matrix,
    "bitwise_arithmetic": _bitwise_arithmetic,
    "countdown": _countdown,
    "game_of_life_halting": _game_of_life_halting,
    "intermediate_integration": _integration,
    "n_queens": _n_queens,
    "number_sorting": _number_sorting,
    "polynomial_multiplication": _polynomial_multiplication,
    "puzzle24": _puzzle24,
    "simple_integration": _integration,
    "spiral_matrix": _spiral_matrix,
    "string_insertion": _string_insertion,
}

FLOOR: Mapping[str, float] = {"countdown": 0.01, "puzzle24": 0.01}
"""Least score of a family, for an answer that it cannot read."""

REFUSED: Mapping[str, str] = {
    "composite": "it stands for other families; name the one in the entry's source_dataset",
}
"""Families that cannot be graded, and why."""

_READ = """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation boxnet
caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation
complex_arithmetic count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum
dice emoji_mystery family_relationships figlet_font fraction_simplification futoshiki game_of_life gcd
graph_color group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves
largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle
manipulate_matrix maze mini_sudoku modulo_grid needle_haystack number_filtering number_format
number_sequence palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix
power_function prime_factorization products propositional_logic quantum_lock ransom_note rearc
rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering
shortest_path simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting
string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_ladder
word_sequence_reversal word_sorting zebra_puzzles
"""
SCORED_BY_LIBRARY = frozenset(_READ.split())
"""Families whose scorer has been read, down to the library's own helpers: it compares, counts or replays
moves, and evaluates neither the response nor the sample. Read again after an upgrade of the library."""


UNREADABLE: Mapping[str, re.Pattern[str]] = {
    # Fraction("1e999999999") is written out before it is compared
    "coin_flip": re.compile(r"[eE][+-]?\d{4}"),
    # the distance to "nan" is below every bound: a full score
    "complex_arithmetic": re.compile("nan|inf", re.IGNORECASE),
    # any words have as many solutions as an equation without real ones, whose answer is an empty string
    "polynomial_equations": re.compile(r"""^(?!\s*(?:""|'')?\s*$)(?!.*\d)""", re.DOTALL),
    # moves are made one square at a time
    "rush_hour": re.compile(r"\d{4}"),
}
"""Answers that score 0 unread, by family, because the library's scorer takes them for right or for ever."""


def score(family: str, answer: str, entry: Entry, library: Callable[[str], Score]) -> float:
    """The family's score of an answer, 0 to 1.

    ``library`` gives the scorer of a family whose scorer may be used.

    Raises UnreadFamilyError for a family that is on no list here, and what the scorer raises where the sample
    itself cannot be graded.
    """
    if family in SCORED_HERE:
        try:
            value = SCORED_HERE[family](answer, entry)
        except NotUnderstoodError:
            value = 0.0
        return max(value, FLOOR.get(family, 0.0))
    if family in SCORED_BY_LIBRARY:
        unreadable = UNREADABLE.get(family)
        if unreadable is not None and unreadable.search(answer):
            return 0.0
        return _scored_by_library(library(family), answer, entry)
    reason = REFUSED.get(family, "its scorer has not been read, and might evaluate what a model writes")
    raise UnreadFamilyError(
        f"reasoning-gym family {family!r} is refused: {reason}. Leave its samples out, or, once its "
        "score_answer has been read, add it to copd_megatron/rewards/reasoning_gym_scores.py."
    )


def _scored_by_library(scorer: Score, answer: str, entry: Entry) -> float:
    """0 where the scorer fails on the answer; its error where it fails on the gold answer, too."""
    try:
        value = float(scorer(answer, entry))
    except Exception:  # several scorers raise whatever int(), a list or a key raises on a wrong answer
        scorer(entry["answer"], entry)
        return 0.0
    return value if math.isfinite(value) else 0.0
