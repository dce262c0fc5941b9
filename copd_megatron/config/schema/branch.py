"""Settings of a branch: its data, media, rewards, layout and sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from copd_megatron.config.bounds import (
    Bounds,
    FilledText,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Share,
)
from copd_megatron.config.schema.choices import DifficultyBalance, RolloutQuantization


@dataclass(kw_only=True)
class PoolConfig:
    """One of several sets of prompts that a branch draws from: a domain of its own in metrics and tables."""

    train: list[PathText] = field(default_factory=list)
    """Shards to train on, named as in ``data.train``."""
    validation: list[PathText] = field(default_factory=list)
    """Shards for evaluation. Empty: this domain is not evaluated."""
    weight: PositiveFloat = 1.0
    """The pool's share of the branch's prompts is its weight divided by the sum of all pools' weights."""
    pass_rates: PathText | None = None
    """How often a model solves each prompt of this pool, as ``data.pass_rates``."""


@dataclass(kw_only=True)
class DifficultyConfig:
    """Which prompts are drawn how often, by their pass rates (Uni-OPD's offline difficulty balancing). Pass
    rates are given by ``data.pass_rates``, or by that of each pool."""

    balance: DifficultyBalance = DifficultyBalance.none
    """Repeats prompts in each epoch, so that prompts of every difficulty are drawn equally often, as far as
    ``max_repeat`` allows. Prompts that are always or never solved are not repeated (``mirrored_j``: those
    never solved)."""
    max_repeat: PositiveInt = 4
    """Most times that balancing draws one prompt in an epoch."""
    min_pass_rate: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0
    """Prompts with a lower pass rate are left out. 0: none."""
    max_pass_rate: Annotated[float, Bounds(at_least=0, at_most=1)] = 1.0
    """Prompts with a higher pass rate are left out. 1: none."""


@dataclass(kw_only=True)
class DataConfig:
    """A branch's prompts, in webdataset shards."""

    train: list[PathText] = field(default_factory=list)
    """Shards to train on: paths, globs or brace ranges (``math-{000000..000007}.tar``)."""
    validation: list[PathText] = field(default_factory=list)
    """Shards for evaluation, named like those of ``train``. Empty: the branch's domain is not evaluated."""
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    """Several sets of prompts by name, in place of ``train`` and ``validation``: training on mixed data. Each
    has its own order and epochs. After any number of prompts, each pool has given its share of them, rounded
    down or up."""
    pass_rates: PathText | None = None
    """Index of how often a model solves each training prompt, which ``copd data difficulty`` writes."""
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    """What the pass rates are used for."""
    shuffle: bool = True
    """Shuffle shards and samples anew in each epoch, in an order that seed and epoch determine. False: the
    order of the shards."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt in tokens, expanded images and videos included. Longer ones are skipped, counted and
    logged. The paper: 16,384."""


@dataclass(kw_only=True)
class MediaConfig:
    """How images and videos are decoded and how finely the model sees them. One setting for all branches,
    because a teacher must see what its student saw."""

    frame_rate: PositiveFloat = 2.0
    """Frames per second taken from a video, evenly spaced."""
    min_frames: PositiveInt = 4
    """Fewest frames taken from a short video, if it has that many."""
    max_frames: PositiveInt = 768
    """Most frames taken from a video; longer videos are sampled more sparsely. Lower it if videos fill the
    context."""
    image_min_pixels: PositiveInt | None = None
    """Smaller images are enlarged to this many pixels (height x width). Null: the model's own setting."""
    image_max_pixels: PositiveInt | None = None
    """Larger images are shrunk to this many pixels. Lower it to spend fewer tokens on an image (Qwen3-VL:
    one per 32 x 32 pixels). Null: the model's own setting."""
    video_min_pixels: PositiveInt | None = None
    """Smaller videos are enlarged to this many pixels, counted over all frames taken (frames x height x
    width). Null: the model's own setting."""
    video_max_pixels: PositiveInt | None = None
    """Larger videos are shrunk to this many pixels, counted over all frames taken. Null: the model's own
    setting."""
    max_pixels_hard_limit: PositiveInt = 256 * 1024 * 1024
    """Most pixels, as stored, that are decoded for one image or for the frames taken from one video. A
    sample with more is skipped, counted and logged, so that a broken file cannot fill the memory."""
    num_workers: NonNegativeInt = 2
    """Threads per rank that decode and process media ahead of time. 0: decode when needed."""
    cache_bytes: NonNegativeInt = 1024 * 1024 * 1024
    """Bytes of processed media kept per rank. A step reads each item several times (sampling, scoring,
    training), and what does not fit is decoded again."""


@dataclass(kw_only=True)
class RewardConfig:
    """The verifiers that grade a branch's responses."""

    verifiers: list[str] = field(default_factory=lambda: ["math", "exact", "numeric", "reasoning_gym"])
    """Verifiers that this branch's samples may name: built-in names, or your own as
    ``package.module:function``."""
    terms: dict[str, float] = field(default_factory=dict)
    """Weights of what a training reward consists of, by verifier: ``sample`` is the verifier that the sample
    names, and ``{sample: 0.9, format: 0.1}`` adds a small reward for the form. Empty: the sample's alone.
    Evaluations always grade by the sample's."""
    timeout_seconds: Seconds = 10.0
    """Seconds that a verifier may take for one response. One that takes longer scores it 0, which is counted
    and logged. ``code`` takes about 0.04 s for the first test case and 0.01 s for each further one, and what
    the program takes."""
    num_workers: PositiveInt = 1
    """Worker processes per rank for verifiers that run isolated (``math``, ``code``, ``proof``,
    ``reasoning_gym``, your own). Up to 4 more start beside slow calls; each may take 2 GiB."""


@dataclass(kw_only=True)
class ParallelConfig:
    """The branch's Megatron layout: ranks = tensor x pipeline x context x data."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that each hold a slice of every matrix (TP). Raise it when a model does not fit one GPU; keep it
    within one machine, since every layer communicates."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that each hold a share of the layers (PP). For models that do not fit one machine's GPUs."""
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    """Chunks of layers per pipeline stage (interleaved schedule), which shortens the pipeline's idle time.
    1: none."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence (CP). For contexts whose activations do not fit one rank."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a mixture-of-experts model (EP); divides tensor x context x data."""
    data_parallel_size: PositiveInt = 1
    """Copies of the model that share a step's rows (DP). Raise it to make a step faster."""
    sequence_parallel: bool = False
    """Outside the sliced matrices, each tensor-parallel rank keeps its share of the tokens only. Saves
    activations; needs ``tensor_model_parallel_size`` above 1."""

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
    """How a branch samples with vLLM."""

    tensor_parallel_size: PositiveInt = 1
    """vLLM's tensor parallelism. It divides the branch's ranks; the branch gets ranks / this many
    engines."""
    temperature: Annotated[float, Bounds(at_least=0.01, at_most=2)] = 1.0
    """Sampling temperature of training prompts, as vLLM samples. The actor computes its log-probabilities at
    the same temperature. Branches that teach each other need the same one. The paper: 1.0."""
    top_p: Share = 1.0
    """Sample from the most probable tokens that together hold this much probability. 1: from all, which is
    what the actor's log-probabilities assume; less needs ``loss.mismatch_correction``."""
    top_k: Annotated[int, Bounds(at_least=1, also=-1)] = -1
    """Sample from this many most probable tokens. -1: from all; anything else needs
    ``loss.mismatch_correction``, like ``top_p``."""
    max_new_tokens: PositiveInt = 1024
    """Longest response in tokens. One that reaches it without a stop counts as truncated. The paper:
    16,384."""
    stop: list[FilledText] = field(default_factory=list)
    """Strings that end a response, besides the tokenizer's end-of-sequence token."""
    gpu_memory_utilization: Share = 0.5
    """Share of a GPU's memory that vLLM may take for weights and KV cache. Ignored on CPU."""
    cpu_kv_cache_gib: PositiveFloat = 0.25
    """Size of the KV cache on CPU, in GiB per rank."""
    max_num_seqs: PositiveInt = 256
    """Sequences that an engine decodes at once. Lower it when sampling runs out of memory."""
    enforce_eager: bool | None = None
    """True: no CUDA graphs and no compilation, for a faster start and slower sampling. Null: true on CPU,
    false on a GPU."""
    enable_prefix_caching: bool = True
    """Keep the KV cache of prompts, so that a group's samples share their prompt's."""
    enable_chunked_prefill: bool = True
    """Process long prompts in pieces beside decoding. GPU only; never on CPU."""
    over_sampling: NonNegativeFloat = 0.0
    """Begin this share of further native prompts (0.25: a quarter more), and end the sampling when the
    wanted number are done. Saves the wait for the longest responses and favours prompts with short ones. 0:
    off, every response is waited for."""
    partial_rollouts: bool = False
    """Carry the unfinished responses to the next step instead of throwing them away. Needs ``over_sampling``
    and ``training.max_weight_lag`` above 0."""
    quantization: RolloutQuantization = RolloutQuantization.none
    """``fp8``: vLLM quantises its linear layers at every weight sync, for faster sampling on GPUs. Raises
    the mismatch between the engine and the actor; consider ``loss.mismatch_correction``."""


@dataclass(kw_only=True)
class BranchConfig:
    """One expert: its data, rewards, layout and sampling."""

    data: DataConfig = field(default_factory=DataConfig)
    """The domain's shards."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What grades its responses."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its ranks and how they share the model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How it samples."""
    num_prompts_per_step: PositiveInt = 256
    """Native prompts per step, over all ranks of the branch. The paper: 256. More make a steadier gradient
    and a longer step."""
    num_generations_per_prompt: PositiveInt = 8
    """Responses per native prompt: GRPO's group size G. At least 2, since the baseline is the group's mean.
    The paper: 8."""
    frozen: bool = False
    """The branch neither samples nor updates; it can only teach (static distillation)."""
    model_path: PathText | None = None
    """Hugging Face folder that this branch starts from, for an expert trained before, say. Null:
    ``model.path``."""
