"""``copd data difficulty``: how often a model solves each training prompt, on all ranks there are."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from copd_megatron.config import Config
from copd_megatron.config.domains import Domain
from copd_megatron.data.pass_rates import PassRates, PassRateWriter, read_pass_rates
from copd_megatron.data.sources import PromptSources
from copd_megatron.data.stream import PromptReader
from copd_megatron.evaluation.engine import ranks_of_job, start_engine
from copd_megatron.evaluation.sampling import sample_graded
from copd_megatron.hf.digest import model_digest
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.engine import RolloutEngine, SamplingSettings
from copd_megatron.topology.collectives import all_gather_messages

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How prompts are scored. The defaults are Uni-OPD's."""

    num_samples: int = 8
    """Responses to each prompt."""
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    num_at_once: int = 256
    """Prompts that are sampled before their pass rates are written: the most that an interruption costs."""
    limit: int | None = None
    """Stop after this many prompts; None: when all are scored."""


def score_difficulty(
    config: Config, domain: Domain, folder: str | Path, out: str | Path, scoring: Scoring
) -> PassRates:
    """Samples responses to the training prompts that the index at ``out`` lacks, grades them and appends how
    many were correct. A response is correct if its reward is at least 1.

    Every rank of the job calls it. Each response has a seed of its own, so that neither interruptions nor the
    number of ranks change what is sampled.

    Returns:
        The index.

    Raises:
        ConfigError: ``folder`` holds no model that vLLM can load.
        DataError: a shard cannot be used, or the index is of another model, other settings or other shards.
    """
    sources = PromptSources(config, folder, read_model_shape(folder, "model"))
    branch = config.branches[domain.branch]
    with contextlib.ExitStack() as stack:
        if sources.media is not None:
            stack.callback(sources.media.close)
        run_id, first = stack.enter_context(ranks_of_job(config, "difficulty"))
        reader, writer = sources.reader(domain, "train"), None
        if first:
            settings = _settings(config, domain, folder, scoring)
            writer = stack.enter_context(PassRateWriter(out, settings, reader.shards, domain.name))
        done = set(all_gather_messages([] if writer is None else sorted(writer.done))[0])
        todo = [i for i, ref in enumerate(reader.shards.refs) if ref.id not in done][: scoring.limit]
        if todo:
            engine = start_engine(
                config, branch.rollout, folder, name="difficulty", run_id=run_id, media=sources.media
            )
            engine.load_weights(HFFolder(folder).iterate(), version=0)
            grader = stack.enter_context(Grader(branch.reward))
            for begin in range(0, len(todo), scoring.num_at_once):
                part = todo[begin : begin + scoring.num_at_once]
                lines = list(_score(engine, grader, reader, part, scoring))
                if writer is not None:
                    writer.append(lines)
                    logger.info("%s: %d of %d prompts scored", domain.name, begin + len(part), len(todo))
        all_gather_messages(None)  # the index is complete before anybody reads it
        return read_pass_rates(out)


def _score(
    engine: RolloutEngine, grader: Grader, reader: PromptReader, part: Sequence[int], scoring: Scoring
) -> Iterator[dict[str, Any]]:
    """The index's lines of some samples, the same on all ranks."""
    reader.prefetch(part)
    prompts: list[Prompt] = []
    names: list[str] = []
    for index in part:
        before, name = reader.skipped.copy(), reader.shards.refs[index].id
        prompt = reader.read(index)
        if prompt is None:
            (reason,) = reader.skipped - before
            yield {"prompt": name, "skipped": reason}
        else:
            prompts.append(prompt)
            names.append(name)
    if not prompts:
        return
    count = scoring.num_samples
    settings = SamplingSettings(
        num_generations=count,
        temperature=scoring.temperature,
        top_p=scoring.top_p,
        top_k=scoring.top_k,
    )
    rollouts = sample_graded(engine, grader, prompts, settings, branch="difficulty")
    for number, name in enumerate(names):
        correct = sum(map(_is_correct, rollouts[number * count : (number + 1) * count]))
        yield {"prompt": name, "num_correct": correct, "num_samples": count}


def _is_correct(rollout: Rollout) -> bool:
    return rollout.reward is not None and rollout.reward >= 1.0


def _settings(config: Config, domain: Domain, folder: str | Path, scoring: Scoring) -> dict[str, Any]:
    """All that pass rates depend on, besides the shards."""
    branch = config.branches[domain.branch]
    return {
        "model": str(folder),
        "model_digest": model_digest(folder),
        "num_samples": scoring.num_samples,
        "temperature": scoring.temperature,
        "top_p": scoring.top_p,
        "top_k": scoring.top_k,
        "max_new_tokens": branch.rollout.max_new_tokens,
        "stop": list(branch.rollout.stop),
        "max_prompt_tokens": branch.data.max_prompt_tokens,
        "max_sequence_tokens": config.model.max_sequence_tokens,
        "system_prompt": config.model.system_prompt,
        "verifiers": list(branch.reward.verifiers),
        "timeout_seconds": branch.reward.timeout_seconds,
        "dtype": config.model.dtype,
        "quantization": branch.rollout.quantization.value,
        "media": asdict(config.media) if read_model_shape(folder, "model").vision is not None else None,
        "seed": config.run.seed,
    }
