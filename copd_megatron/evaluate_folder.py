"""``copd eval``: validation accuracy of one Hugging Face folder, in one process."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from copd_megatron.config import Config
from copd_megatron.config.model_shape import read_model_shape
from copd_megatron.data import load_validation
from copd_megatron.device import model_dtype
from copd_megatron.metrics.table import render_table
from copd_megatron.policy.weights import HFFolder
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.engine import RolloutEngine, SamplingSettings
from copd_megatron.topology.single import single_process


def evaluate_folder(config: Config, folder: str | Path) -> str:
    """Samples every domain's validation prompts from the model in ``folder`` and returns the table.

    Raises:
        ConfigError: ``folder`` is not a model that vLLM could load.
    """
    read_model_shape(folder, "model")
    first = next(iter(config.branches.values()))
    options = config.evaluation
    settings = SamplingSettings(
        num_generations=options.num_generations_per_prompt, temperature=options.temperature
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row: dict[str, float] = {}
    counts: dict[str, int] = {}
    with single_process() as run_id:
        engine = RolloutEngine(
            model_path=folder,
            config=first.rollout,
            branch="eval",
            run_id=run_id,
            dtype=model_dtype(config),
            max_tokens=config.model.max_sequence_tokens,
            seed=config.run.seed,
        )
        engine.load_weights(HFFolder(folder).iterate(), version=0)
        for domain, branch in config.branches.items():
            if not branch.data.validation:
                continue
            prompts = load_validation(
                branch.data,
                tokenizer,
                domain=domain,
                max_prompts=options.max_prompts,
                verifiers=branch.reward.verifiers,
                system_prompt=config.model.system_prompt,
            )
            with Grader(branch.reward) as grader:
                graded = grader.grade(engine.sample(prompts, settings, step=0, branch=f"validation/{domain}"))
            row[domain] = sum(r.reward or 0.0 for r in graded) / len(graded)
            counts[domain] = len(prompts)
    return render_table({Path(folder).name: row}, list(row), num_prompts=counts)
