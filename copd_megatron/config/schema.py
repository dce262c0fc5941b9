"""Every setting of a run: one dataclass per component, each field documented beneath it.

This module imports neither torch nor vLLM. A default lives here and nowhere else. ``load.py`` reads YAML
and dotted overrides into these classes; ``validate.py`` holds the checks that span fields. Instances are
treated as read-only once loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Device(Enum):
    """Where the actors run: ``auto`` takes CUDA when torch sees a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Topology(Enum):
    """Which live branches exchange in an OPD phase (paper section 3.3)."""

    none = "none"
    hub_and_spoke = "hub_and_spoke"
    all_to_all = "all_to_all"
    custom = "custom"


class TeacherMode(Enum):
    """Which weights a live branch scores with when it teaches."""

    live = "live"
    phase_snapshot = "phase_snapshot"
    every_n_steps = "every_n_steps"


class Aggregation(Enum):
    """How per-token losses become one number (see ``advantages.token_weights``)."""

    seq_mean_token_mean = "seq_mean_token_mean"
    token_mean = "token_mean"
    seq_mean_token_sum = "seq_mean_token_sum"
    constant = "constant"


class RatioLevel(Enum):
    """Importance ratio per token (GRPO) or per sequence (GSPO)."""

    token = "token"
    sequence = "sequence"


class KLEstimator(Enum):
    """Schulman's estimators of KL(policy || reference) from sampled tokens."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlacement(Enum):
    """Whether the KL term is subtracted from token advantages or added to the loss."""

    loss = "loss"
    reward = "reward"


class MismatchCorrection(Enum):
    """Correction for the rollout engine and the trainer disagreeing on the sampling policy."""

    none = "none"
    tis_token = "tis_token"
    tis_sequence = "tis_sequence"
    icepop = "icepop"
    sequence_rejection = "sequence_rejection"


class FP8Recipe(Enum):
    """How Transformer Engine scales FP8 matrices. ``delayed``: by the largest values of earlier steps;
    ``tensorwise``: of the tensor itself; ``blockwise``: of blocks of 128 (Hopper); ``mxfp8``: of blocks of 32
    (Blackwell)."""

    none = "none"
    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class FP8Format(Enum):
    """``hybrid``: E4M3 forward, E5M2 for gradients."""

    hybrid = "hybrid"
    e4m3 = "e4m3"


class Recompute(Enum):
    """Activations computed again in the backward pass: of parts of a layer, or of whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class RolloutQuantization(Enum):
    """What vLLM turns the actor's weights into."""

    none = "none"
    fp8 = "fp8"


class LRSchedule(Enum):
    """Decay after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class RunConfig:
    name: str = "copd"
    """Shown in logs; the default run directory is ``runs/<name>``."""
    dir: str | None = None
    """Run directory: resolved config, metrics, exports, table. Null: ``runs/<name>``."""
    seed: int = 1
    """Root of every random choice: data order, sampling seeds, dropped samples."""
    device: Device = Device.auto
    collective_timeout_seconds: float = 1800.0
    """After this long in one operation a rank reports who waits for whom and ends the job."""
    max_restarts: int = 0
    """How often a local run (``copd train`` by itself) starts again after a failure, from its newest valid
    checkpoint. Under SLURM: COPD_MAX_RESTARTS (``launchers/slurm.sh``)."""
    overwrite: bool = False
    """Start anew in a run directory that already holds a finished or interrupted run."""


@dataclass(kw_only=True)
class ModelConfig:
    path: str = MISSING
    """Hugging Face folder of the base model theta_0: config.json, safetensors, tokenizer."""
    dtype: str = "auto"
    """Compute type: ``float32``, ``bfloat16``, or ``auto`` (float32 on CPU, bfloat16 on CUDA)."""
    max_sequence_tokens: int = 2048
    """Longest prompt plus response, in tokens; also vLLM's context length."""
    freeze_vision: bool = False
    """Leave a vision tower as it is and train the decoder only."""
    system_prompt: str | None = None
    """Put in front of every prompt through the chat template."""


@dataclass(kw_only=True)
class DataConfig:
    train: list[str] = field(default_factory=list)
    """webdataset shards: paths, globs or brace ranges."""
    validation: list[str] = field(default_factory=list)
    """Shards for the evaluation table."""
    shuffle: bool = True
    """Shuffle shard and sample order, as (seed, epoch) determines."""
    max_prompt_tokens: int = 1024
    """Longer prompts are skipped, counted and logged."""


@dataclass(kw_only=True)
class MediaConfig:
    """Decoding of images and videos and how finely the model sees them; one setting for all branches, since
    a teacher must see what its student saw."""

    frame_rate: float = 2.0
    """Frames per second taken from a video, evenly spaced."""
    min_frames: int = 4
    """Frames taken from a short video, where it has so many."""
    max_frames: int = 768
    """Longer videos are sampled more sparsely."""
    image_min_pixels: int | None = None
    """Smaller images are enlarged to it. Null: the processor's own setting, here and below."""
    image_max_pixels: int | None = None
    """Larger images are shrunk to it."""
    video_min_pixels: int | None = None
    """Like ``image_min_pixels``, over all frames that are taken: frames x height x width."""
    video_max_pixels: int | None = None
    """Like ``image_max_pixels``, over all frames that are taken."""
    max_pixels_hard_limit: int = 256 * 1024 * 1024
    """An image, or the taken frames of a video, with more pixels than this as stored is not decoded: the
    sample is skipped, counted and logged."""
    num_workers: int = 2
    """Threads per rank that decode and process media ahead of time. 0: decode when needed."""
    cache_bytes: int = 1024 * 1024 * 1024
    """Processed media kept per rank. A step reads each item several times (sampling, scoring, training):
    what does not fit is decoded again."""


@dataclass(kw_only=True)
class RewardConfig:
    verifiers: list[str] = field(default_factory=lambda: ["math", "exact", "numeric", "reasoning_gym"])
    """Verifiers this branch's samples may name; built-in names or ``package.module:attribute``."""
    timeout_seconds: float = 10.0
    """A verifier that takes longer scores the sample 0, is counted and logged."""
    num_workers: int = 1
    """Worker processes per rank for verifiers that run isolated (``math``, ``reasoning_gym``, your own)."""


@dataclass(kw_only=True)
class ParallelConfig:
    """The branch's Megatron layout. ranks = tensor x pipeline x context x data."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    """Model chunks per pipeline stage (interleaved schedule); 1: none."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture; divides tensor x context x data."""
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    """Between the split matrices, each tensor-parallel rank keeps its share of the tokens only."""

    @property
    def world_size(self) -> int:
        """Ranks of the branch."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )


@dataclass(kw_only=True)
class RolloutConfig:
    tensor_parallel_size: int = 1
    """vLLM's tensor parallelism; divides the branch's ranks, the rest become rollout replicas."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: no limit."""
    max_new_tokens: int = 1024
    """A response that reaches it without a stop is flagged as truncated."""
    stop: list[str] = field(default_factory=list)
    """Stop strings besides the tokenizer's end-of-sequence."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU that vLLM may take; ignored on CPU."""
    cpu_kv_cache_gib: float = 0.25
    """KV cache on CPU, in GiB per rank."""
    max_num_seqs: int = 256
    """Sequences that an engine decodes at once."""
    enforce_eager: bool | None = None
    """True: no CUDA graphs and no compilation. Null: true on CPU, false on a GPU."""
    enable_prefix_caching: bool = True
    """The samples of a group share their prompt's KV cache."""
    enable_chunked_prefill: bool = True
    """Long prompts are prefilled in pieces beside decoding (GPU; on CPU never)."""
    over_sampling: float = 0.0
    """Share of further prompts that a step begins; it goes on when the wanted number are done. 0: off, every
    response is waited for. Native prompts only."""
    partial_rollouts: bool = False
    """Carry the unfinished to the next step; needs ``over_sampling`` and ``training.max_weight_lag``."""
    quantization: RolloutQuantization = RolloutQuantization.none
    """``fp8``: vLLM quantises linear layers at every weight sync (GPU)."""


@dataclass(kw_only=True)
class BranchConfig:
    """One expert: its data, reward, layout and sampling."""

    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    num_prompts_per_step: int = 256
    num_generations_per_prompt: int = 8
    """Group size G."""
    frozen: bool = False
    """Never samples for itself nor updates; it can only teach (static OPD, MOPD)."""
    model_path: str | None = None
    """Start from this Hugging Face folder instead of ``model.path`` (a frozen expert, say)."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Alg. 1: ``cycles`` times ``rlvr_steps`` (S_RL) of Phase I, then ``opd_steps`` (S_OPD) of Phase II."""

    cycles: int = 4
    rlvr_steps: int = 15
    opd_steps: int = 10


@dataclass(kw_only=True)
class EdgeConfig:
    """One edge of the distillation graph, for ``opd.topology: custom``."""

    student: str = MISSING
    teacher: str = MISSING
    prompts: str | None = None
    """Branch whose prompts are used; null: the teacher's."""
    beta: float | None = None
    """Null: ``opd.beta``."""
    num_prompts_per_step: int | None = None
    """Null: ``opd.num_prompts_per_step``."""


@dataclass(kw_only=True)
class BehaviourConfig:
    """Top-k overlap (Eq. 6) and symmetric KL between student and teacher on student-visited states."""

    top_k: int = 10
    num_states: int = 64
    """States per edge and measurement on which both are computed exactly. 0 switches them off."""
    every_steps: int = 1
    """OPD steps between measurements."""


@dataclass(kw_only=True)
class OPDConfig:
    topology: Topology = Topology.hub_and_spoke
    hub: str | None = None
    """Hub of ``hub_and_spoke``; null: the first branch."""
    edges: list[EdgeConfig] = field(default_factory=list)
    """Edges of ``custom``; for the other topologies, overrides of single edges (beta, batch size)."""
    beta: float = 1.0
    """Token advantage = beta * (log pi_teacher - log pi_student) (Eq. 8)."""
    num_prompts_per_step: int | None = None
    """Cross prompts per edge and step; null: the student's ``num_prompts_per_step``."""
    num_generations_per_prompt: int | None = None
    """Samples per cross prompt; null: the student's ``num_generations_per_prompt``."""
    delta_clip: float | None = None
    """Clip |delta| to this bound; null: no clipping."""
    ship_media: bool = False
    """Send images and videos with the rows to be scored, for branches that do not share storage; false: the
    teacher reads them itself, by reference."""
    teacher_mode: TeacherMode = TeacherMode.live
    snapshot_every_steps: int = 1
    """For ``every_n_steps``."""
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)


@dataclass(kw_only=True)
class LossConfig:
    """The clipped surrogate (Eq. 7) and its options. Pure data: see ``losses.py``."""

    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    constant_divisor: float | None = None
    """For ``constant`` (Dr. GRPO): divide token sums by it; null: the branch's ``max_new_tokens``."""
    ratio_level: RatioLevel = RatioLevel.token
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.28
    dual_clip: float | None = None
    """Lower bound c > 1 on the loss of negative advantages (usually 3.0); null: off."""
    kl_coefficient: float = 0.0
    """Weight of KL(policy || reference), Eq. 12; 0: no reference model is kept."""
    kl_estimator: KLEstimator = KLEstimator.k3
    kl_placement: KLPlacement = KLPlacement.loss
    entropy_coefficient: float = 0.0
    """Entropy bonus; the loss has minus coefficient times mean entropy."""
    mismatch_correction: MismatchCorrection = MismatchCorrection.none
    mismatch_cap: float = 2.0
    """C of truncated importance sampling."""
    mismatch_bounds: list[float] = field(default_factory=lambda: [0.5, 5.0])
    """Lower and upper bound on pi_old / pi_rollout for ``icepop`` and ``sequence_rejection``."""


@dataclass(kw_only=True)
class AdvantageConfig:
    """GRPO advantages (Eq. 11) and sample selection. Pure data: see ``advantages.py``."""

    normalize_std: bool = True
    """Divide by the group's standard deviation."""
    std_epsilon: float = 1e-6
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample further prompts in their place."""
    dynamic_sampling_max_rounds: int = 3
    """Sampling rounds per step, the first included."""
    overlong_buffer_tokens: int = 0
    """Soft overlong punishment: over the last this many tokens before ``max_new_tokens`` the reward falls
    linearly by ``overlong_penalty``. 0: off."""
    overlong_penalty: float = 1.0
    overlong_filtering: bool = False
    """Truncated responses get loss mask 0 (they still count in the group's baseline)."""


@dataclass(kw_only=True)
class PrecisionConfig:
    """FP8 in the actor's decoder layers (GPU). Embedding, output layer and vision tower stay in bfloat16."""

    fp8: FP8Recipe = FP8Recipe.none
    fp8_format: FP8Format = FP8Format.hybrid
    num_bf16_layers_at_start: int = 0
    """First decoder layers that stay in bfloat16; not with ``delayed``."""
    num_bf16_layers_at_end: int = 0
    fp8_parameters: bool = False
    """Keep the layers' weights in FP8 only, and gather them so over data-parallel ranks; the optimizer has
    its float32 copy."""


@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_schedule: LRSchedule = LRSchedule.constant
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm bound; 0: no clipping."""
    precision_aware: bool = False
    """Keep gradients, master weights and moments in the types below (Transformer Engine's Adam); false: all
    in float32."""
    main_grads_dtype: str = "float32"
    """float32 or bfloat16."""
    main_params_dtype: str = "float32"
    """float32 or float16."""
    moments_dtype: str = "float32"
    """float32, bfloat16, float16 or uint8 (FP8 with a scale)."""
    cpu_offload_fraction: float = 0.0
    """Share of the optimizer's states that lives, and is stepped, in host memory."""


@dataclass(kw_only=True)
class TrainingConfig:
    micro_batch_tokens: int = 16384
    """Token budget of one micro-batch (padding included) on one data- and context-parallel rank."""
    sequence_packing: bool = True
    """Rows of a micro-batch lie behind each other without padding; false: padded to the longest."""
    recompute: Recompute = Recompute.none
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """For ``selective``: core_attn, mlp; of mixtures moe, moe_act. (GPUs' fused attention keeps little.)"""
    recompute_num_layers: int = 1
    """Layers between two kept activations, with ``full``."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass begins; needs ``overlap_grad_reduce``."""
    num_mini_batches: int = 1
    """Optimizer steps that a step's batch is split into. 1: strictly on-policy."""
    logprob_chunk_tokens: int = 1024
    """Rows of [tokens, vocab / tp] float32 logits that exist at once."""
    max_weight_lag: int = 0
    """Weight versions that a rollout may be behind when it is trained on."""
    max_grad_norm: float | None = None
    """An update whose gradient norm (before clipping) is above this is skipped, as one with a NaN or an
    infinity in it always is: weights and optimizer stay as they were. Null: no such bound."""
    max_skipped_updates: int = 3
    """So many updates skipped one after another are borne; one more ends the run. 0: the first ends it."""


@dataclass(kw_only=True)
class MemoryConfig:
    """Who holds a GPU's memory when. On CPU nothing moves."""

    sleep_rollouts: bool = True
    """vLLM gives its weights and KV cache back while the actor trains."""
    offload_optimizer: bool = True
    """Optimizer states wait in host memory while vLLM has its turn."""
    offload_gradients: bool = True
    """Gradient buffers exist during an update only."""
    offload_weights: bool = False
    """The actor's weights, too, wait in host memory while vLLM samples."""


@dataclass(kw_only=True)
class WeightSyncConfig:
    bucket_bytes: int = 256 * 1024 * 1024
    """Size of one streamed bucket; a sync's extra memory is at most two of them per rank (or of the
    largest tensor, where that is bigger)."""


@dataclass(kw_only=True)
class EvaluationConfig:
    at_start: bool = True
    """Evaluate the base model first; needed for the table's base row."""
    every_steps: int = 0
    """Steps between evaluations during training; 0: only at start and end."""
    max_prompts: int | None = None
    """Validation prompts per domain; null: all."""
    num_generations_per_prompt: int = 1
    temperature: float = 0.0
    """0: greedy."""


@dataclass(kw_only=True)
class EndConfig:
    """What happens after the last step."""

    merge: bool = True
    """Merge the branches (uniform mean), export and evaluate the merged model."""
    export: bool = True
    """Write each branch as a Hugging Face folder."""


@dataclass(kw_only=True)
class CheckpointConfig:
    save_period: int = 0
    """Steps between joint checkpoints, and one after the last step; 0: only on SIGTERM, SIGUSR1 or before the
    wall-clock limit."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints with the highest mean validation accuracy that are kept besides (those saved at a step at
    which ``evaluation.every_steps`` evaluated)."""
    async_save: bool = False
    """Write while training goes on; costs a copy of the branch's weights and optimizer in host memory."""
    verify_hashes: bool = True
    """Read all of a checkpoint and compare hashes before it is loaded; false: sizes only."""
    wall_clock_limit_seconds: float | None = None
    """The job is ended this long after its start; null: at ``SLURM_JOB_END_TIME``, where that is set."""
    save_before_seconds: float = 120.0
    """Save and stop when less than this would be left after another step."""


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases. Login, server and mode are wandb's own (``WANDB_API_KEY``, ``WANDB_BASE_URL``,
    ``WANDB_MODE=offline``)."""

    enabled: bool = False
    """Needs the ``wandb`` package."""
    project: str = "copd-megatron"
    entity: str | None = None
    """User or team; null: the login's."""
    name: str | None = None
    """Of the run; null: ``run.name``."""
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class PrometheusConfig:
    """The metrics of the last step, for Prometheus."""

    textfile: str | None = None
    """A ``.prom`` file, replaced each step, in the folder of node_exporter's textfile collector."""
    port: int | None = None
    """Port on which global rank 0 answers ``GET /metrics``."""
    host: str = "127.0.0.1"
    """Address on which ``port`` is opened. The default is reached from the same node only; 0.0.0.0 is reached
    from every network that the node is in, without a password."""


@dataclass(kw_only=True)
class LoggingConfig:
    console: bool = True
    """Live view: one line a branch."""
    tensorboard: bool = False
    """Events in ``<run_dir>/tensorboard``."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    level: str = "INFO"
    rank_files: bool = True
    """Every rank logs to ``<run_dir>/logs``; ``copd logs`` shows them as one."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Where the time and the memory go."""

    timeline: bool = False
    """Every rank writes what it did when; ``copd timeline`` makes one Chrome trace of it."""
    torch_profiler: bool = False
    """Operators and kernels of the steps below, in ``<run_dir>/profile``."""
    memory_snapshot: bool = False
    """Allocations on CUDA devices during the steps below, in ``<run_dir>/profile``."""
    step_start: int = 2
    """First step recorded; 1 is the run's first, which also warms up."""
    step_end: int = 2
    """Last step recorded."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Global ranks that are recorded; []: all."""
    record_shapes: bool = False
    with_stack: bool = False


@dataclass(kw_only=True)
class Config:
    """The whole run. Every branch starts from ``branch_defaults``, overlaid with its own section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    branches: dict[str, BranchConfig] = field(default_factory=dict)
    """By name, in rank order; ``branch_defaults`` (YAML only) fills what a branch leaves out."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    opd: OPDConfig = field(default_factory=OPDConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    end: EndConfig = field(default_factory=EndConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
