"""``copd eval``: any number of models on the validation sets of a configuration, on all ranks there are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from torch import Tensor

from copd_megatron.config import Config
from copd_megatron.config.domains import all_domains, domains_by_name
from copd_megatron.config.schema import RolloutConfig
from copd_megatron.data.shards import expand_patterns, names_remote
from copd_megatron.data.sources import PromptSources
from copd_megatron.errors import ConfigError
from copd_megatron.evaluation.engine import ranks_of_job, start_engine
from copd_megatron.evaluation.run import sampling_settings
from copd_megatron.evaluation.sampling import sample_graded
from copd_megatron.evaluation.verdicts import PromptVerdicts, VerdictFile, verdicts_of
from copd_megatron.formats.open import open_source
from copd_megatron.formats.tensors import TensorSource, read_whole
from copd_megatron.hf.companions import companion_files, read_json
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.model_config import read_model_shape, read_sizes
from copd_megatron.model.shape import ModelShape
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.grader import Grader
from copd_megatron.rewards.registry import own_digests
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.topology.collectives import all_gather_messages
from copd_megatron.untrusted.regular_file import sha256_of

logger = logging.getLogger(__name__)

_NOTES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Of config.json: what an engine's answers do not depend on. ``model.dtype`` decides the type."""
_CONFIG = "config.json"
_ENGINE_SETTINGS = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "cpu_kv_cache_gib",
    "max_num_seqs",
    "enforce_eager",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "quantization",
)
"""Of ``rollout``: what an engine is started with. The rest is part of each request, or training's alone."""
_ROUNDS_PER_PART = 4
"""Of full engines between two writes of verdicts."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to be measured."""

    label: str
    """Its row in the table, and the folder of its verdicts."""
    path: Path
    companions: Path
    """Folder with config.json, tokenizer and processor files."""
    shape: ModelShape
    source: TensorSource

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights as vLLM takes them, one at a time."""
        if self.companions == self.path:
            yield from HFFolder(self.path).iterate()
        else:
            yield from ((name, read_whole(self.source, name)) for name in self.source.names())


def open_models(paths: Sequence[str | Path]) -> list[Candidate]:
    """The models behind folders and checkpoints.

    Raises:
        ConfigError: a path holds no model.
        FileNotFoundError, CheckpointError, ValueError: as ``open_source``.
    """
    return [_open(Path(path), label) for path, label in zip(paths, _labels(paths), strict=True)]


def evaluate_models(
    config: Config, models: Sequence[Candidate], out: Path, *, anew: bool = False
) -> dict[str, list[PromptVerdicts]]:
    """Samples and grades what is still missing of every model's verdicts, and returns all of them, in the
    order of the prompts. Every rank of the job calls it.

    Each prompt's responses have seeds of their own, so that number of ranks, order and interruptions change
    no verdict.

    Args:
        out: a folder per model below it keeps the verdicts; shared by all ranks.
        anew: forget verdicts that are there.

    Raises:
        DataError: no branch has validation data, or a shard cannot be used.
        OSError: verdicts cannot be written.
    """
    with ranks_of_job(config, "eval") as (run_id, first):
        job = _Job(config=config, out=out, anew=anew, run_id=run_id, first=first)
        found: dict[str, list[PromptVerdicts]] = {}
        for alike in _alike(models):
            found |= _evaluate_alike(job, alike)
    return {model.label: found[model.label] for model in models}


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all models of a command share."""

    config: Config
    out: Path
    anew: bool
    run_id: str
    first: bool
    """Whether this is the first rank."""


def _alike(models: Sequence[Candidate]) -> list[list[Candidate]]:
    """Models that differ in their weights alone, together: one engine measures them."""
    groups: list[tuple[dict[str, str], list[Candidate]]] = []
    for model in models:
        files = _companion_digests(model)
        group = next((g for known, g in groups if g[0].shape == model.shape and known == files), None)
        if group is None:
            groups.append((files, [model]))
        else:
            group.append(model)
    return [group for _, group in groups]


def _evaluate_alike(job: _Job, models: Sequence[Candidate]) -> dict[str, list[PromptVerdicts]]:
    """As ``evaluate_models``, with the same engine for all models."""
    config, first = job.config, job.first
    # the first rank's: another machine may have fetched a remote shard at another time
    settings = all_gather_messages({m.label: _settings_text(config, m) for m in models} if first else {})[0]
    files = {label: VerdictFile(job.out, label, json.loads(text)) for label, text in settings.items()}
    sources = PromptSources(config, models[0].companions, models[0].shape)
    with contextlib.ExitStack() as stack:
        if sources.media is not None:
            stack.callback(sources.media.close)
        validation = sources.validation()
        graders = {
            domain.name: stack.enter_context(Grader(config.branches[domain.branch].reward))
            for domain in all_domains(config)
            if domain.name in validation
        }
        if first:
            for file in files.values():
                stack.callback(file.close)
                file.begin(anew=job.anew)
        done = _agreed({label: [(v.domain, v.prompt) for v in f.read()] for label, f in files.items()}, first)
        for rollout, domains in engines(config, validation):
            missing = {
                label: {d: [p for p in validation[d] if (d, p.group_id) not in pairs] for d in domains}
                for label, pairs in done.items()
            }
            if not any(prompts for of_model in missing.values() for prompts in of_model.values()):
                continue
            engine = start_engine(
                config, rollout, models[0].companions, name="eval", run_id=job.run_id, media=sources.media
            )
            with contextlib.closing(engine):
                for label, part in _answer(config, engine, graders, models, missing):
                    if first:
                        files[label].append(part)
        all_gather_messages(None)  # the file is complete before anybody reads it
        return {label: _ordered(file.read(), validation) for label, file in files.items()}


def engines(config: Config, domains: Iterable[str]) -> list[tuple[RolloutConfig, list[str]]]:
    """The engines that answer these domains, each with the domains of the branches that want such a one."""
    known = domains_by_name(config)
    groups: list[tuple[RolloutConfig, list[str]]] = []
    for domain in domains:
        rollout = config.branches[known[domain].branch].rollout
        alike = next((names for other, names in groups if _same_engine(other, rollout)), None)
        if alike is None:
            groups.append((rollout, [domain]))
        else:
            alike.append(domain)
    return groups


def _same_engine(one: RolloutConfig, other: RolloutConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _ENGINE_SETTINGS)


def _answer(
    config: Config,
    engine: RolloutEngine,
    graders: dict[str, Grader],
    models: Sequence[Candidate],
    missing: Mapping[str, dict[str, list[Prompt]]],
) -> Iterator[tuple[str, list[PromptVerdicts]]]:
    """Model by model, the verdicts that are ``missing`` by model and domain; the same on all ranks."""
    for number, model in enumerate(models):
        if any(missing[model.label].values()):
            engine.load_weights(model.tensors(), version=number)
            for part in _measure(config, engine, graders, missing[model.label], model.label):
                yield model.label, part


def _measure(
    config: Config,
    engine: RolloutEngine,
    graders: dict[str, Grader],
    missing: dict[str, list[Prompt]],
    label: str,
) -> Iterator[list[PromptVerdicts]]:
    """Verdicts, part by part; the same on all ranks."""
    at_once = engine.config.max_num_seqs * engine.num_replicas * _ROUNDS_PER_PART
    for domain, prompts in missing.items():
        settings = sampling_settings(config, domain)
        logger.info("%s: evaluating %d prompts of %s", label, len(prompts), domain)
        for part in batched(prompts, max(1, at_once // settings.num_generations)):
            rollouts = sample_graded(engine, graders[domain], part, settings, branch=f"validation/{domain}")
            yield [verdicts_of(p, answers) for p, answers in _per_prompt(part, rollouts)]


def _per_prompt(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
) -> Iterator[tuple[Prompt, Sequence[Rollout]]]:
    count = len(rollouts) // len(prompts)
    for number, prompt in enumerate(prompts):
        yield prompt, rollouts[number * count : (number + 1) * count]


def _agreed(done: dict[str, list[tuple[str, str]]], first: bool) -> dict[str, set[tuple[str, str]]]:
    """What the first rank found to be done already."""
    message = {label: [list(pair) for pair in pairs] for label, pairs in done.items()} if first else {}
    found = all_gather_messages(message)[0]
    return {label: {(domain, prompt) for domain, prompt in pairs} for label, pairs in found.items()}


def _ordered(verdicts: Sequence[PromptVerdicts], validation: dict[str, list[Prompt]]) -> list[PromptVerdicts]:
    """The verdicts of these prompts, in their order. A file may hold more: of a larger ``max_prompts``."""
    by_prompt = {(v.domain, v.prompt): v for v in verdicts}
    return [by_prompt[domain, p.group_id] for domain, prompts in validation.items() for p in prompts]


def _settings_text(config: Config, model: Candidate) -> str:
    return json.dumps(_settings(config, model))


def _settings(config: Config, model: Candidate) -> dict[str, Any]:
    """All that the verdicts depend on."""
    evaluation = config.evaluation
    rollouts = {name: branch.rollout for name, branch in config.branches.items()}
    rewards = {name: branch.reward for name, branch in config.branches.items()}
    return {
        "model": f"{model.path.resolve()}\n{model.source.identity()}",
        "run.seed": config.run.seed,
        "model.system_prompt": config.model.system_prompt,
        "model.max_sequence_tokens": config.model.max_sequence_tokens,
        "evaluation.num_generations_per_prompt": evaluation.num_generations_per_prompt,
        "evaluation.temperature": evaluation.temperature,
        "rollout.max_new_tokens": {name: rollout.max_new_tokens for name, rollout in rollouts.items()},
        "rollout.stop": {name: list(rollout.stop) for name, rollout in rollouts.items()},
        "media": asdict(config.media),
        "model.dtype": config.model.dtype,
        "rollout.quantization": {name: rollout.quantization.value for name, rollout in rollouts.items()},
        "data.max_prompt_tokens": {n: branch.data.max_prompt_tokens for n, branch in config.branches.items()},
        "reward.verifiers": {name: list(reward.verifiers) for name, reward in rewards.items()},
        "reward.timeout_seconds": {name: reward.timeout_seconds for name, reward in rewards.items()},
        "verifiers": own_digests(name for reward in rewards.values() for name in reward.verifiers),
        "companions": _companion_digests(model),
        "data.validation": {domain.name: _states(domain.validation) for domain in all_domains(config)},
    }


def _companion_digests(model: Candidate) -> dict[str, str]:
    """Digests of the files beside the weights: they decide which tokens a prompt and its media become, and
    how an engine computes with the weights."""
    digests = {path.name: sha256_of(path) for path in companion_files(model.companions)}
    config = read_json(model.companions, _CONFIG)
    if config is not None:
        told = {name: value for name, value in config.items() if name not in _NOTES}
        digests[_CONFIG] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return digests


def _states(patterns: Sequence[str]) -> list[list[Any]]:
    """Shards with their size and time of change: verdicts on files that were written anew are others. Of
    remote shards, the content that was fetched: the time is that of this machine's copy."""
    states: list[list[Any]] = []
    for pattern in patterns:
        for path in expand_patterns([pattern]):
            status = path.stat()
            if names_remote(pattern):
                states.append([pattern, path.name, status.st_size, sha256_of(path)])
            else:
                states.append([str(path), status.st_size, status.st_mtime_ns])
    return states


def _open(path: Path, label: str) -> Candidate:
    if path.is_dir() and any(path.glob("*.safetensors")):
        shape = read_model_shape(path, "model")
        return Candidate(label=label, path=path, companions=path, shape=shape, source=open_source(path))
    if not path.is_dir():
        read_model_shape(path, "model")  # says what belongs there
    source = open_source(path)
    companions = source.companions
    if companions is None:
        raise ConfigError(
            f"{path}: the checkpoint does not know where its model's config.json and tokenizer are; make a "
            "Hugging Face folder of it with copd checkpoint to-hf --model FOLDER"
        )
    return Candidate(
        label=label, path=path, companions=companions, shape=read_sizes(companions), source=source
    )


def _labels(paths: Sequence[str | Path]) -> list[str]:
    """Names of the folders; with those above them where two are alike."""
    parts = [Path(path).resolve().parts[1:] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"a model is named twice: {', '.join(map(str, paths))}")
