"""``copd data difficulty``: how often a model solves each training prompt of a domain, in one process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import batched, islice
from pathlib import Path
from typing import Any

from copd_megatron.config import Config
from copd_megatron.config.domains import Domain
from copd_megatron.data.pass_rates import PassRates, PassRateWriter, read_pass_rates
from copd_megatron.data.sources import PromptSources
from copd_megatron.data.stream import PromptReader
from copd_megatron.hf.digest import model_digest
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.policy.device import model_dtype
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.engine import RolloutEngine, SamplingSettings
from copd_megatron.topology.single import single_process

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

    Each response has a seed of its own, so that interruptions do not change what is sampled.

    Returns:
        The index.

    Raises:
        ConfigError: ``folder`` holds no model that vLLM can load.
        DataError: a shard cannot be used, or the index is of another model, other settings or other shards.
    """
    shape = read_model_shape(folder, "model")
    sources = PromptSources(config, folder, shape)
    with contextlib.ExitStack() as stack:
        if sources.media is not None:
            stack.callback(sources.media.close)
        reader = sources.reader(domain, "train")
        settings = _settings(config, domain, folder, scoring)
        writer = stack.enter_context(PassRateWriter(out, settings, reader.shards, domain.name))
        missing = (i for i, ref in enumerate(reader.shards.refs) if ref.id not in writer.done)
        todo = list(islice(missing, scoring.limit))
        if todo:
            engine = stack.enter_context(_engine(config, domain, folder, sources))
            grader = stack.enter_context(Grader(config.branches[domain.branch].reward))
            for part in batched(todo, scoring.num_at_once):
                writer.append(_score(engine, grader, reader, part, scoring))
                logger.info("%s: %d prompts to go", domain.name, len(todo) - todo.index(part[-1]) - 1)
    return read_pass_rates(out)


def _score(
    engine: RolloutEngine, grader: Grader, reader: PromptReader, part: Sequence[int], scoring: Scoring
) -> Iterator[dict[str, Any]]:
    """The index's lines of some samples."""
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
    rollouts = grader.grade(engine.sample(prompts, settings, step=0, branch="difficulty"))
    engine.llm.reset_prefix_cache()  # what came before must not matter
    for number, name in enumerate(names):
        correct = sum(map(_is_correct, rollouts[number * count : (number + 1) * count]))
        yield {"prompt": name, "num_correct": correct, "num_samples": count}


def _is_correct(rollout: Rollout) -> bool:
    return rollout.reward is not None and rollout.reward >= 1.0


@contextlib.contextmanager
def _engine(
    config: Config, domain: Domain, folder: str | Path, sources: PromptSources
) -> Iterator[RolloutEngine]:
    with single_process() as run_id:
        engine = RolloutEngine(
            model_path=folder,
            config=config.branches[domain.branch].rollout,
            branch="difficulty",
            run_id=run_id,
            dtype=model_dtype(config),
            max_tokens=config.model.max_sequence_tokens,
            seed=config.run.seed,
            media=sources.media,
        )
        engine.load_weights(HFFolder(folder).iterate(), version=0)
        yield engine


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
        "media": asdict(config.media) if read_model_shape(folder, "model").vision is not None else None,
        "seed": config.run.seed,
    }
