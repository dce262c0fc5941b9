"""Which prompts an epoch holds and how often, by how often a model solves them (Uni-OPD's offline balancing).

Prompts are put into bins by their number of correct responses, 0 to N. Balancing repeats prompts until the
bins 1 to N - 1 (``u_shape``) or 1 to N (``mirrored_j``) are all as large as the largest of them, as far as
``max_repeat`` allows. The paper gives no factor; equal bins are this project's choice. The prompts of the
other bins are drawn once, unless they are filtered out.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from copd_megatron.config.domains import Domain
from copd_megatron.config.schema import DifficultyBalance, DifficultyConfig
from copd_megatron.data.order import Indices, epoch_order
from copd_megatron.data.pass_rates import read_pass_rates
from copd_megatron.data.shards import ShardSet
from copd_megatron.errors import DataError

logger = logging.getLogger(__name__)

UNUSABLE = -1
"""In place of a number of correct responses: the sample could not be used when the others were scored."""
_NAMED = 3
_CHOICE = 2**31
"""Added to a stream's seed, which is smaller: the choice of prompts for one more repetition has random bits
of its own, independent of the order's."""


def repetitions(
    num_correct: Indices, num_samples: int, options: DifficultyConfig, order: Indices
) -> npt.NDArray[np.int64]:
    """[S] how often each sample is drawn in an epoch; 0: it is left out.

    Args:
        num_correct: [S] correct responses of each sample, 0 to ``num_samples``, or ``UNUSABLE``.
        num_samples: responses to each sample, N.
        order: [S] a permutation of the samples. Where repetitions do not divide evenly, those that come first
            in it are drawn once more than the others of their bin.
    """
    rates = num_correct / num_samples
    kept = (num_correct != UNUSABLE) & (rates >= options.min_pass_rate) & (rates <= options.max_pass_rate)
    times = kept.astype(np.int64)
    last = {
        DifficultyBalance.none: 0,
        DifficultyBalance.u_shape: num_samples - 1,
        DifficultyBalance.mirrored_j: num_samples,
    }[options.balance]
    usable = order[kept[order]]
    bins = [usable[num_correct[usable] == count] for count in range(1, last + 1)]
    largest = max((len(members) for members in bins), default=0)
    for members in bins:
        if len(members):
            each, rest = divmod(min(largest, options.max_repeat * len(members)), len(members))
            times[members] = each
            times[members[:rest]] += 1
    return times


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """The pass rates of a stream's samples, and what they are used for."""

    num_correct: Indices
    """[S], see ``repetitions``."""
    num_samples: int
    options: DifficultyConfig

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Indices:
        """The samples of an epoch in their order, with repetitions.

        Without shuffling, all samples come in file order, then those that are drawn a second time, and so on.
        """
        count = len(self.num_correct)
        choice = epoch_order(count, seed + _CHOICE, epoch, shuffle)
        times = repetitions(self.num_correct, self.num_samples, self.options, choice)
        if not shuffle:
            rounds = range(int(times.max(initial=0)))
            return np.concatenate([np.flatnonzero(times > done) for done in rounds])
        drawn = np.repeat(np.arange(count), times)
        return drawn[epoch_order(len(drawn), seed, epoch)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the order depends on besides seed and epoch."""
        settings = {**asdict(self.options), "balance": self.options.balance.value}
        text = f"{self.num_samples} {sorted(settings.items())}\n".encode()
        return hashlib.sha256(text + self.num_correct.astype("<i8").tobytes()).hexdigest()[:32]


def load_difficulty(domain: Domain, options: DifficultyConfig, shards: ShardSet) -> Difficulty | None:
    """The pass rates of a domain's training samples; None where none are given.

    Raises:
        DataError: the index cannot be read, lacks a sample, is of shards that have changed since, or no
            sample is left by ``min_pass_rate`` and ``max_pass_rate``.
    """
    if domain.pass_rates is None:
        return None
    index = read_pass_rates(domain.pass_rates)
    index.check_shards(shards, domain.name)
    missing = [ref.id for ref in shards.refs if ref.id not in index.num_correct]
    if missing:
        raise DataError(
            f"{domain.key}.pass_rates: {index.path} has no pass rate of {', '.join(missing[:_NAMED])} "
            f"({len(missing)} of {len(shards)} prompts are missing). Go on scoring with copd data difficulty "
            f"--domain {domain.name} --out {index.path}."
        )
    found = [index.num_correct[ref.id] for ref in shards.refs]
    num_correct = np.asarray([UNUSABLE if count is None else count for count in found], dtype=np.int64)
    difficulty = Difficulty(num_correct=num_correct, num_samples=index.num_samples, options=options)
    if not len(difficulty.order(0, 0)):
        counts = np.bincount(num_correct[num_correct >= 0], minlength=index.num_samples + 1).tolist()
        raise DataError(
            f"{domain.key}: no prompt has a pass rate between {options.min_pass_rate:g} and "
            f"{options.max_pass_rate:g}: {counts} prompts have 0 to {index.num_samples} correct responses. "
            "Widen data.difficulty.min_pass_rate and max_pass_rate."
        )
    if unusable := int((num_correct == UNUSABLE).sum()):
        logger.warning(
            "%s: %d samples are left out, which could not be used when pass rates were scored (%s)",
            domain.name, unusable, index.path,
        )  # fmt: skip
    return difficulty
