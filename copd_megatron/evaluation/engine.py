"""A rollout engine with the weights of one Hugging Face folder, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from copd_megatron.config import Config
from copd_megatron.config.schema import RolloutConfig
from copd_megatron.data.loader import MediaLoader
from copd_megatron.hf.folder import HFFolder
from copd_megatron.policy.device import model_dtype
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.topology.single import single_process


@contextlib.contextmanager
def engine_of_folder(
    config: Config, rollout: RolloutConfig, folder: str | Path, *, name: str, media: MediaLoader | None
) -> Iterator[RolloutEngine]:
    """Starts vLLM on the model in ``folder``. ``name`` is the engine's, in messages and shared memory.

    Raises:
        RolloutError: vLLM could not start, or could not take the weights.
    """
    with single_process() as run_id:
        engine = RolloutEngine(
            model_path=folder,
            config=rollout,
            branch=name,
            run_id=run_id,
            dtype=model_dtype(config),
            max_tokens=config.model.max_sequence_tokens,
            seed=config.run.seed,
            media=media,
        )
        engine.load_weights(HFFolder(folder).iterate(), version=0)
        yield engine
