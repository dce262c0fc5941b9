"""Prompts in an order that (seed, epoch) determines, tokenised when needed, resumable to the sample.

Every rank holds the same stream and computes the same global batch; ``split_evenly`` then gives each
data-parallel replica its part. Nothing is exchanged, so no rank can drift.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from copd_megatron.data.difficulty import Difficulty
from copd_megatron.data.failures import any_failure, template_memory
from copd_megatron.data.media import media_members, refuse_unknown_members
from copd_megatron.data.occurrences import number_occurrences
from copd_megatron.data.order import epoch_order
from copd_megatron.data.prompt_sizes import most_characters, num_characters
from copd_megatron.data.samples import Message, Sample, SampleRef, texts_and_media
from copd_megatron.data.shards import ShardSet
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.records import IntArray, MediaRef, Prompt

logger = logging.getLogger(__name__)

_LOGGED_PER_REASON = 3


class Tokenizer(Protocol):
    """What a Hugging Face tokenizer offers and the stream needs."""

    chat_template: Any

    def __call__(self, text: str) -> Mapping[str, Any]: ...

    def get_vocab(self) -> Mapping[str, int]: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any) -> Any: ...


class MediaEncoder(Protocol):
    """What encodes samples with images or videos: ``media_prompts.MediaPrompts``."""

    def encode(
        self, sample: Sample, where: str, system_prompt: str | None = None
    ) -> tuple[IntArray, tuple[MediaRef, ...]]: ...

    def refuse_lone_placeholders(self, sample: Sample, token_ids: IntArray, where: str) -> None: ...

    def prefetch(self, samples: Iterable[SampleRef]) -> None: ...

    def prepare(self, samples: Sequence[SampleRef]) -> None: ...


class PromptSequence(Protocol):
    """What a step draws its prompts from: a ``PromptStream``, or several in a ``mix.PromptMix``."""

    @property
    def epoch(self) -> int: ...

    @property
    def epochs(self) -> Mapping[str, int]: ...

    @property
    def skipped(self) -> Mapping[str, int]: ...

    def next(self, num_prompts: int, drawn: Sequence[Prompt] = ()) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def split_evenly[T](items: Sequence[T], rank: int, world: int) -> list[T]:
    """Part ``rank`` of ``items``, divided into ``world`` contiguous parts whose sizes differ by at most one.

    Concatenated in rank order, the parts are the items. Raises ValueError unless 0 <= rank < world.
    """
    if not 0 <= rank < world:
        raise ValueError(f"split_evenly: rank {rank} is not in 0 .. {world - 1}. Pass a rank of this group.")
    return list(items[len(items) * rank // world : len(items) * (rank + 1) // world])


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], system_prompt: str | None = None
) -> IntArray:
    """[P] token ids of a prompt, ready for the model to answer.

    With a chat template: system message (if given, and the prompt brings none), messages, generation
    prompt. Without: system prompt, blank line and text, encoded plainly.

    Raises DataError for chat messages and a tokenizer without a chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        if not isinstance(prompt, str):
            raise DataError(
                "a prompt is a list of chat messages, but the tokenizer has no chat template. "
                "Use a chat model's tokenizer, or write prompts as plain strings."
            )
        text = prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"
        return np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
    messages = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [_flat(m) for m in prompt]
    )
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    with template_memory():
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def _flat(message: Message) -> dict[str, Any]:
    """The message with its text parts joined: templates of text models drop or misprint a list of parts."""
    content = message["content"]
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return dict(message)
    return {**message, "content": "".join(part["text"] for part in content)}


def _opens_thinking(tokenizer: Tokenizer, token_ids: IntArray) -> bool:
    """Whether the chat template has begun the model's thinking in the prompt."""
    if "<think>" not in str(getattr(tokenizer, "chat_template", None)):
        return False
    return str(tokenizer.decode(token_ids[-8:].tolist())).rstrip().endswith("<think>")


class PromptReader:
    """Samples to prompts: reads, checks and tokenises them; counts and logs those that it has to skip.

    ``media`` encodes samples with images or videos; without it such samples are skipped. ``prefix`` begins
    the prompt ids, where those of other shards could be the same.
    """

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: Tokenizer,
        *,
        domain: str,
        max_prompt_tokens: int,
        system_prompt: str | None = None,
        verifiers: Collection[str] | None = None,
        media: MediaEncoder | None = None,
        prefix: str = "",
    ) -> None:
        self.shards = shards
        self.domain = domain
        self.skipped: Counter[str] = Counter()
        self._logged: dict[str, set[SampleRef]] = {}
        self._tokenizer = tokenizer
        self._most_characters: int | None = None
        self._max_prompt_tokens = max_prompt_tokens
        self._system_prompt = system_prompt
        self._verifiers = verifiers
        self._media = media
        self._prefix = prefix

    def prefetch(self, indices: Iterable[int]) -> None:
        """Announce samples that will be read, in that order, so that their media are decoded meanwhile."""
        if self._media is not None:
            self._media.prefetch(self.shards.refs[index] for index in indices)

    def prepare(self, indices: Iterable[int]) -> None:
        """Announce the samples that will be read next; ranks that share the decoding of media do it now, all
        of them together."""
        if self._media is not None:
            self._media.prepare([self.shards.refs[index] for index in indices])

    def read(self, index: int) -> Prompt | None:
        """The prompt of sample ``index``, or None if it cannot be used.

        Raises DataError: not this sample but its shard can no longer be read.
        """
        ref = self.shards.refs[index]
        try:
            with any_failure(self.shards.where(ref)):
                sample = self.shards.read(ref, self._verifiers)
                token_ids, media = self._encode(sample)
        except BadSampleError as error:
            self._skip(ref, error)
            return None
        return Prompt(
            prompt_id=self._prefix + ref.id,
            domain=self.domain,
            token_ids=token_ids,
            answer=sample.answer,
            verifier=sample.verifier,
            metadata=sample.metadata,
            media=media,
            opens_thinking=_opens_thinking(self._tokenizer, token_ids),
        )

    def _encode(self, sample: Sample) -> tuple[IntArray, tuple[MediaRef, ...]]:
        where = self.shards.where(sample.ref)
        refuse_unknown_members(sample.media, where)
        members = media_members(sample.media)
        self._refuse_endless(sample, where)
        try:
            if self._media is None:
                _refuse_media(sample, members, where)
            elif members:
                token_ids, media = self._media.encode(sample, where, self._system_prompt)
                return self._within_limits(token_ids, where), media
            token_ids = encode_prompt(self._tokenizer, sample.prompt, self._system_prompt)
        except TemplateError as error:
            raise BadSampleError(
                where,
                "chat_template",
                f"the tokenizer's chat template refuses the messages ({error})",
                "Use roles and an order that the template knows; model.system_prompt adds a system message.",
            ) from error
        if self._media is not None:
            self._media.refuse_lone_placeholders(sample, token_ids, where)
        return self._within_limits(token_ids, where), ()

    def _refuse_endless(self, sample: Sample, where: str) -> None:
        """Raises BadSampleError for a prompt that no tokenizer could make short enough."""
        characters = num_characters(sample.prompt)
        if characters <= self._max_prompt_tokens:
            return
        if self._most_characters is None:
            self._most_characters = most_characters(self._tokenizer, self._max_prompt_tokens)
        if characters > self._most_characters:
            raise BadSampleError(
                where,
                "too_long",
                f"{characters} characters are more than data.max_prompt_tokens = {self._max_prompt_tokens}",
                "Raise the limit or shorten the prompt.",
            )

    def _within_limits(self, token_ids: IntArray, where: str) -> IntArray:
        if len(token_ids) == 0:
            raise BadSampleError(where, "empty_prompt", "the prompt has no tokens", "Drop the sample.")
        if len(token_ids) > self._max_prompt_tokens:
            raise BadSampleError(
                where,
                "too_long",
                f"{len(token_ids)} prompt tokens exceed data.max_prompt_tokens = {self._max_prompt_tokens}",
                "Raise the limit or shorten the prompt.",
            )
        return token_ids

    def _skip(self, ref: SampleRef, error: BadSampleError) -> None:
        self.skipped[error.reason] += 1
        logged = self._logged.setdefault(error.reason, set())
        if len(logged) < _LOGGED_PER_REASON and ref not in logged:
            logged.add(ref)
            last = len(logged) == _LOGGED_PER_REASON
            also = " (further samples of this kind are only counted)" if last else ""
            logger.warning("%s: skipped a sample: %s%s", self.domain, error, also)


def _refuse_media(sample: Sample, members: Sequence[str], where: str) -> None:
    """Raises BadSampleError (``media_unsupported``) if a model that reads only text would need eyes."""
    shown = [kind for kind, _ in texts_and_media(sample.prompt) if kind != "text"]
    if members or shown:
        what = f"media members {sorted(members)}" if members else f"parts of the types {shown}"
        raise BadSampleError(
            where,
            "media_unsupported",
            f"has {what}, which a text branch cannot show to its model",
            "Give these shards to a branch whose model reads them.",
        )


class PromptStream:
    """An endless, resumable sequence of prompts.

    ``next`` may be called with any sizes: the sequence of prompts does not depend on how it is divided into
    batches, nor on whether it is saved and restored in between.
    """

    def __init__(
        self,
        reader: PromptReader,
        *,
        seed: int,
        shuffle: bool = True,
        difficulty: Difficulty | None = None,
    ) -> None:
        """``difficulty``: repeats and leaves out samples of the reader's shards; None: each once an epoch."""
        self.reader = reader
        self._difficulty = difficulty
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, counted from 0."""
        return self._epoch

    @property
    def epochs(self) -> Mapping[str, int]:
        """The epoch, by the name of the domain."""
        return {self.reader.domain: self._epoch}

    @property
    def skipped(self) -> Mapping[str, int]:
        """Skipped samples by reason, over all epochs."""
        return dict(self.reader.skipped)

    def next(self, num_prompts: int, drawn: Sequence[Prompt] = ()) -> list[Prompt]:
        """The next ``num_prompts`` prompts of the global batch, continuing into the next epoch if needed.

        A prompt that occurs again in the batch gets the next occurrence number. ``drawn``: prompts that the
        same step drew before; their repetitions are numbered too.

        Raises DataError if a whole epoch holds no usable sample.
        """
        prompts: list[Prompt] = []
        attempts_without_prompt = num_prepared = 0
        while len(prompts) < num_prompts:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._order_of(self._epoch)
            if not num_prepared:
                batch = self._order[self._position :][: num_prompts - len(prompts)].tolist()
                self.reader.prepare(batch)
                num_prepared = len(batch)
            prompt = self.reader.read(int(self._order[self._position]))
            self._position += 1
            num_prepared -= 1
            if prompt is not None:
                prompts.append(prompt)
                attempts_without_prompt = 0
                continue
            attempts_without_prompt += 1
            if attempts_without_prompt > 2 * len(self._order):
                raise DataError(
                    f"{self.reader.domain}: none of the {len(self._order)} samples can be used; skipped: "
                    f"{self.skipped}. The first of each kind are in the log with their remedies."
                )
        following = self._order[self._position : self._position + num_prompts].tolist()
        if len(following) < num_prompts:
            following += self._order_of(self._epoch + 1)[: num_prompts - len(following)].tolist()
        self.reader.prefetch(following)
        return number_occurrences(prompts, drawn)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it refers to, as plain JSON types."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "skipped": dict(self.reader.skipped),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": self.reader.shards.fingerprint,
            **({} if self._difficulty is None else {"difficulty": self._difficulty.fingerprint}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken.

        Raises DataError if the shards, the seed or the shuffling have changed: the position would mean other
        samples.
        """
        mine = self.state_dict()
        if state.get("fingerprint") == self.reader.shards.outline:
            logger.warning(
                "%s: the checkpoint is of an earlier version, which knew names and sizes of the samples and "
                "not what they say: that the shards are the same is taken for granted",
                self.reader.domain,
            )
            state = {**state, "fingerprint": mine["fingerprint"]}
        if "pools" in state:
            raise DataError(
                f"{self.reader.domain}: the data position cannot be restored: the checkpoint has the pools "
                f"{', '.join(state['pools'])}. Restore data.pools, or start a new run."
            )
        for name, remedy in (
            ("fingerprint", "Put back the shards that the run began with, or start a new run on these"),
            ("seed", "Restore run.seed, or start a new run"),
            ("shuffle", "Restore data.shuffle, or start a new run"),
            ("difficulty", "Restore data.pass_rates and data.difficulty, or start a new run"),
        ):
            if state.get(name) != mine.get(name):
                what = "the shards" if name == "fingerprint" else name
                raise DataError(
                    f"{self.reader.domain}: the data position cannot be restored: {what} changed "
                    f"({name} was {state.get(name)!r}, is {mine.get(name)!r}). {remedy}."
                )
        self._epoch = int(state["epoch"])
        self._order = self._order_of(self._epoch)
        self._position = int(state["position"])
        self.reader.skipped = Counter({str(reason): int(n) for reason, n in state["skipped"].items()})

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._difficulty is not None:
            return self._difficulty.order(self._seed, epoch, self._shuffle)
        return epoch_order(len(self.reader.shards), self._seed, epoch, self._shuffle)


def load_validation(reader: PromptReader, *, max_prompts: int | None = None) -> list[Prompt]:
    """All prompts of a reader's shards in file order, the same every time.

    ``max_prompts``: take that many, spread evenly over the files; samples that cannot be used are skipped,
    counted in the log, and not replaced.

    Raises DataError when nothing usable is left.
    """
    total = len(reader.shards)
    wanted = total if max_prompts is None else min(max_prompts, total)
    chosen = [i * total // wanted for i in range(wanted)]
    reader.prefetch(chosen)
    reader.prepare(chosen)
    prompts = [prompt for i in chosen if (prompt := reader.read(i)) is not None]
    if reader.skipped:
        logger.warning("%s: skipped %s of %d validation samples", reader.domain, dict(reader.skipped), wanted)
    if not prompts:
        raise DataError(
            f"{reader.domain}: no validation sample can be used (skipped: {dict(reader.skipped)} of "
            f"{wanted}). "
            "The first of each kind are in the log with their remedies."
        )
    return prompts
