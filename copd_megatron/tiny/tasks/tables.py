"""Chains of operations that a model has to know by heart, so that it can be wrong in a known way.

A prompt is a domain's tag and a chain such as ``A3s7c2x5``: start with 3, then apply the operations ``s``,
``c`` and ``x`` with their right operands, from left to right. An operation is a table: for every right
operand a permutation of the symbols, so that an early error is never undone by chance. The working is the
values in between, and the answer is the last one: ``<think>41</think>8``.

The same letter means one table in all domains (*shared*) or another one in each (*conflicting*, told apart by
the tag alone); further letters belong to one domain (*own*). So it is known what a domain's tasks can teach
about another's, and what not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

TEXT, IMAGE, VIDEO = "text", "image", "video"
Table = tuple[tuple[int, ...], ...]
"""``table[right][left]`` is the result."""


@dataclass(frozen=True, kw_only=True)
class TableDomain:
    """One domain: its tag, the operations of its chains, and how long they are."""

    name: str
    tag: str
    """First character of its prompts."""
    shared: str = "s"
    """Letters whose table is the same in every domain."""
    conflicting: str = "c"
    """Letters whose table is another one in each domain."""
    own: str
    """Letters that no other domain uses."""
    length: int
    """Operations of a chain."""
    verbose: bool = False
    """Whether the working names the operations: ``s7=4`` in place of ``4``. The answer is then longer and as
    hard."""
    medium: str = TEXT
    """Where the number stands that a chain starts from: in the prompt, or in an image or a video before it
    (``table_media``)."""

    @property
    def letters(self) -> str:
        return self.shared + self.conflicting + self.own

    def key(self, letter: str) -> str:
        """Name of the table that a letter means here."""
        return letter + self.tag if letter in self.conflicting else letter


@dataclass(frozen=True, kw_only=True)
class TableWorld:
    """The tables of some domains, and what the base believes of them. The seed determines both."""

    domains: tuple[TableDomain, ...]
    num_symbols: int = 8
    """Digits 0 .. num_symbols - 1; at most 10."""
    wrong_share: float = 0.4
    """Share of the facts of a table of which the base believes something wrong."""
    sureness: float = 0.8
    """How often the base says what it believes, where the belief is right; the rest is spread over all
    symbols."""
    error_sureness: float = 0.8
    """How often it says what it believes, where the belief is wrong."""
    doubt: float = 0.1
    """How often it says the truth nevertheless, so that sampling can find it; the rest is spread."""
    seed: int

    @cached_property
    def tables(self) -> Mapping[str, Table]:
        """The tables by key (``TableDomain.key``)."""
        return {key: self._table(key) for key in self._keys}

    @cached_property
    def beliefs(self) -> Mapping[str, Table]:
        """What the base believes, in the tables' layout."""
        return {key: self._believed(key, table) for key, table in self.tables.items()}

    @property
    def _keys(self) -> list[str]:
        return list(dict.fromkeys(d.key(letter) for d in self.domains for letter in d.letters))

    def _random(self, *parts: object) -> random.Random:
        text = "/".join(map(str, (self.seed, *parts)))
        return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))

    def _table(self, key: str) -> Table:
        rng = self._random("table", key)
        symbols = range(self.num_symbols)
        return tuple(tuple(rng.sample(symbols, self.num_symbols)) for _ in symbols)

    def _believed(self, key: str, table: Table) -> Table:
        rng = self._random("belief", key)
        facts = [(right, left) for right in range(self.num_symbols) for left in range(self.num_symbols)]
        wrong = set(rng.sample(facts, round(self.wrong_share * len(facts))))
        return tuple(
            tuple(
                rng.choice([s for s in range(self.num_symbols) if s != result])
                if (right, left) in wrong
                else result
                for left, result in enumerate(row)
            )
            for right, row in enumerate(table)
        )

    def says(self, key: str, right: int, left: int, rng: random.Random) -> int:
        """What the base says a step gives, drawn."""
        believed, true = self.beliefs[key][right][left], self.tables[key][right][left]
        draw = rng.random()
        if draw < (self.sureness if believed == true else self.error_sureness):
            return believed
        if believed != true and draw < self.error_sureness + self.doubt:
            return true
        return rng.randrange(self.num_symbols)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One task."""

    domain: TableDomain
    start: int
    steps: tuple[tuple[str, int], ...]
    """Operation's letter and right operand."""

    @property
    def identity(self) -> str:
        """What tells tasks of a domain apart."""
        return f"{self.domain.tag}{self.start}" + self._operations

    @property
    def prompt(self) -> str:
        """Its text; the number to start from is left out if a medium shows it."""
        return self.identity if self.domain.medium == TEXT else self.domain.tag + self._operations

    @property
    def _operations(self) -> str:
        return "".join(f"{letter}{right}" for letter, right in self.steps)

    def values(self, world: TableWorld, rng: random.Random | None = None) -> list[int]:
        """The value after each step: the true ones or, with a random source, what the base says."""
        found, value = [], self.start
        for letter, right in self.steps:
            key = self.domain.key(letter)
            value = world.tables[key][right][value] if rng is None else world.says(key, right, value, rng)
            found.append(value)
        return found


def respond(chain: Chain, values: Sequence[int]) -> str:
    """The response that works through these values, one for each step of the chain."""
    *between, answer = values
    steps = [
        f"{letter}{right}={value}" if chain.domain.verbose else str(value)
        for (letter, right), value in zip(chain.steps, between, strict=False)
    ]
    return f"<think>{''.join(steps)}</think>{answer}"


def response_length(domain: TableDomain) -> int:
    """Tokens of a response: thinking marks, working, answer and end of turn, a byte each."""
    return (domain.length - 1) * (4 if domain.verbose else 1) + 4


def chains(world: TableWorld, domain: TableDomain, rng: random.Random) -> Iterator[Chain]:
    """An endless stream of tasks, with repetitions."""
    symbols = range(world.num_symbols)
    while True:
        steps = tuple((rng.choice(domain.letters), rng.choice(symbols)) for _ in range(domain.length))
        yield Chain(domain=domain, start=rng.choice(symbols), steps=steps)


def num_chains(world: TableWorld, domain: TableDomain) -> int:
    """How many prompts a domain has."""
    return world.num_symbols * (len(domain.letters) * world.num_symbols) ** domain.length


def distinct_chains(world: TableWorld, domain: TableDomain, count: int) -> list[Chain]:
    """``count`` tasks of which no two are the same, in an order that the world's seed determines.

    Raises:
        ValueError: there are fewer.
    """
    if count > (possible := num_chains(world, domain)):
        raise ValueError(f"domain {domain.name!r} has {possible} prompts, and {count} were asked for")
    rng = world._random("prompts", domain.name)
    found: dict[str, Chain] = {}
    for chain in chains(world, domain, rng):
        found.setdefault(chain.identity, chain)
        if len(found) == count:
            break
    return list(found.values())
