"""``copd eval``: validation accuracy of one Hugging Face folder, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from copd_megatron.config import Config
from copd_megatron.config.domains import all_domains
from copd_megatron.data.sources import PromptSources
from copd_megatron.evaluation.run import accuracy, num_prompts
from copd_megatron.evaluation.table import render_table
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.policy.device import model_dtype
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.engine import RolloutEngine, SamplingSettings
from copd_megatron.topology.single import single_process


def evaluate_folder(config: Config, folder: str | Path) -> str:
    """Samples the validation prompts of every domain from the model in ``folder`` and returns the table.

    Raises:
        ConfigError: ``folder`` is not a model that vLLM can load.
        DataError: no branch has validation data, or a shard cannot be used.
    """
    shape = read_model_shape(folder, "model")
    first = next(iter(config.branches.values()))
    sources = PromptSources(config, folder, shape)
    with contextlib.ExitStack() as stack:
        if sources.media is not None:
            stack.callback(sources.media.close)
        validation = sources.validation()
        graders = {
            domain.name: stack.enter_context(Grader(config.branches[domain.branch].reward))
            for domain in all_domains(config)
            if domain.name in validation
        }
        run_id = stack.enter_context(single_process())
        engine = RolloutEngine(
            model_path=folder,
            config=first.rollout,
            branch="eval",
            run_id=run_id,
            dtype=model_dtype(config),
            max_tokens=config.model.max_sequence_tokens,
            seed=config.run.seed,
            media=sources.media,
        )
        engine.load_weights(HFFolder(folder).iterate(), version=0)

        def sample(prompts: Sequence[Prompt], settings: SamplingSettings, purpose: str) -> list[Rollout]:
            grader = graders[prompts[0].domain]
            return grader.grade(engine.sample(prompts, settings, step=0, branch=purpose))

        row = accuracy(sample, validation, config.evaluation)
    return render_table({Path(folder).name: row}, list(row), num_prompts=num_prompts(validation))
