"""Settings of the run as a whole: its name, model, schedule, evaluation, end and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from omegaconf import MISSING

from copd_megatron.config.bounds import (
    Bounds,
    Matches,
    NonNegativeInt,
    OneOf,
    PathText,
    PositiveInt,
    Seconds,
)
from copd_megatron.config.schema.choices import Device

# One component of a path on any system: not the folder itself and not its parent.
_FOLDER_NAME = Matches(
    r"(?!\.{1,2}$)(?! )[^/\\\x00-\x1f\x7f]{1,200}(?<! )",
    "the name of one folder (at most 200 characters, no / or \\, not . or ..); for a path, set run.dir",
)


@dataclass(kw_only=True)
class RunConfig:
    """Name, place and randomness of the run, and what happens when something goes wrong."""

    name: Annotated[str, _FOLDER_NAME] = "copd"
    """Name of the run, shown in logs and in W&B. The default run directory is ``runs/<name>``."""
    dir: PathText | None = None
    """Run directory: resolved settings, metrics, checkpoints, exported models, tables. Null:
    ``runs/<name>``."""
    seed: NonNegativeInt = 1
    """Root of every random choice: data order, sampling seeds, mini-batches. Two runs with the same settings
    and seed on the same machine give the same numbers."""
    device: Device = Device.auto
    """``cuda``, ``cpu``, or ``auto``: CUDA when torch sees a GPU. Set it to refuse the other kind of
    machine."""
    collective_timeout_seconds: Seconds = 1800.0
    """Seconds that one operation over several ranks may take. After that a rank reports who waits for whom
    and ends the job. Raise it for very long responses, lower it to find a hang sooner."""
    max_restarts: NonNegativeInt = 0
    """How often ``copd train`` on one machine starts again after a failure, each time from the newest valid
    checkpoint. Under SLURM, set COPD_MAX_RESTARTS instead (``launchers/slurm.sh``)."""
    overwrite: bool = False
    """Start from scratch in a run directory that already holds a run. All that its runs have written is lost;
    what anybody else has put there stays, and is named."""


@dataclass(kw_only=True)
class ModelConfig:
    """The base model that every branch starts from."""

    path: PathText = MISSING
    """Hugging Face folder of the base model theta_0: config.json, safetensors, tokenizer."""
    dtype: Annotated[str, OneOf(("auto", "float32", "bfloat16"))] = "auto"
    """Number format of weights and activations: ``float32``, ``bfloat16``, or ``auto`` (float32 on CPU,
    bfloat16 on CUDA)."""
    max_sequence_tokens: Annotated[int, Bounds(at_least=2)] = 2048
    """Longest prompt plus response, in tokens; also vLLM's context length. The paper allows 16,384 tokens
    for each of the two."""
    freeze_vision: bool = False
    """Train the decoder only and leave the vision tower as it is."""
    system_prompt: str | None = None
    """System message that the chat template puts before every prompt. Null: none."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Alg. 1: ``cycles`` times ``rlvr_steps`` (S_RL) of Phase I, then ``opd_steps`` (S_OPD) of Phase II.

    The paper found S_RL : S_OPD = 1.5 : 1 best; it gives no absolute numbers."""

    cycles: PositiveInt = 4
    """Cycles N of the two phases. The run has cycles x (rlvr_steps + opd_steps) steps. The paper does not
    give N."""
    rlvr_steps: NonNegativeInt = 15
    """Steps S_RL of Phase I in a cycle: each branch learns from its own rewards. The paper finds
    S_RL : S_OPD = 1.5 : 1 best. 0: no Phase I."""
    opd_steps: NonNegativeInt = 10
    """Steps S_OPD of Phase II in a cycle: branches also learn from their teachers. 0: no Phase II."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Validation during training, at its end, and by ``copd eval``."""

    at_start: bool = True
    """Evaluate the base model before the first step. Needed for the table's base row."""
    every_steps: NonNegativeInt = 0
    """Steps between evaluations during training. 0: at the start and at the end only."""
    merged: bool = False
    """Evaluate the mean of the branches as they are, too, at every evaluation during training
    (``every_steps``). The mean goes from the branches to their engines directly; only where their pipelines
    differ are an export of every branch and their merge written to the run directory each time."""
    max_prompts: PositiveInt | None = None
    """Validation prompts per domain, spread evenly over its shards. Null: all."""
    num_generations_per_prompt: PositiveInt = 1
    """Responses per validation prompt; their mean is reported. Raise it, with a temperature above 0, for
    small benchmarks."""
    temperature: Annotated[float, Bounds(at_least=0.01, at_most=2, also=0)] = 0.0
    """Sampling temperature, as vLLM samples. 0: the most probable token each time (greedy)."""


@dataclass(kw_only=True)
class EndConfig:
    """What happens after the last step."""

    merge: bool = True
    """Merge the branches (uniform mean), write the merged model and evaluate it."""
    export: bool = True
    """Write each branch as a Hugging Face folder, to ``<run_dir>/export``. A merge needs them and writes
    them in any case."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Joint checkpoints of all branches, from which the same command resumes."""

    save_period: NonNegativeInt = 0
    """Steps between checkpoints; there is another after the last step. 0: only on SIGTERM or SIGUSR1, or
    before the wall-clock limit. A crash then loses the run: set it for anything long."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept. Each takes about 16 bytes per trained parameter."""
    keep_best: NonNegativeInt = 0
    """Checkpoints with the highest mean validation accuracy that are kept besides. Only those saved at a
    step that ``evaluation.every_steps`` evaluated count."""
    async_save: bool = False
    """Write while training goes on. Costs a copy of weights and optimizer in host memory."""
    verify_hashes: bool = True
    """Read all of a checkpoint and compare hashes before it is loaded. False: compare sizes only."""
    wall_clock_limit_seconds: Seconds | None = None
    """Seconds from the job's start to its end, to save in time. Null: until ``SLURM_JOB_END_TIME``, where
    that is set."""
    save_before_seconds: Annotated[float, Bounds(at_least=0, at_most=1e8)] = 120.0
    """Save and stop when less than this would be left after another step."""
