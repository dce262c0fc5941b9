"""Collects samples during a run: chooses a few of each step's responses and writes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from copd_megatron.config.schema import SamplesConfig
from copd_megatron.data.seeds import sample_seed
from copd_megatron.records import NATIVE, FloatArray, Rollout
from copd_megatron.samples.files import FOLDER, TRAIN, remove_after, write_samples
from copd_megatron.samples.record import MAX_TEXT_CHARACTERS, Kind, Sample, bounded_metadata, rounded
from copd_megatron.samples.text import Tokenizer, ends, prompt_text, token_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A response that may be kept."""

    rollout: Rollout
    edge: str | None
    student: FloatArray
    teacher: FloatArray | None


class SampleLog:
    """The samples of one branch. All its ranks may call it; only the one that ``writes`` keeps anything."""

    def __init__(
        self,
        run_dir: Path,
        branch: str,
        options: SamplesConfig,
        tokenizer: Tokenizer,
        *,
        run_seed: int,
        writes: bool,
    ) -> None:
        self.branch, self.options, self.tokenizer = branch, options, tokenizer
        self.step = 0
        """Training steps begun."""
        self.num_bytes = 0
        """Written so far."""
        self._folder, self._seed, self._writes = run_dir / FOLDER / branch, run_seed, writes
        self._seen: dict[str, list[_Seen]] = {}

    def note(
        self,
        component: str,
        rollouts: Sequence[Rollout],
        *,
        edge: str | None = None,
        student: Sequence[FloatArray] | None = None,
        teacher: Sequence[FloatArray] | None = None,
    ) -> None:
        """Responses of this step, from which ``write_step`` chooses.

        Args:
            component: ``native``, or that of an edge.
            edge: ``student<-teacher``; None for the branch's own.
            student: [R] each, under the branch's actor; None: what the rollout engine said is kept.
            teacher: [R] each, under the teacher; None: it was not asked for them.
        """
        if not self._writes or not self.options.per_step or (self.step - 1) % self.options.every_steps:
            return
        own = [rollout.rollout_logprobs for rollout in rollouts] if student is None else student
        theirs = [None] * len(rollouts) if teacher is None else teacher
        self._seen.setdefault(component, []).extend(
            _Seen(rollout=rollout, edge=edge, student=mine, teacher=other)
            for rollout, mine, other in zip(rollouts, own, theirs, strict=True)
        )

    def write_step(self) -> None:
        """Writes this step's choice: ``per_step`` responses, shared evenly among the components."""
        seen, self._seen = self._seen, {}
        if not seen:
            return
        chosen = [
            self._sample(one, Kind.native if component == NATIVE else Kind.cross, self.branch)
            for (component, members), quota in zip(seen.items(), self._quotas(len(seen)), strict=True)
            for one in self._choice(members, quota, self.step, component)
        ]
        self._write(TRAIN, chosen)

    def write_evaluation(self, model: str, rollouts: Mapping[str, Sequence[Rollout]]) -> None:
        """Writes a choice of what ``model`` answered: the same prompts at every evaluation.

        Args:
            rollouts: graded responses by domain.
        """
        if not self._writes or not self.options.per_evaluation or not rollouts:
            return
        chosen = []
        for domain, responses in rollouts.items():
            seen = [_Seen(rollout=r, edge=None, student=r.rollout_logprobs, teacher=None) for r in responses]
            picked = self._choice(seen, self.options.per_evaluation, 0, f"validation/{domain}")
            chosen += [self._sample(one, Kind.validation, model) for one in picked]
        self._write(model, chosen)

    def resume_after(self, step: int) -> None:
        """Removes what an earlier attempt wrote after ``step``, from where the run goes on."""
        self.step = step
        if self._writes:
            remove_after(self._folder, step)

    def _quotas(self, count: int) -> list[int]:
        share, left = divmod(self.options.per_step, count)
        return [share + (number < left) for number in range(count)]

    def _choice(self, seen: Sequence[_Seen], count: int, step: int, purpose: str) -> list[_Seen]:
        """``count`` of them, chosen by the run's seed and what they are, in their order."""
        rank = [
            sample_seed(
                self._seed, f"samples/{self.branch}/{purpose}", step, r.prompt.group_id, r.sample_index
            )
            for r in (one.rollout for one in seen)
        ]
        return [seen[i] for i in sorted(sorted(range(len(seen)), key=rank.__getitem__)[:count])]

    def _sample(self, seen: _Seen, kind: Kind, model: str) -> Sample:
        rollout, prompt = seen.rollout, seen.rollout.prompt
        length = rollout.response_length
        head, tail = ends(length, self.options.max_tokens)
        ids = rollout.token_ids[rollout.prompt_length :].tolist()
        pieces = token_texts(self.tokenizer, ids[:head])
        pieces += token_texts(self.tokenizer, ids[length - tail :]) if tail else []

        def kept(logprobs: FloatArray) -> list[float | None]:
            return rounded([*logprobs[:head], *(logprobs[length - tail :] if tail else ())])

        return Sample(
            step=self.step,
            kind=kind,
            model=model,
            edge=seen.edge,
            domain=prompt.domain,
            prompt_id=prompt.prompt_id,
            occurrence=prompt.occurrence,
            sample_index=rollout.sample_index,
            prompt=prompt_text(self.tokenizer, prompt.token_ids.tolist(), self.options.max_tokens),
            gold=prompt.answer[:MAX_TEXT_CHARACTERS],
            verifier=prompt.verifier,
            metadata=bounded_metadata(prompt.metadata),
            media=[asdict(medium) for medium in prompt.media],
            response="".join(pieces),
            reward=rollout.reward,
            truncated=rollout.truncated,
            num_prompt_tokens=rollout.prompt_length,
            num_response_tokens=length,
            weight_version=rollout.weight_version,
            seed=rollout.seed,
            lengths=[len(piece) for piece in pieces],
            student=kept(seen.student),
            teacher=None if seen.teacher is None else kept(seen.teacher),
            cut_at=head if tail else None,
            num_left_out=length - head - tail,
        )

    def _write(self, what: str, samples: Sequence[Sample]) -> None:
        """A run goes on without samples where they cannot be written."""
        try:
            self.num_bytes += write_samples(self._folder, what, self.step, samples)
        except OSError as error:
            logger.warning("no further samples: %s (%s); the run goes on", self._folder, error)
            self._writes = False
