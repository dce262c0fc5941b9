"""The actor: one branch's policy, trained and scored by Megatron-Core.

It knows nothing of GRPO or distillation. ``log_probs`` scores sequences; ``forward_backward`` accumulates
the gradient of per-token streams; ``optimizer_step`` applies it. All three are collective over the branch:
every rank calls them with the same rows, and every rank gets the same results.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from copd_megatron.config.hardware import FP8_TOKEN_MULTIPLE, check_machine, shares_prompts
from copd_megatron.config.schema import (
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.model.shape import ModelShape
from copd_megatron.objectives.base import TokenLoss
from copd_megatron.policy import cpu
from copd_megatron.policy.batch.balance import CostModel
from copd_megatron.policy.batch.micro_batch import (
    Arrangement,
    Features,
    MicroBatch,
    Sequenced,
    Vision,
    build_micro_batch,
)
from copd_megatron.policy.batch.prompts import assign
from copd_megatron.policy.batch.statistics import BatchStatistics, Tally, tally_mismatch
from copd_megatron.policy.head import VocabShard
from copd_megatron.policy.last_stage import Head, Placed
from copd_megatron.policy.megatron.media_sequences import MediaSeqParams
from copd_megatron.policy.megatron.model import (
    ModelChunks,
    build_chunks,
    initialize_parallel,
    padded_vocab,
    transformer_config,
)
from copd_megatron.policy.megatron.settings import (
    data_parallel_fields,
    optimizer_fields,
    this_machine,
)
from copd_megatron.policy.offload import Offloader
from copd_megatron.policy.scores import Question, ScoreSheet, SequenceScore
from copd_megatron.policy.shard import ShardView, load_hf, plain
from copd_megatron.records import IntArray, TrainRow


@dataclass(frozen=True, kw_only=True)
class WeightSnapshot:
    """One rank's weights at some version."""

    version: int
    tensors: list[Tensor]


class MegatronActor:
    """A trainable (or frozen) Megatron policy on this branch's ranks."""

    def __init__(
        self,
        *,
        model_path: str | Path,
        parallel: ParallelConfig,
        training: TrainingConfig,
        optimizer: OptimizerConfig | None,
        dtype: torch.dtype,
        max_tokens: int,
        temperature: float,
        seed: int,
        total_steps: int,
        precision: PrecisionConfig | None = None,
        memory: MemoryConfig | None = None,
        freeze_vision: bool = False,
        features: Callable[[Any], Features | None] = lambda row: None,
    ) -> None:
        """Builds the model on this rank and loads ``model_path``; collective over the branch.

        ``optimizer`` None makes a frozen actor. ``temperature`` is the sampling temperature, at which all
        log-probabilities are taken. ``total_steps`` is the length of the learning-rate schedule.
        ``features`` gives the processed media of a row to a vision-language model.

        Raises:
            ConfigError: this machine cannot compute with ``precision`` or keep the optimizer's states so.
        """
        self.on_cuda = torch.cuda.is_available()
        if not self.on_cuda:
            cpu.enable()
        initialize_parallel(parallel, seed)
        precision = precision or PrecisionConfig()
        check_machine(precision, optimizer, this_machine(), dtype=str(dtype).removeprefix("torch."))
        self.parallel, self.training, self.temperature = parallel, training, temperature
        self.precision = precision
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.on_cuda else torch.device("cpu")
        )
        self.dims = read_model_shape(model_path)
        self.vision = _vision(self.dims, features)
        self.version = 0
        self._exchanged = False
        """Whether a snapshot has the weights' place, and holds them meanwhile."""
        self._find_place()
        self.config = transformer_config(self.dims, parallel, dtype, training, precision)
        with cpu.cuda_to_cpu():
            self.chunks: list[GPTModel] = build_chunks(
                self.dims,
                self.config,
                max_tokens,
                model_path=model_path,
                freeze_vision=freeze_vision,
                share_prompts=self._shares_prompts,
            )
        self.model: Any = self.chunks[0] if len(self.chunks) == 1 else ModelChunks(self.chunks)
        self.view = self._view_of_weights()
        load_hf(self.view, model_path)
        self.modules: list[Any] = list(self.chunks)
        """What Megatron's schedules run: the chunks in their wrappers."""
        if dtype is not torch.float32:
            self.modules = [Float16Module(self.config, chunk) for chunk in self.chunks]
        self.optimizer = None
        self.offloader: Offloader | None = None
        """None: everything stays on the device."""
        if optimizer is not None:
            self._make_trainable(optimizer, dtype, total_steps)
            if memory is not None:
                self.offloader = Offloader(
                    self.modules,
                    self.optimizer,
                    self.device,
                    gradients=memory.offload_gradients,
                    states=memory.offload_optimizer,
                    weights=memory.offload_weights,
                )

    def _find_place(self) -> None:
        """Which part of the model and of a batch is this rank's, and how micro-batches are laid out."""
        parallel = self.parallel
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.cp_rank = parallel_state.get_context_parallel_rank()
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.shard = VocabShard(
            group=parallel_state.get_tensor_model_parallel_group(),
            start=self.tp_rank
            * padded_vocab(self.dims, parallel.tensor_model_parallel_size)
            // parallel.tensor_model_parallel_size,
            vocab_size=self.dims.vocab_size,
        )
        self.arrangement = Arrangement(
            packed=self.training.sequence_packing,
            cp_size=parallel.context_parallel_size,
            cp_rank=self.cp_rank,
            multiple=math.lcm(
                parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
                FP8_TOKEN_MULTIPLE[self.precision.fp8],
            ),
        )
        self._shares_prompts = shares_prompts(self.training, parallel, on_gpu=self.on_cuda)
        pipeline = parallel.pipeline_model_parallel_size
        self._round = pipeline if parallel.virtual_pipeline_model_parallel_size > 1 else 1
        """The interleaved schedule takes micro-batches in groups of this many."""
        self.cost = CostModel.of_layer(
            query_size=self.dims.num_attention_heads * self.dims.head_dim,
            layer_parameters=self.dims.active_layer_parameters,
        )

    def _view_of_weights(self) -> ShardView:
        """This rank's share of every Hugging Face tensor."""
        return ShardView(
            self.chunks,
            self.dims,
            tp_rank=self.tp_rank,
            tp_size=self.parallel.tensor_model_parallel_size,
            pp_rank=self.pp_rank,
            pp_size=self.parallel.pipeline_model_parallel_size,
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            ep_size=self.parallel.expert_model_parallel_size,
        )

    def _make_trainable(self, settings: OptimizerConfig, dtype: torch.dtype, total_steps: int) -> None:
        ddp = DistributedDataParallelConfig(**data_parallel_fields(self.training, self.precision, settings))
        with cpu.cuda_to_cpu():
            self.modules = [
                DistributedDataParallel(self.config, ddp, module, disable_bucketing=number > 0)
                for number, module in enumerate(self.modules)
            ]
            self.optimizer = get_megatron_optimizer(
                MegatronOptimizerConfig(**optimizer_fields(settings, self.training, self.precision, dtype)),
                self.modules,
            )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.lr_warmup_steps,
            lr_decay_steps=max(total_steps, settings.lr_warmup_steps + 1),
            lr_decay_style=settings.lr_schedule.value,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=max(total_steps, 1),
            wd_incr_style="constant",
        )
        self.scheduler.step(increment=1)  # update number n uses the schedule's value at n, warm-up included
        self.config.finalize_model_grads_func = _sum_model_grads
        no_sync = [module.no_sync for module in self.modules]
        self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    # ---- scoring ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_probs(
        self,
        sequences: Sequence[Sequenced],
        states: Sequence[Sequence[int]] | None = None,
        *,
        top_k: int = 0,
        support: Sequence[IntArray] | None = None,
        temperature: float = 1.0,
    ) -> list[SequenceScore]:
        """Scores every sequence under the current weights; collective over the branch.

        Args:
            sequences: the same list on every rank of the branch; responses must not be empty.
            states: response positions per sequence whose full distribution is wanted (few: each costs
                ``V`` floats on every rank).
            top_k: number of likeliest ids wanted at every response token; 0: none.
            support: [R, k] ids per sequence whose log-probabilities are wanted, all of one k.
            temperature: factor on the sampling temperature.

        Returns:
            One score per sequence, in order, on every rank.
        """
        if not sequences:
            return []
        self.take_weights()
        sheet = ScoreSheet(
            sequences,
            states,
            top_k=top_k,
            support_k=support[0].shape[1] if support else 0,
            vocab_size=self.dims.vocab_size,
            device=self.device,
        )

        def collect(batch: MicroBatch, output: dict[str, Any]) -> None:
            if self.tp_rank == 0 and self.cp_rank == 0:
                sheet.write_tokens(batch, output)
            if self.cp_rank == 0:
                sheet.write_states(batch, output["states"], self.shard)

        question = Question(temperature=self.temperature * temperature, top_k=top_k)
        batches = self._micro_batches(sequences, states, support)
        self._run(batches, forward_only=True, question=question, consume=collect)
        return sheet.reduce()

    @torch.no_grad()
    def snapshot(
        self, *, into: WeightSnapshot | None = None, dtype: torch.dtype | None = None
    ) -> WeightSnapshot:
        """A copy of this rank's current weights, in host memory: that of an older snapshot, which is lost, or
        fresh (page-locked memory is not given back, so a refreshed snapshot should take its old place).

        ``dtype`` None: the weights' own."""
        self.take_weights()
        old = [] if into is None else into.tensors
        tensors = []
        for number, parameter in enumerate(self.model.parameters()):
            values = plain(parameter.detach())
            if old:
                host = old[number]
            else:
                host = torch.empty(values.shape, dtype=dtype or values.dtype, pin_memory=self.on_cuda)
            tensors.append(host.copy_(values))
        return WeightSnapshot(version=self.version, tensors=tensors)

    @torch.no_grad()
    def blend(self, average: WeightSnapshot, rate: float) -> WeightSnapshot:
        """Moves a moving average of the weights (a float32 snapshot: small steps would be lost in bfloat16)
        towards the live ones, in place: average + rate (live - average)."""
        self.take_weights()
        for parameter, held in zip(self.model.parameters(), average.tensors, strict=True):
            held.lerp_(plain(parameter.detach()).to(held), rate)
        return WeightSnapshot(version=self.version, tensors=average.tensors)

    @contextlib.contextmanager
    def using(self, snapshot: WeightSnapshot | None) -> Iterator[int]:
        """Scores with a snapshot's weights (None: the live ones) inside the block; yields their version."""
        if snapshot is None:
            yield self.version
            return
        assert not self._exchanged, "one snapshot at a time has the weights' place"
        parameters = list(self.model.parameters())
        if any(held.dtype != p.dtype for held, p in zip(snapshot.tensors, parameters, strict=True)):
            # a moving average is finer than the weights: in their place it would be rounded
            snapshot = WeightSnapshot(
                version=snapshot.version,
                tensors=[held.to(p.dtype) for held, p in zip(snapshot.tensors, parameters, strict=True)],
            )
        self._exchange(snapshot)
        try:
            yield snapshot.version
        finally:
            self._exchange(snapshot)

    @torch.no_grad()
    def _exchange(self, snapshot: WeightSnapshot) -> None:
        """Weights and snapshot change places: the live weights need no memory of their own meanwhile."""
        self.take_weights()
        for parameter, held in zip(self.model.parameters(), snapshot.tensors, strict=True):
            live = plain(parameter.detach()).clone()
            parameter.copy_(held)
            held.copy_(live)
        self._exchanged = not self._exchanged

    # ---- device memory between phases ------------------------------------------------------------------

    def give_memory(self, *, weights: bool) -> None:
        """Lets what only an update needs leave the device, where that is configured; with ``weights``, the
        weights too. What is called next takes back what it needs."""
        if self.offloader is not None:
            self.offloader.release()
            if weights:
                self.offloader.release_weights()

    def take_weights(self) -> None:
        """The weights are on the device."""
        if self.offloader is not None:
            self.offloader.restore_weights()

    def take_memory(self) -> None:
        """Weights, gradients and optimizer states are on the device."""
        if self.offloader is not None:
            self.offloader.restore()

    # ---- training --------------------------------------------------------------------------------------

    def forward_backward(self, rows: Sequence[TrainRow], token_loss: TokenLoss) -> BatchStatistics:
        """Accumulates the gradient of one (mini-)batch; collective over the branch.

        Args:
            rows: the same on every rank of the branch.
            token_loss: makes each micro-batch's loss from its tokens' log-probabilities and entropies.

        Raises:
            ValueError: a row is staler than ``training.max_weight_lag`` allows.
        """
        self.take_memory()
        for row in rows:
            if self.version - row.weight_version > self.training.max_weight_lag:
                raise ValueError(
                    f"a {row.component} row was sampled with weights {row.weight_version}, the actor is at "
                    f"{self.version}: beyond training.max_weight_lag={self.training.max_weight_lag}"
                )
        prepared = token_loss.prepare(rows)
        tally = Tally()

        def loss_of(batch: MicroBatch, output: dict[str, Any]) -> Tensor:
            logprobs, entropy = output["tokens"].unbind(dim=1)
            placed = Placed(batch.rows, batch.row_index_n, output["head"])
            result = prepared(placed, logprobs, entropy)
            for prefix, values in (("term/", result.terms), ("sum/", result.statistics)):
                for name, value in values.items():
                    tally.add(prefix + name, value)
            tally.add("loss", result.loss)
            tally_mismatch(tally, placed, rows, logprobs.detach(), self.version)
            return result.loss

        for module in self.modules:
            module.zero_grad_buffer()
        assert self.optimizer is not None, "a frozen actor cannot train"
        self.optimizer.zero_grad()
        self._run(self._micro_batches(rows), forward_only=False, loss_of=loss_of)
        sums, maxima = tally.reduce(counts=self.last_stage and self.tp_rank == 0 and self.cp_rank == 0)
        return BatchStatistics(
            loss=sums.get("loss", 0.0),
            terms={k.removeprefix("term/"): v for k, v in sums.items() if k.startswith("term/")},
            sums={k.removeprefix("sum/"): v for k, v in sums.items() if k.startswith("sum/")},
            max_gen_logprob_error=maxima.get("gen_logprob_error", 0.0),
        )

    def optimizer_step(self) -> dict[str, float]:
        """Clips, steps and advances the learning rate, unless the gradient is beyond use.

        An update whose gradient norm is not finite, or above ``training.max_grad_norm``, is skipped: weights
        and optimizer state stay as they were, the learning rate advances. All ranks of the branch decide
        alike, since the norm is the branch's.

        Returns:
            ``grad_norm`` (before clipping), ``lr``, and ``skipped``, 1.0 where the update was left out.
        """
        assert self.optimizer is not None, "a frozen actor cannot train"
        lr = float(self.optimizer.param_groups[0]["lr"])
        with cpu.cuda_to_cpu():
            # Megatron's own step would write a NaN into weights and moments before anyone could look.
            found_inf = self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            limit = self.training.max_grad_norm
            skip = found_inf or not math.isfinite(grad_norm) or (limit is not None and grad_norm > limit)
            if not skip:
                self.optimizer.step()
        self.scheduler.step(increment=1)
        return {"grad_norm": grad_norm, "lr": lr, "skipped": float(skip)}

    def finish_update(self) -> None:
        """Ends a training step: the weights are whole on every rank and have the next version."""
        if self.training.overlap_param_gather:
            with cpu.cuda_to_cpu():
                for module in self.modules:
                    module.start_param_sync(force_sync=True)
        self.version += 1

    # ---- the way through Megatron's schedules ------------------------------------------------------------

    def _micro_batches(
        self,
        sequences: Sequence[Sequenced],
        states: Sequence[Sequence[int]] | None = None,
        support: Sequence[IntArray] | None = None,
    ) -> list[MicroBatch]:
        assigned = assign(
            sequences,
            arrangement=self.arrangement,
            share_prompts=self._shares_prompts,
            num_ranks=self.parallel.data_parallel_size,
            budget_tokens=self.training.micro_batch_tokens,
            cost=self.cost,
            multiple=self._round,
        )
        # the dispatcher of experts that goes without CUDA wants equally many tokens everywhere
        alike = not self.on_cuda and self.dims.num_experts is not None
        return [
            build_micro_batch(
                rows,
                sequences,
                device=self.device,
                arrangement=self.arrangement,
                at_least=assigned.most_tokens if alike else 1,
                states=states,
                vision=self.vision,
                support=support,
                prompt_keys=assigned.prompt_keys,
            )
            for rows in assigned.plan[self.dp_rank]
        ]

    def _run(
        self,
        batches: Sequence[MicroBatch],
        *,
        forward_only: bool,
        question: Question | None = None,
        consume: Any = None,
        loss_of: Any = None,
    ) -> None:
        """Drives Megatron's schedule over this rank's micro-batches.

        On the last pipeline stage either ``consume(batch, output)`` takes the outputs (scoring) or
        ``loss_of(batch, output)`` makes the scalar that is differentiated (training). ``output`` holds
        ``tokens`` [N, 2] (log-probability, entropy), when scoring ``states`` [S, local vocabulary] and what
        ``question`` asks by token, when training the ``head`` that compares distributions.
        """
        asked = question or Question(temperature=self.temperature)

        def step(iterator: Iterator[MicroBatch], module: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output: dict[str, Any] = {}
            media = {} if self.vision is None else {"vision": batch.vision}
            hidden = module(
                input_ids=batch.input_ids_bs,
                position_ids=batch.position_ids,
                attention_mask=None,
                packed_seq_params=_packed_parameters(batch),
                output_processor=partial(self._head, batch, asked, output),
                **media,
            )

            def loss_func(_: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                count = torch.ones((), dtype=torch.int, device=self.device)
                if loss_of is None:
                    consume(batch, output)
                    return torch.zeros((), device=self.device), count, {}
                return loss_of(batch, output), count, {}

            return hidden, loss_func

        with cpu.cuda_to_cpu():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(batches) for _ in self.modules],
                model=self.modules,
                num_microbatches=len(batches),
                seq_length=batches[0].input_ids_bs.shape[1] * self.parallel.context_parallel_size,
                micro_batch_size=batches[0].input_ids_bs.shape[0],
                forward_only=forward_only,
            )

    def _head(
        self,
        batch: MicroBatch,
        asked: Question,
        output: dict[str, Any],
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Replaces Megatron's output layer on the last stage: only wanted positions meet the vocabulary."""
        weight = output_weight if output_weight is not None else output_layer.weight
        if self.parallel.sequence_parallel:
            # the gradient comes back the same on every tensor-parallel rank (``linear_logprobs``)
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        head = Head(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            weight,
            batch,
            shard=self.shard,
            temperature=asked.temperature,
            chunk_tokens=self.training.logprob_chunk_tokens,
        )
        output["tokens"], output["head"] = head.tokens(), head
        if torch.is_grad_enabled():
            return output["tokens"]
        output["states"] = head.states()
        if asked.top_k:
            output["top_logprobs"], output["top_ids"] = head.top(asked.top_k)
        if batch.support_nk is not None:
            output["support"] = head.support()
        return output["tokens"]


def _vision(dims: ModelShape, features: Callable[[Any], Features | None]) -> Vision | None:
    """What micro-batches must know of a vision tower; None for a text model."""
    if dims.vision is None:
        return None
    assert dims.image_token_id is not None and dims.video_token_id is not None
    return Vision(
        image_token_id=dims.image_token_id,
        video_token_id=dims.video_token_id,
        spatial_merge_size=dims.vision.spatial_merge_size,
        features=features,
    )


def _packed_parameters(batch: MicroBatch) -> PackedSeqParams | None:
    """What attention and rotary embedding (and with media, the layers) must know of a pack; None for a padded
    micro-batch."""
    if batch.boundaries is None:
        return None
    where, longest = batch.boundaries.cu_seqlens, batch.boundaries.max_length
    return MediaSeqParams(
        qkv_format="thd",
        cu_seqlens_q=where,
        cu_seqlens_kv=where,
        cu_seqlens_q_padded=where,
        cu_seqlens_kv_padded=where,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        spread=batch.boundaries.spread,
        pad_between_seqs=False,  # else Transformer Engine compares the boundaries in every layer
    )


def _sum_model_grads(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by a token count: our loss is normalised already."""
    finalize_model_grads(model, None, **kwargs)
