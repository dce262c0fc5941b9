"""Settings of the run as a whole: its name, model, schedule, evaluation, end and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from copd_megatron.config.bounds import number
from copd_megatron.config.schema.choices import Device


@dataclass(kw_only=True)
class RunConfig:
    """Name, place and randomness of the run, and what happens when something goes wrong."""

    name: str = "copd"
    """Name of the run, shown in logs. The default run directory is ``runs/<name>``."""
    dir: str | None = None
    """Run directory: resolved settings, metrics, exports, table. Null: ``runs/<name>``."""
    seed: int = number(1, at_least=0)
    """Root of every random choice: data order, sampling seeds, mini-batches."""
    device: Device = Device.auto
    """Where the actors run."""
    collective_timeout_seconds: float = number(1800.0, above=0)
    """A rank that spends longer than this in one operation reports who waits for whom and ends the job."""
    max_restarts: int = number(0, at_least=0)
    """How often a local run (``copd train`` by itself) starts again after a failure, from its newest valid
    checkpoint. Under SLURM use COPD_MAX_RESTARTS (``launchers/slurm.sh``)."""
    overwrite: bool = False
    """Start from scratch in a run directory that already holds a run. Its metrics and checkpoints are
    lost."""


@dataclass(kw_only=True)
class ModelConfig:
    """The base model that every branch starts from."""

    path: str = MISSING
    """Hugging Face folder of the base model theta_0: config.json, safetensors, tokenizer."""
    dtype: str = "auto"
    """Compute type: ``float32``, ``bfloat16``, or ``auto`` (float32 on CPU, bfloat16 on CUDA)."""
    max_sequence_tokens: int = number(2048, at_least=2)
    """Longest prompt plus response, in tokens. It is also vLLM's context length."""
    freeze_vision: bool = False
    """Train the decoder only and leave the vision tower as it is."""
    system_prompt: str | None = None
    """System message that the chat template puts before every prompt. Null: none."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Alg. 1: ``cycles`` times ``rlvr_steps`` (S_RL) of Phase I, then ``opd_steps`` (S_OPD) of Phase II.

    The paper found S_RL : S_OPD = 1.5 : 1 best; it gives no absolute numbers."""

    cycles: int = number(4, at_least=1)
    """How often Phase I and Phase II follow each other (N)."""
    rlvr_steps: int = number(15, at_least=0)
    """Steps of Phase I in a cycle (S_RL): every branch learns from its own verifiers. 0: no Phase I."""
    opd_steps: int = number(10, at_least=0)
    """Steps of Phase II in a cycle (S_OPD): branches also learn from their teachers. 0: no Phase II."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Validation during training, at its end, and by ``copd eval``."""

    at_start: bool = True
    """Evaluate the base model before the first step. The table's base row needs it."""
    every_steps: int = number(0, at_least=0)
    """Steps between evaluations during training. 0: only at the start and the end."""
    max_prompts: int | None = number(None, at_least=1)
    """Validation prompts per domain. Null: all."""
    num_generations_per_prompt: int = number(1, at_least=1)
    """Responses sampled per validation prompt; scores are their mean."""
    temperature: float = number(0.0, at_least=0)
    """Sampling temperature of validation. 0: greedy."""


@dataclass(kw_only=True)
class EndConfig:
    """What happens after the last step."""

    merge: bool = True
    """Merge the branches (uniform mean), export and evaluate the merged model."""
    export: bool = True
    """Write each branch as a Hugging Face folder."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Joint checkpoints of all branches, from which the same command resumes."""

    save_period: int = number(0, at_least=0)
    """Steps between checkpoints; the last step is saved too. 0: save only on SIGTERM, SIGUSR1 or just before
    the wall-clock limit, so a crash loses the whole run."""
    keep_last: int = number(2, at_least=1)
    """How many of the newest checkpoints are kept."""
    keep_best: int = number(0, at_least=0)
    """How many of the checkpoints with the highest mean validation accuracy are kept as well. Only steps at
    which ``evaluation.every_steps`` evaluated count."""
    async_save: bool = False
    """Write checkpoints while training continues. Costs a copy of the weights and optimizer in host
    memory."""
    verify_hashes: bool = True
    """Read a whole checkpoint and compare its hashes before loading it. False: compare sizes only."""
    wall_clock_limit_seconds: float | None = number(None, above=0)
    """The job ends this many seconds after its start. Null: at ``SLURM_JOB_END_TIME``, if that is set."""
    save_before_seconds: float = number(120.0, at_least=0)
    """Save and stop when another step would leave less than this before the end of the job."""
