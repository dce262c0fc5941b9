"""The index of pass rates: how many of N sampled responses to each prompt were correct. JSON lines.

    {"settings": {"model": "models/base", "num_samples": 8, "temperature": 1.0, ...}}
    {"shards": {"math-train-000000": "5f0c..."}}
    {"prompt": "math-train-000000/000000017", "num_correct": 3, "num_samples": 8}
    {"prompt": "math-train-000000/000000018", "skipped": "too_long"}

Lines are only ever appended, so that scoring can be interrupted at any time: a torn last line is dropped.
``shards`` holds what the shards were when they were scored: the number of a sample may mean another prompt in
a shard that was written again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from copd_megatron.data.shards import ShardSet
from copd_megatron.data.sole_writer import write_alone
from copd_megatron.errors import DataError
from copd_megatron.untrusted.json_text import load_object, made
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import append_whole, naming, open_appending

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PassRates:
    """An index, read."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """What the rates depend on, as its first line says; empty: nothing is written yet."""
    shards: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the shards, by name."""
    num_correct: dict[str, int | None] = field(default_factory=dict)
    """By prompt id; None: the sample could not be used."""
    num_bytes: int = 0
    """Of all whole lines."""

    @property
    def num_samples(self) -> int:
        """Responses to each prompt."""
        return int(self.settings["num_samples"])

    def check_shards(self, shards: ShardSet, domain: str) -> None:
        """Raises DataError if a shard has changed since it was scored."""
        for index in shards.indexes:
            known = self.shards.get(index.name)
            if known == index.outline:
                logger.warning(
                    "%s is of an earlier version, which knew names and sizes of the samples of shard %s and "
                    "not what they say: that it is the same is taken for granted", self.path, index.path,
                )  # fmt: skip
            elif known is not None and known != index.fingerprint:
                raise DataError(
                    f"{self.path}: shard {index.path} has changed since it was scored, so its samples may be "
                    f"other prompts. Score {domain} anew: copd data difficulty with another --out."
                )

    def _take(self, line: bytes) -> None:
        """Raises ValueError: the line is none of an index."""
        record = load_object(line)
        if "settings" in record:
            self.settings = made(_Settings, record).settings
            made(_NumSamples, {"num_samples": self.settings.get("num_samples")})
        elif "shards" in record:
            self.shards |= made(_Shards, record).shards
        elif "skipped" in record:
            self.num_correct[made(_Skipped, record).prompt] = None
        else:
            rate, wanted = made(_Rate, record), self.settings.get("num_samples")
            if rate.num_samples != wanted or not 0 <= rate.num_correct <= rate.num_samples:
                raise ValueError(
                    f"{rate.num_correct} correct of {rate.num_samples} responses, where {wanted} belong"
                )
            self.num_correct[rate.prompt] = rate.num_correct


@dataclass(frozen=True)
class _Settings:
    settings: dict[str, Any]


@dataclass(frozen=True)
class _NumSamples:
    num_samples: int


@dataclass(frozen=True)
class _Shards:
    shards: dict[str, str]


@dataclass(frozen=True)
class _Skipped:
    prompt: str
    skipped: str


@dataclass(frozen=True)
class _Rate:
    prompt: str
    num_correct: int
    num_samples: int


def read_pass_rates(path: str | Path) -> PassRates:
    """Reads an index; a torn last line is left out.

    Raises:
        DataError: there is no such file, or it is no index of pass rates.
    """
    found = PassRates(path=Path(path))
    try:
        with open_regular(found.path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(
            f"pass rates {found.path}: cannot be read ({error.strerror}). Make the index with copd data "
            "difficulty, or correct data.pass_rates."
        ) from error
    whole = content[: content.rfind(b"\n") + 1]
    found.num_bytes = len(whole)
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found._take(line)
        except ValueError as error:
            raise DataError(
                f"pass rates {found.path}, line {number}: not a line of an index ({error}). Restore the "
                "file, or score the prompts again with another --out."
            ) from error
    if whole and "num_samples" not in found.settings:
        raise DataError(f"pass rates {found.path}: no index, its first line holds no settings.")
    return found


def _may_be_torn(path: Path) -> bool:
    """Whether a file without a whole line is the beginning of an index's first line."""
    begin = b'{"settings": '
    with open_regular(path) as file:
        return file.read(len(begin)) == begin[: path.stat().st_size]


class PassRateWriter:
    """Appends to an index, new or begun before.

    >>> with PassRateWriter("rates.jsonl", settings, shards, "text") as writer:        # doctest: +SKIP
    ...     todo = [ref.id for ref in shards.refs if ref.id not in writer.done]
    ...     writer.append([{"prompt": todo[0], "num_correct": 3, "num_samples": 8}])
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], shards: ShardSet, domain: str) -> None:
        """
        Args:
            settings: all that the rates depend on, as plain JSON values; ``model`` is not compared.

        Raises:
            DataError: the file is an index of other settings, another model or other shards, no index at
                all, or another process is writing it.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_appending(self.path)
        try:
            self._lock()
            begun = read_pass_rates(self.path)
            if not begun.settings and not _may_be_torn(self.path):
                raise DataError(
                    f"{self.path}: is there already and is no index of pass rates; it is left alone. Move "
                    "it, or give another --out."
                )
            self._file.truncate(begun.num_bytes)
            wanted = json.loads(json.dumps(dict(settings), allow_nan=False))
            if begun.settings:
                self._refuse_others(begun.settings, wanted)
            begun.check_shards(shards, domain)
            self.done = frozenset(begun.num_correct)
            now = {index.name: index.fingerprint for index in shards.indexes}
            lines: list[Mapping[str, Any]] = [] if begun.settings else [{"settings": wanted}]
            if fresh := {name: seal for name, seal in now.items() if name not in begun.shards}:
                lines.append({"shards": fresh})
            self.append(lines)
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes lines and waits until they are on the disk.

        Raises:
            OSError: there is no room for them; none is written.
        """
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        append_whole(self._file, text.encode())
        with naming(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        said = f"pass rates {self.path}: another process writes them. Wait for it, or give another --out."
        write_alone(self._file, said)

    def _refuse_others(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = [key for key in now if key != "model" and then.get(key) != now[key]]
        if differ:
            told = "; ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in differ)
            raise DataError(
                f"pass rates {self.path}: made with other settings ({told}), of model {then.get('model')}. "
                "Pass rates of different models or settings cannot be mixed: give another --out, or the "
                "settings and the model of before."
            )
