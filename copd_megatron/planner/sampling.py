"""How long vLLM takes for an engine's share of a step's responses. Pure.

Sequences start as soon as one of ``slots`` places is free, longest wait first; every iteration decodes one
token of each active sequence:

    iteration(a) = L decode_seconds + a token_seconds
                   + max((weights read + a context kv bytes) / memory, 2 N a / flops)
    prefill      = 2 N prompts' tokens / flops      once a prompt, if the prefix cache is on

With a mixture of experts, a batch of ``a`` tokens reads the share 1 - (1 - k / E)^a of the experts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from copd_megatron.config.schema import BranchConfig, RolloutQuantization
from copd_megatron.model.shape import ModelShape
from copd_megatron.planner.machine import Machine
from copd_megatron.planner.workload import Rows

_MOST_SEQUENCES = 512
"""That are simulated; of more, evenly spaced ones stand for the rest."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One vLLM engine of a branch."""

    shape: ModelShape
    ranks: int
    bytes_per_weight: int
    bytes_per_number: int
    """Of keys and values."""
    slots: int
    """Sequences that are decoded at once."""
    prefix_caching: bool

    @property
    def kv_bytes_per_token(self) -> float:
        """Of one rank."""
        groups = max(self.shape.num_query_groups / self.ranks, 1)
        return 2 * groups * self.shape.head_dim * self.shape.num_layers * self.bytes_per_number

    def weight_bytes(self, active: float) -> float:
        """That one rank reads to decode one token of each of ``active`` sequences."""
        shape = self.shape
        layers = shape.active_layer_parameters
        if shape.num_experts:
            experts = 3 * shape.num_experts * shape.hidden_size * shape.expert_ffn_size
            met = 1 - (1 - shape.num_experts_per_token / shape.num_experts) ** max(active, 1)
            layers = shape.layer_parameters - experts + experts * met
        return self.bytes_per_weight * (shape.num_layers * layers + shape.embedding_parameters) / self.ranks

    def flops_per_token(self) -> float:
        """Of one rank."""
        shape = self.shape
        return (
            2 * (shape.num_layers * shape.active_layer_parameters + shape.embedding_parameters) / self.ranks
        )


def engine_of(
    branch: BranchConfig, shape: ModelShape, *, bytes_per_number: int, kv_bytes: int, context: float
) -> Engine:
    """The engine that a branch has.

    Args:
        kv_bytes: of the cache of one rank.
        context: mean tokens of a sequence half way through.
    """
    quantized = branch.rollout.quantization is RolloutQuantization.fp8
    engine = Engine(
        shape=shape,
        ranks=branch.rollout.tensor_parallel_size,
        bytes_per_weight=1 if quantized else bytes_per_number,
        bytes_per_number=bytes_per_number,
        slots=1,
        prefix_caching=branch.rollout.enable_prefix_caching,
    )
    room = int(kv_bytes / (engine.kv_bytes_per_token * max(context, 1)))
    return Engine(**{**engine.__dict__, "slots": max(1, min(branch.rollout.max_num_seqs, room))})


def sampling_seconds(
    rows: Sequence[Rows], engine: Engine, num_engines: int, machine: Machine, *, fp8: bool
) -> float:
    """Until the slowest engine has answered its share of all rows; kinds of rows come one after the other."""
    return sum(_one_kind(kind, engine, num_engines, machine, fp8) for kind in rows if kind.count)


@lru_cache(maxsize=4096)
def _one_kind(rows: Rows, engine: Engine, num_engines: int, machine: Machine, fp8: bool) -> float:
    share = rows.count / num_engines
    prompt = rows.lengths.prompt.average
    prompts = share / rows.group if engine.prefix_caching else share
    prefill = engine.flops_per_token() * prompt * max(prompts, 1)
    seconds = prefill / machine.flops(machine.prefill_share, fp8=fp8)
    for duration, active in _activity(rows, share, engine.slots):
        context = prompt + rows.lengths.response.average / 2
        read = engine.weight_bytes(active) + active * context * engine.kv_bytes_per_token
        work = engine.flops_per_token() * active
        hardware = max(
            read / machine.memory_bytes_per_second, work / machine.flops(machine.decode_share, fp8=fp8)
        )
        links = 0.0
        if engine.ranks > 1:
            links = 2 * engine.shape.num_layers * machine.collective_seconds
        fixed = engine.shape.num_layers * machine.decode_seconds
        seconds += duration * (fixed + active * machine.token_seconds + hardware + links)
    return seconds


def _activity(rows: Rows, share: float, slots: int) -> Iterator[tuple[float, float]]:
    """(iterations, active sequences), until all of an engine's responses are done."""
    count = max(round(share), 1)
    shown = min(count, _MOST_SEQUENCES)
    scale = count / shown
    lengths = rows.lengths.response.quantiles(shown)
    # a fixed shuffle: responses do not come ordered by length
    order = sorted(range(shown), key=lambda i: (i * 0.6180339887498949) % 1)
    places = max(round(slots / scale), 1)
    running: list[float] = []
    ends: list[float] = []
    for i in order:
        begin = heapq.heappop(running) if len(running) >= places else 0.0
        heapq.heappush(running, begin + lengths[i])
        ends.append(begin + lengths[i])
    starts = min(places, shown)
    yield from _segments(sorted(ends), starts, scale)


def _segments(ends: Sequence[float], places: int, scale: float) -> Iterator[tuple[float, float]]:
    """Between two ends the number of active sequences is constant: all places, until fewer are left."""
    now = 0.0
    for number, end in enumerate(ends):
        active = min(places, len(ends) - number)
        if end > now:
            yield end - now, active * scale
            now = end
