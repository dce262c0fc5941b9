"""A comparison: arms, seeds, and the jobs that train and measure them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config import Config, to_yaml, validate
from copd_megatron.errors import ConfigError
from copd_megatron.recipes.experiments.base import Task
from copd_megatron.reproduction.arms import COMPARISONS, Arm, Made
from copd_megatron.reproduction.forked import Program
from copd_megatron.reproduction.runner import Job, job_of, what_is_set
from copd_megatron.reproduction.setting import FEW_SEEDS, SEEDS, Setting

MODES: Mapping[str, tuple[int, float]] = {"greedy": (1, 0.0), "sampled": (4, 1.0)}
"""Responses per held-out prompt and their temperature."""


@dataclass(frozen=True, kw_only=True)
class SeedFolder:
    """Where all of a seed is kept."""

    setting: Setting
    seed: int
    root: Path

    @property
    def home(self) -> Path:
        return self.root / self.setting.name / f"seed_{self.seed}"

    def runs(self, comparison: str) -> Path:
        return self.home / comparison

    def scores(self, comparison: str, mode: str) -> Path:
        return self.runs(comparison) / "scores" / mode

    def config(self, comparison: str) -> Config:
        return self.setting.config(self.seed, self.home, COMPARISONS[comparison][0].num_branches)

    def made(self, comparison: str, arm: Arm) -> Made:
        return arm.make(self.config(comparison), self.runs(comparison))


def arms_of(comparison: str, seed: int, names: Sequence[str] = ()) -> list[Arm]:
    """The arms that have this seed; or those of these names, whatever the seed.

    Raises:
        ConfigError: an unknown name.
    """
    arms = COMPARISONS[comparison]
    if unknown := set(names) - {arm.name for arm in arms}:
        known = ", ".join(arm.name for arm in arms)
        raise ConfigError(f"{comparison} has no arm {', '.join(sorted(unknown))}; it has {known}")
    if names:
        return [arm for arm in arms if arm.name in names]
    return [arm for arm in arms if seed in (SEEDS if arm.main else FEW_SEEDS)]


def material_job(folder: SeedFolder) -> Job:
    """Makes the base model and the shards of a seed."""
    words = (folder.setting.name, str(folder.seed), str(folder.home))
    program = Program(module="copd_megatron.reproduction.make", arguments=words)
    return Job(name="material", folder=folder.home / "jobs", program=program, digest=_digest(words[:2]))


def training_jobs(folder: SeedFolder, comparison: str, arms: Sequence[Arm]) -> list[Job]:
    """The jobs of all tasks of the arms, each once, those first that others need.

    Raises:
        ConfigError: an arm's configuration is not valid.
    """
    tasks: dict[str, Task] = {}
    for arm in arms:
        for task in folder.made(comparison, arm).tasks:
            tasks.setdefault(task.name, task)
            if task.trains:
                validate(task.config, world_size=None, model=None)
    return [job_of(task, folder.runs(comparison) / "jobs") for task in tasks.values()]


def measuring_jobs(
    folder: SeedFolder, comparison: str, arms: Sequence[Arm], *, after: Sequence[str] = ()
) -> list[Job]:
    """The jobs that measure all models of the arms, greedily and sampled, after the jobs of these names."""
    models: dict[str, str] = {}
    for arm in arms:
        models |= folder.made(comparison, arm).models
    jobs, config = [], folder.config(comparison)
    for mode, (responses, temperature) in MODES.items():
        config.run.name, config.run.dir = f"measure_{mode}", str(folder.runs(comparison) / f"measure_{mode}")
        config.evaluation.num_generations_per_prompt, config.evaluation.temperature = responses, temperature
        jobs_folder = folder.runs(comparison) / "jobs"
        jobs_folder.mkdir(parents=True, exist_ok=True)
        path = jobs_folder / f"measure_{mode}.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        pairs = [f"{label}={path}" for label, path in models.items()]
        words = (str(path), str(folder.scores(comparison, mode)), *pairs)
        program = Program(module="copd_megatron.reproduction.measure", arguments=words)
        digest = _digest([*pairs, what_is_set(config)])
        name = f"{mode}_{digest}"
        jobs.append(Job(name=name, folder=jobs_folder, program=program, after=tuple(after), digest=digest))
    return jobs


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=6).hexdigest()
