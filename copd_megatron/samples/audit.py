"""Cases for ``rewards.audit``: the samples of a run, or a JSONL file; and the result as text and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.config import load_config
from copd_megatron.errors import DataError
from copd_megatron.rewards.audit import Audit, Case, Grade, Verdict
from copd_megatron.samples.files import Selection, read_samples
from copd_megatron.samples.record import MAX_TEXT_CHARACTERS, Kind, Sample
from copd_megatron.untrusted.json_text import lines_of, load
from copd_megatron.untrusted.visible import visible

_END = re.compile(r"(?:<\|(?!end_of_thought)[\w ]{1,30}\|>|</s>|<eos>|<end_of_turn>)\Z")
"""A special token behind a response, which a run's verifiers do not see."""
_END_CHARACTERS = 34
"""The longest that ``_END`` matches."""
_SHOWN_CHARACTERS = 600
_SHOWN_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A response that is not graded again."""

    name: str
    reason: str


@dataclass(kw_only=True)
class Cases:
    """What is graded again, and what is not: together, all that the source holds and the selection takes."""

    cases: list[Case] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def first(self, limit: int | None) -> Cases:
        """The first so many cases; those behind them are left out."""
        if limit is None:
            return self
        more = [LeftOut(name=case.name, reason=f"beyond the limit of {limit}") for case in self.cases[limit:]]
        return Cases(cases=self.cases[:limit], left_out=[*self.left_out, *more])


def read_cases(source: Path, *, verifier: str | None = None, selection: Selection | None = None) -> Cases:
    """The cases of a run directory, or of a JSONL file with an object a line: ``response``, ``answer`` (or
    ``expected``), ``verifier``, and where they are known ``prompt``, ``metadata``, ``truncated``, and
    ``label`` (a person's verdict: true, false or a number) or ``reward`` (a recorded one).

    Args:
        verifier: grades all of them, whatever they name. None: a run's samples are graded as the run did, by
            its branches' ``reward.terms`` too.
        selection: which samples of a run are wanted.

    Raises DataError: a line that is none of this, or no case at all. FileNotFoundError.
    """
    found = Cases()
    if source.is_dir():
        terms = {} if verifier else _terms(source)
        for sample in read_samples(source, selection):
            if reason := _why_not(sample):
                found.left_out.append(LeftOut(name=_name(sample), reason=reason))
            else:
                found.cases.append(_of_sample(sample, verifier, terms))
    else:
        with open(source, "rb") as file:
            try:
                found.cases = [
                    _of_line(line.text.decode(), f"{source}, line {line.number}", verifier)
                    for line in lines_of(file, source)
                    if line.text.strip()
                ]
            except UnicodeDecodeError as error:
                raise DataError(f"{source} is no text in UTF-8 ({error}).") from error
            except ValueError as error:
                raise DataError(f"{error}.") from error
    if not found.cases:
        why = "".join(f" Left out: {line}." for line in _reasons(found.left_out))
        raise DataError(f"{source} holds no response that can be graded again.{why}")
    return found


def _terms(run_dir: Path) -> dict[str, Mapping[str, float]]:
    """What training rewards consist of, by branch. Raises ConfigError for settings that cannot be read."""
    settings = run_dir / "config.yaml"
    if not settings.exists():
        return {}
    return {name: branch.reward.terms for name, branch in load_config(settings).branches.items()}


def _why_not(sample: Sample) -> str | None:
    """Why a sample cannot be graded again as it was; None: it can."""
    if sample.num_left_out:
        return "the run kept only a part of the response"
    if len(sample.gold) >= MAX_TEXT_CHARACTERS:
        return "the run kept only a part of the gold answer"
    if set(sample.metadata) == {"left_out"}:
        return "the run did not keep the prompt's metadata"
    return "the run did not grade it" if sample.reward is None else None


def _name(sample: Sample) -> str:
    return f"{sample.prompt_id}, step {sample.step}, response {sample.sample_index}"


def _of_sample(sample: Sample, verifier: str | None, terms: Mapping[str, Mapping[str, float]]) -> Case:
    return Case(
        name=_name(sample),
        prompt=sample.prompt,
        response=_without_ends(sample.response),
        answer=sample.gold,
        verifier=verifier or sample.verifier,
        metadata=sample.metadata,
        label=sample.reward,
        terms={} if sample.kind is Kind.validation else terms.get(sample.model, {}),
        truncated=sample.truncated,
        opens_thinking=sample.prompt.rstrip().endswith("<think>"),
    )


def _without_ends(response: str) -> str:
    """The response without special tokens and blanks behind it. From the end backwards: a search from the
    start tries every run of blanks anew."""
    stop = len(response)
    while True:
        while stop and response[stop - 1].isspace():
            stop -= 1
        start = max(0, stop - _END_CHARACTERS)
        token = _END.search(response[start:stop])
        if token is None:
            return response[:stop]
        stop = start + token.start()


def _of_line(line: str, where: str, verifier: str | None) -> Case:
    try:
        given = load(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}).") from error
    answer = given.get("answer", given.get("expected")) if isinstance(given, Mapping) else None
    named = verifier or (given.get("verifier") if isinstance(given, Mapping) else None)
    if (
        not isinstance(answer, str)
        or not isinstance(given.get("response"), str)
        or not isinstance(named, str)
    ):
        raise DataError(f"{where} needs text for response, answer and verifier (or give --verifier).")
    label = given.get("label", given.get("reward"))
    if label is not None and not isinstance(label, bool | int | float):
        raise DataError(f"{where}: label and reward are true, false or a number, not {label!r:.40}.")
    truncated = given.get("truncated", False)
    if not isinstance(truncated, bool):
        raise DataError(f"{where}: truncated is true or false, not {truncated!r:.40}.")
    metadata = given.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise DataError(f"{where}: metadata is no object.")
    return Case(
        name=where.rpartition(", ")[2],
        prompt=str(given.get("prompt", "")),
        response=given["response"],
        answer=answer,
        verifier=named,
        metadata=metadata,
        label=None if label is None else float(label),
        truncated=truncated,
    )


def as_json(audit: Audit, left_out: Sequence[LeftOut] = ()) -> dict[str, Any]:
    """The audit as JSON: counts by label and verdict, what was left out, times, and every disagreement with
    its texts."""
    return {
        "cases": len(audit.verdicts),
        "left_out": [{"case": one.name, "reason": one.reason} for one in left_out],
        "table": [
            {"label": label.value, "verdict": verdict.value, "cases": count}
            for (label, verdict), count in sorted(audit.table.items(), key=str)
        ],
        "milliseconds": {f"p{percent}": round(audit.milliseconds(percent), 3) for percent in (50, 90, 99)},
        "disagreements": [_disagreement(one) for one in audit.disagreements],
    }


def _disagreement(one: Verdict) -> dict[str, Any]:
    return {
        "case": one.case.name,
        "verifier": one.case.verifier,
        "label": one.case.label,
        "reward": one.reward,
        "failed": one.failed,
        "prompt": one.case.prompt,
        "answer": one.case.answer,
        "response": one.case.response,
    }


def _reasons(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """How many were left out for each reason, and the first of them by name."""
    for reason, count in Counter(one.reason for one in left_out).items():
        names = [visible(one.name) for one in left_out if one.reason == reason]
        shown = "; ".join(names[:_SHOWN_NAMES]) + ("; ..." if count > _SHOWN_NAMES else "")
        yield f"{count}, {reason} ({shown})"


def as_lines(audit: Audit, left_out: Sequence[LeftOut] = ()) -> Iterator[str]:
    """The audit for a terminal."""
    verdicts = [grade for grade in Grade if any(one.grade is grade for one in audit.verdicts)]
    yield "label    " + "".join(f"{grade.value:>10}" for grade in verdicts)
    for label in Grade:
        counts = [audit.table[(label, grade)] for grade in verdicts]
        if any(counts):
            yield f"{label.value:9}" + "".join(f"{count:10}" for count in counts)
    times = "  ".join(f"p{percent} {audit.milliseconds(percent):.2f}" for percent in (50, 90, 99))
    yield f"{len(audit.verdicts)} cases, {len(audit.disagreements)} disagree; ms per verdict: {times}"
    if left_out:
        yield f"{len(left_out)} of {len(audit.verdicts) + len(left_out)} responses are left out:"
        yield from (f"  {line}" for line in _reasons(left_out))
    for one in audit.disagreements:
        verdict = "fails" if one.failed else f"says {one.reward:g}"
        yield ""
        yield f"{visible(one.case.name)}: label {one.case.label:g}, {one.case.verifier} {verdict}"
        for name, text in (("gold", one.case.answer), ("response", one.case.response)):
            yield f"  {name}: {visible(_shortened(text))}"


def _shortened(text: str) -> str:
    """Its end, where the answer stands."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"[...] {text[-_SHOWN_CHARACTERS:]}"
