"""Grading rollouts: whatever a verifier does, grading ends, and a grade depends on its own response alone."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from copd_megatron.config.schema import RewardConfig
from copd_megatron.records import LARGEST_REWARD, Prompt, Rollout
from copd_megatron.rewards import registry
from copd_megatron.rewards.final_answer import Source, final_answer
from copd_megatron.rewards.isolation import Call, Outcome, PoolRun, WorkerPool
from copd_megatron.rewards.registry import Verifier
from copd_megatron.rewards.terms import OWN, terms_of

logger = logging.getLogger(__name__)

_LOGGED_PER_KIND = 3


class Grader:
    """Runs the verifiers that rollouts name.

    Cheap verifiers run here, the others in processes of their own (``isolation.py``) under
    ``timeout_seconds`` each. A verifier that raises, hangs, dies or returns no number within
    ``LARGEST_REWARD`` scores its sample 0; that is counted by verifier and reason, and logged with the
    sample's name (the first few of each kind). Truncated responses are graded like all others. Equal
    responses to one prompt are graded once per call.

    A response that nobody had time to grade is another matter: its reward stays None, it is counted as
    ``ungraded``, and whoever trains on rewards leaves it out.

    Args:
        config: the branch's verifiers, time limit and number of processes.
        also: further verifiers, beyond ``config.verifiers``, that rollouts may name: those of other branches
            whose prompts this one answers.
        max_seconds: the most that one call of ``grade`` takes; None: as long as the verifiers need. With
            other ranks waiting for this one, it must stay well below the time after which they give up.
        terms: weights by verifier, as ``RewardConfig.terms``, which every rollout is graded by; empty: each
            by the verifier that it names.

    Raises UnknownVerifierError at construction for names that cannot be resolved.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        also: Iterable[str] = (),
        max_seconds: float | None = None,
        terms: Mapping[str, float] | None = None,
    ) -> None:
        self._terms = dict(terms or {})
        names = [*config.verifiers, *also, *(name for name in self._terms if name != OWN)]
        self._verifiers = registry.resolve(names)
        self._pool = WorkerPool(config.num_workers, config.timeout_seconds)
        self._max_seconds = max_seconds
        self._counts: Counter[str] = Counter()

    @property
    def verifier_names(self) -> frozenset[str]:
        """Names that samples may use."""
        return frozenset(self._verifiers)

    def grade(self, rollouts: Sequence[Rollout], terms: Mapping[str, float] | None = None) -> list[Rollout]:
        """The rollouts with their rewards, in order; None where the time was up.

        ``terms`` as for ``begin``.

        Raises ValueError for a rollout whose verifier is not among this grader's (the data check refuses
        such samples before training), RuntimeError if no process can be started that runs
        a verifier.
        """
        with self.begin(terms) as grading:
            return grading.finish(rollouts)

    def begin(self, terms: Mapping[str, float] | None = None) -> Grading:
        """Grading that goes on beside something else, such as the sampling of further responses.

        ``terms``: weights instead of the grader's own; empty: each response by the verifier that it names.
        """
        return Grading(self, self._pool.begin(), self._terms if terms is None else terms)

    def _shares(self, prompt: Prompt, weights: Mapping[str, float]) -> list[_Share]:
        """What the reward of a response to this prompt consists of."""
        terms = terms_of(prompt.verifier, prompt.metadata, weights)
        return [
            _Share(
                number=number,
                weight=term.weight,
                prompt=dataclasses.replace(
                    prompt,
                    verifier=term.verifier,
                    answer=prompt.answer if term.answer is None else term.answer,
                    metadata=term.settings(prompt.metadata),
                ),
            )
            for number, term in enumerate(terms)
        ]

    def _reward(
        self, rollout: Rollout, shares: Sequence[_Share], outcomes: Mapping[_Key, Outcome]
    ) -> float | None:
        found = [outcomes[_key(rollout, share)] for share in shares]
        if any(outcome.reason == "given_up" for outcome in found):
            self._counts["ungraded"] += 1
            return None
        self._counts["graded"] += 1
        total = sum(
            share.weight * self._settle(share.prompt, rollout.sample_index, outcome)
            for share, outcome in zip(shares, found, strict=True)
        )
        return self._settle(rollout.prompt, rollout.sample_index, Outcome(value=total))

    def counters(self) -> dict[str, int]:
        """Totals since the start: ``graded``, ``failed`` (of these), ``failed_<verifier>_<reason>``, and
        ``ungraded`` if there were any."""
        return {"graded": 0, "failed": 0, **self._counts}

    def restore_counters(self, counts: Mapping[str, int]) -> None:
        """Goes on counting from totals that ``counters`` gave before."""
        self._counts = Counter(counts)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _verifier_of(self, rollout: Rollout) -> Verifier:
        name = rollout.prompt.verifier
        if name not in self._verifiers:
            raise ValueError(
                f"prompt {rollout.prompt.prompt_id!r} of domain {rollout.prompt.domain!r} names verifier "
                f"{name!r}, which this grader lacks (it has {sorted(self._verifiers)}). Add it to the "
                "branch's reward.verifiers."
            )
        return self._verifiers[name]

    def _warn_of_ungraded(self, outcomes: Collection[Outcome]) -> None:
        given_up = sum(outcome.reason == "given_up" for outcome in outcomes)
        if given_up:
            logger.warning(
                "%d of %d different responses are left ungraded, and out of training: verifiers hang or "
                "are too slow for the %g s that grading may take. Lower reward.timeout_seconds, raise "
                "reward.num_workers, or look at the samples that time out.",
                given_up,
                len(outcomes),
                self._max_seconds,
            )

    def _settle(self, prompt: Prompt, sample_index: int, outcome: Outcome) -> float:
        """The value that counts; a failure is counted and logged."""
        value, reason, message = outcome.value, outcome.reason, outcome.message
        if value is not None and not abs(value) <= LARGEST_REWARD:  # NaN, too
            reason, message = "bad_value", f"returned {value}; a reward lies within ±{LARGEST_REWARD:g}"
        if value is not None and reason is None:
            return value
        kind = f"failed_{prompt.verifier}_{reason}"
        self._counts["failed"] += 1
        self._counts[kind] += 1
        if self._counts[kind] <= _LOGGED_PER_KIND:
            last = self._counts[kind] == _LOGGED_PER_KIND
            logger.warning(
                "%s: verifier %r failed on sample %s, response %d, which scores 0 (%s: %s)%s",
                prompt.domain,
                prompt.verifier,
                prompt.prompt_id,
                sample_index,
                reason,
                message,
                "; further ones of this kind are only counted" if last else "",
            )
        return 0.0


class Grading:
    """Responses of one batch, graded as they come. A grade does not depend on when it is asked for.

    Its own thread is the caller's: between two of its steps it calls ``poll``. An error in ``add`` or
    ``poll`` is raised by ``finish``, so that it does not look like one of what goes on beside.
    """

    def __init__(self, grader: Grader, run: PoolRun, terms: Mapping[str, float]) -> None:
        self._grader, self._run, self._terms = grader, run, terms
        self._shares: dict[int, list[_Share]] = {}
        self._here: dict[_Key, Outcome] = {}
        self._far: dict[_Key, int] = {}
        """Key to the number of the call in the pool's run."""
        self._error: Exception | None = None

    def add(self, rollout: Rollout) -> None:
        """Begins to grade a response."""
        try:
            self._add(rollout)
        except Exception as error:
            self._error = self._error or error

    def poll(self) -> None:
        """Takes grades that have come and starts what is waiting, without waiting itself."""
        if self._error is None:
            try:
                self._run.poll()
            except Exception as error:
                self._error = error

    def finish(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts, those that were added and others, with their rewards, in order; see
        ``Grader.grade``."""
        if self._error is not None:
            raise self._error
        for rollout in rollouts:
            self._add(rollout)
        far = self._run.outcomes(self._grader._max_seconds)
        outcomes = self._here | {key: far[number] for key, number in self._far.items()}
        self._grader._warn_of_ungraded(outcomes.values())
        return [
            dataclasses.replace(
                rollout, reward=self._grader._reward(rollout, self._shares[id(rollout.prompt)], outcomes)
            )
            for rollout in rollouts
        ]

    def _add(self, rollout: Rollout) -> None:
        prompt = rollout.prompt
        if id(prompt) not in self._shares:
            self._shares[id(prompt)] = self._grader._shares(prompt, self._terms)
        for share in self._shares[id(prompt)]:
            key = _key(rollout, share)
            if key not in self._here and key not in self._far:
                self._begin(key, dataclasses.replace(rollout, prompt=share.prompt))

    def _begin(self, key: _Key, rollout: Rollout) -> None:
        verifier, prompt = self._grader._verifier_of(rollout), rollout.prompt
        if not verifier.isolated:
            self._here[key] = _call_here(verifier, rollout)
            return
        self._far[key] = len(self._run.calls)
        self._run.add(
            Call(
                target=verifier.target,
                response=_response(verifier, rollout),
                answer=prompt.answer,
                metadata=prompt.metadata,
                reusable=verifier.reusable,
            )
        )

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.__exit__()


@dataclass(frozen=True, kw_only=True)
class _Share:
    """One verifier's share of a reward."""

    number: int
    weight: float
    prompt: Prompt
    """The prompt as this verifier sees it."""


_Key = tuple[int, str, bool, int]


def _key(rollout: Rollout, share: _Share) -> _Key:
    """Rollouts with the same key get the same grade."""
    return id(rollout.prompt), rollout.text, rollout.truncated, share.number


def _response(verifier: Verifier, rollout: Rollout) -> str:
    """The response as its verifier is to see it: with the opening of thinking that stands in the prompt, and
    empty where it was cut off before it gave an answer, or in the middle of it."""
    text = f"<think>{rollout.text}" if rollout.prompt.opens_thinking else rollout.text
    cut = rollout.truncated and verifier.reads_final_answer
    return "" if cut and _is_open(text) else text


def _is_open(text: str) -> bool:
    """Whether a text that breaks off may break off within its answer: "Answer: 12" may have become 123. A
    box or tag is closed, and so is what a full stop or a line break follows."""
    found = final_answer(text)
    if found.source is Source.marker:
        return text.endswith(found.text) and found.text[-1].isalnum()
    return found.source is Source.last_line


def _call_here(verifier: Verifier, rollout: Rollout) -> Outcome:
    prompt, response = rollout.prompt, _response(verifier, rollout)
    try:
        return Outcome(value=float(verifier.verify(response, prompt.answer, prompt.metadata)))
    except Exception as error:  # whatever a verifier raises is its sample's failure
        return Outcome(reason="error", message=f"{type(error).__name__}: {error}"[:500])
