"""Verdicts of an evaluation, prompt by prompt, in a file that grows as they come.

One folder for each model and way of measuring it: ``settings.json`` says which, ``verdicts.jsonl`` has a line
for each prompt. An evaluation that is started again goes on where the file ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from copd_megatron.data.sole_writer import write_alone
from copd_megatron.errors import DataError
from copd_megatron.metrics.writers import drop_torn_line
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.final_answer import final_answer
from copd_megatron.untrusted.json_text import lines_of, load_object, loadable, made
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import append_whole, open_appending, write_whole

_MAX_ANSWER_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class PromptVerdicts:
    """What a model's responses to one prompt were worth; the lists have one element per response."""

    domain: str
    prompt: str
    """``Prompt.group_id``."""
    verifier: str
    metadata: Mapping[str, Any]
    rewards: Sequence[float | None]
    """None: not graded."""
    answers: Sequence[str]
    """Final answers, as far as 200 characters; empty where there is none."""
    truncated: Sequence[bool]
    num_tokens: Sequence[int]

    @property
    def graded(self) -> list[float]:
        """The rewards that were given."""
        return [reward for reward in self.rewards if reward is not None]


def verdicts_of(prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptVerdicts:
    """From the graded responses to one prompt, in the order of their sample index."""
    return PromptVerdicts(
        domain=prompt.domain,
        prompt=prompt.group_id,
        verifier=prompt.verifier,
        metadata=loadable(prompt.metadata),
        rewards=[r.reward for r in rollouts],
        answers=[final_answer(r.text).text[:_MAX_ANSWER_CHARACTERS] for r in rollouts],
        truncated=[r.truncated for r in rollouts],
        num_tokens=[r.response_length for r in rollouts],
    )


class VerdictFile:
    """The verdicts of one model. One process writes; reading changes nothing."""

    def __init__(self, out: Path, label: str, settings: Mapping[str, Any]) -> None:
        """
        Args:
            out: folder of several models' verdicts.
            label: what the model is called.
            settings: all that the verdicts depend on, the model's content included. Other settings have
                another folder, so that verdicts of two kinds never mix.
        """
        self._text = json.dumps(settings, indent=2, sort_keys=True, allow_nan=False) + "\n"
        digest = hashlib.blake2b(self._text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        self.folder = out / f"{label}-{digest}"
        self._path = self.folder / "verdicts.jsonl"
        self._held: FileIO | None = None

    def begin(self, *, anew: bool) -> None:
        """Makes the folder ready to be appended to, by nobody else until ``close``; ``anew`` forgets what is
        there.

        Raises:
            DataError: another process appends to it.
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        held = self._held or self._hold()
        if anew:
            held.truncate(0)
        write_whole(self.folder / "settings.json", self._text.encode("utf-8", "surrogatepass"))
        drop_torn_line(self._path)

    def close(self) -> None:
        """Lets others append."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _hold(self) -> FileIO:
        file = open_appending(self._path)
        try:
            write_alone(
                file, f"{self.folder}: another copd eval writes it. Wait for it, or give another --out."
            )
        except BaseException:
            file.close()
            raise
        self._held = file
        return file

    def append(self, verdicts: Sequence[PromptVerdicts]) -> None:
        """Adds whole lines or, where the disk is full, nothing.

        Raises:
            OSError: they cannot be written.
        """
        lines = [
            json.dumps(asdict(v), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
            for v in verdicts
        ]
        with open_appending(self._path) as file:
            append_whole(file, "".join(lines).encode("utf-8", "surrogatepass"))

    def read(self) -> list[PromptVerdicts]:
        """What is there; an incomplete last line is none.

        Raises:
            DataError: a line holds something else; names it.
        """
        try:
            with open_regular(self._path) as file:
                lines = list(lines_of(file, self._path))
        except FileNotFoundError:
            return []
        return [_from_line(text, f"{self._path}, line {number}") for number, text, whole in lines if whole]


def _from_line(line: bytes, where: str) -> PromptVerdicts:
    try:
        found = made(PromptVerdicts, load_object(line))
        if len({len(found.rewards), len(found.answers), len(found.truncated), len(found.num_tokens)}) != 1:
            raise ValueError("its lists differ in length")
    except ValueError as error:
        raise DataError(f"{where}: not verdicts ({error}). Remove the file, or --overwrite.") from error
    return found
