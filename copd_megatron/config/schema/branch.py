"""Settings of a branch: its data, media, rewards, layout and sampling."""

from __future__ import annotations

from dataclasses import dataclass, field

from copd_megatron.config.bounds import number
from copd_megatron.config.schema.choices import RolloutQuantization


@dataclass(kw_only=True)
class DataConfig:
    """A domain's prompts, in webdataset shards."""

    train: list[str] = field(default_factory=list)
    """Training shards: paths, globs or brace ranges."""
    validation: list[str] = field(default_factory=list)
    """Validation shards, for the evaluation table."""
    shuffle: bool = True
    """Shuffle shards and samples, in an order that (seed, epoch) determines."""
    max_prompt_tokens: int = number(1024, at_least=1)
    """Longer prompts are skipped, counted and logged."""


@dataclass(kw_only=True)
class MediaConfig:
    """How images and videos are decoded and how finely the model sees them. One setting for all branches,
    because a teacher must see what its student saw."""

    frame_rate: float = number(2.0, above=0)
    """Frames per second taken from a video, evenly spaced."""
    min_frames: int = number(4, at_least=1)
    """Frames taken from a short video, if it has that many."""
    max_frames: int = 768
    """Most frames taken from a video; longer videos are sampled more sparsely."""
    image_min_pixels: int | None = number(None, at_least=1)
    """Smaller images are enlarged to this many pixels. Null, here and below: the processor's own setting."""
    image_max_pixels: int | None = number(None, at_least=1)
    """Larger images are shrunk to this many pixels."""
    video_min_pixels: int | None = number(None, at_least=1)
    """As ``image_min_pixels``, over all frames taken: frames x height x width."""
    video_max_pixels: int | None = number(None, at_least=1)
    """As ``image_max_pixels``, over all frames taken."""
    max_pixels_hard_limit: int = number(256 * 1024 * 1024, at_least=1)
    """An image, or the frames taken from a video, with more stored pixels than this is not decoded: the
    sample is skipped, counted and logged."""
    num_workers: int = number(2, at_least=0)
    """Threads per rank that decode and process media ahead of time. 0: decode when needed."""
    cache_bytes: int = number(1024 * 1024 * 1024, at_least=0)
    """Bytes of processed media kept per rank. A step reads each item several times (sampling, scoring,
    training); what does not fit is decoded again."""


@dataclass(kw_only=True)
class RewardConfig:
    """The verifiers that grade a branch's responses."""

    verifiers: list[str] = field(default_factory=lambda: ["math", "exact", "numeric", "reasoning_gym"])
    """Verifiers that this branch's samples may name: built-in names or ``package.module:attribute``."""
    timeout_seconds: float = number(10.0, above=0)
    """A verifier that takes longer scores the sample 0; this is counted and logged."""
    num_workers: int = number(1, at_least=1)
    """Worker processes per rank for verifiers that run isolated (``math``, ``reasoning_gym``, your own)."""


@dataclass(kw_only=True)
class ParallelConfig:
    """The branch's Megatron layout: ranks = tensor x pipeline x context x data."""

    tensor_model_parallel_size: int = number(1, at_least=1)
    """Ranks that share every layer (TP). Keep it within a node."""
    pipeline_model_parallel_size: int = number(1, at_least=1)
    """Stages that the layers are divided into (PP)."""
    virtual_pipeline_model_parallel_size: int = number(1, at_least=1)
    """Model chunks per pipeline stage (interleaved schedule). 1: off."""
    context_parallel_size: int = number(1, at_least=1)
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = number(1, at_least=1)
    """Ranks that share the experts of a mixture (EP); divides tensor x context x data."""
    data_parallel_size: int = number(1, at_least=1)
    """Replicas of the model, each with its share of the rows (DP)."""
    sequence_parallel: bool = False
    """Between the split matrices, each tensor-parallel rank keeps only its share of the tokens. Saves
    activation memory; needs TP above 1."""

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

    tensor_parallel_size: int = number(1, at_least=1)
    """vLLM's tensor parallelism. It divides the branch's ranks; the rest become rollout replicas."""
    temperature: float = number(1.0, above=0)
    """Sampling temperature. Scores are taken at the same temperature. The paper uses 1.0."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Sample from the most probable tokens that together have this probability. 1: from all."""
    top_k: int = -1
    """Sample from this many most probable tokens. -1: from all."""
    max_new_tokens: int = number(1024, at_least=1)
    """Longest response in tokens; one that reaches it without a stop is flagged as truncated."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response, besides the tokenizer's end-of-sequence token."""
    gpu_memory_utilization: float = number(0.5, above=0, at_most=1)
    """Share of a GPU that vLLM may take. Ignored on CPU."""
    cpu_kv_cache_gib: float = number(0.25, above=0)
    """KV cache on CPU, in GiB per rank."""
    max_num_seqs: int = number(256, at_least=1)
    """Sequences that an engine decodes at once."""
    enforce_eager: bool | None = None
    """True: neither CUDA graphs nor compilation. Null: true on CPU, false on a GPU."""
    enable_prefix_caching: bool = True
    """The samples of a group share their prompt's KV cache."""
    enable_chunked_prefill: bool = True
    """Prefill long prompts in pieces, beside decoding. On a GPU only."""
    over_sampling: float = number(0.0, at_least=0)
    """Share of extra prompts that a step begins; the step ends when the wanted number are done. 0: off, every
    response is waited for. Native prompts only."""
    partial_rollouts: bool = False
    """Continue unfinished responses in the next step. Needs ``over_sampling`` and
    ``training.max_weight_lag``."""
    quantization: RolloutQuantization = RolloutQuantization.none
    """``fp8``: vLLM quantises its linear layers at every weight sync (GPU)."""


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
    num_prompts_per_step: int = number(256, at_least=1)
    """Own prompts per step. The paper uses 256."""
    num_generations_per_prompt: int = number(8, at_least=1)
    """Responses per prompt: the group size G. The paper uses 8."""
    frozen: bool = False
    """Neither samples nor learns: it can only teach (static distillation, several frozen teachers)."""
    model_path: str | None = None
    """Hugging Face folder that this branch starts from. Null: ``model.path``."""
