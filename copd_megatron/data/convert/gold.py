"""Whether verifiers can grade the gold answers of new samples, found out before the samples are stored.

A gold answer that its verifier cannot use fails every response, or every grading, of a run that trains on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from copd_megatron.data.convert.write import NewSample
from copd_megatron.data.failures import name_and_text
from copd_megatron.errors import DataError
from copd_megatron.rewards import registry, verifiers
from copd_megatron.rewards.isolation import Call, Outcome, WorkerPool
from copd_megatron.rewards.terms import terms_of

_NO_ANSWER = "Answer: none of what is sought"
_WAYS_TO_ANSWER = ("Answer: {}", "\\boxed{{{}}}", "<answer>{}</answer>", "{}")
"""A gold answer must be right in one of these."""


class GoldCheck:
    """Asks verifiers; those that want it run in worker processes, which the context's end stops.

    >>> with GoldCheck(num_workers=2, timeout_seconds=10.0) as check:           # doctest: +SKIP
    ...     problems = check.problems(samples)
    """

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        self._pool = WorkerPool(num_workers, timeout_seconds)

    def problems(self, samples: Sequence[NewSample]) -> list[str | None]:
        """Why each sample's gold answer cannot be graded; None if it can.

        Its verifier must not fail, neither on the gold answer nor on a wrong one. A built-in verifier must
        grade the gold answer 1 in one of the usual ways of giving it, unless its gold answers are tests or
        regions; verifiers of other packages may grade as they like.

        Raises DataError: a verifier cannot be loaded in a worker process.
        """
        wrong = self._ask(samples, _NO_ANSWER)
        found = [_failure(outcome) for outcome in wrong]
        open_places = [i for i, problem in enumerate(found) if problem is None]
        first: dict[int, str] = {}
        for way in _WAYS_TO_ANSWER:
            golds = self._ask([samples[i] for i in open_places], way)
            still_open = []
            for place, outcome in zip(open_places, golds, strict=True):
                problem = _failure(outcome) or _too_low(samples[place].verifier, outcome)
                if problem is not None:
                    first.setdefault(place, problem)
                    still_open.append(place)
            open_places = still_open
        for place in open_places:
            found[place] = first[place]
        return found

    def __enter__(self) -> GoldCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def _ask(self, samples: Sequence[NewSample], way: str) -> list[Outcome]:
        """What each sample's verifier says to a response that gives its gold answer in this way."""
        outcomes: dict[tuple[int, int], Outcome] = {}
        calls: dict[tuple[int, int], Call] = {}
        for index, sample in enumerate(samples):
            response = way.format(sample.answer)
            for number, term in enumerate(terms_of(sample.verifier, sample.metadata)):
                verifier = registry.get(term.verifier)
                answer = sample.answer if term.answer is None else term.answer
                metadata = term.settings(sample.metadata)
                if verifier.isolated:
                    calls[index, number] = Call(
                        target=verifier.target, response=response, answer=answer, metadata=metadata
                    )
                    continue
                try:
                    outcomes[index, number] = Outcome(
                        value=float(verifier.verify(response, answer, metadata))
                    )
                except Exception as error:  # whatever it raises, it cannot grade this sample
                    outcomes[index, number] = Outcome(reason="error", message=name_and_text(error))
        try:
            outcomes |= dict(zip(calls, self._pool.run(list(calls.values())), strict=True))
        except RuntimeError as error:
            raise DataError(str(error)) from error
        by_sample: list[list[Outcome]] = [[] for _ in samples]
        for (index, _), outcome in sorted(outcomes.items()):
            by_sample[index].append(outcome)
        return [_together(terms) for terms in by_sample]


def _together(terms: Sequence[Outcome]) -> Outcome:
    """Of a sample's terms: the first failure, or the last grade (those of several are never compared)."""
    return next((outcome for outcome in terms if outcome.value is None), terms[-1])


def _failure(outcome: Outcome) -> str | None:
    if outcome.value is None:
        return f"the verifier fails on it ({outcome.reason}: {outcome.message})"
    return None


def _too_low(verifier: str, outcome: Outcome) -> str | None:
    known = registry.get(verifier)
    built_in = known.verify.__module__.startswith(f"{verifiers.__name__}.")
    if built_in and known.gold_is_a_response and outcome.value is not None and outcome.value < 1.0:
        return f"the verifier grades the gold answer {outcome.value:g}"
    return None
