"""Which rank of a Megatron branch holds which part of a Hugging Face model's tensors. Pure: no torch.

Every Hugging Face tensor is owned, on each pipeline stage that needs it, by the tensor-parallel ranks of that
stage: either whole (``dim`` None) or as one contiguous range along ``dim`` per rank. Megatron fuses tensors
(q, k and v of a query group; gate and up) into one parameter, but each rank's share of every single Hugging
Face tensor is still one contiguous range. Loading, weight sync and export need to know no more than that;
``fused`` says where a part lies inside a fused parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from copd_megatron.model.shape import ModelShape, VisionShape


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A tensor of a Hugging Face folder with one matrix of each expert of a layer (Qwen3-VL's mixtures).

    As published, the matrices are transposed: expert ``e``'s is ``tensor[e, :, columns].T``.
    """

    prefix: str
    """Of the layer's two stacks, ``gate_up_proj`` and ``down_proj``."""
    num_experts: int
    hidden: int
    ffn: int
    part: str
    """gate, up or down."""

    @property
    def name(self) -> str:
        return f"{self.prefix}.{'down' if self.part == 'down' else 'gate_up'}_proj"

    @property
    def shape(self) -> tuple[int, int, int]:
        """[experts, inputs, outputs]; gate and up share the outputs of one tensor."""
        sides = (self.ffn, self.hidden) if self.part == "down" else (self.hidden, 2 * self.ffn)
        return (self.num_experts, *sides)

    @property
    def columns(self) -> slice:
        """This part's outputs."""
        first = self.ffn if self.part == "up" else 0
        return slice(first, first + (self.hidden if self.part == "down" else self.ffn))


def as_published(stack: Stack, shape_of: Callable[[str], tuple[int, ...]]) -> bool:
    """Whether a folder's stacks of this layer are as published, or as transformers 5 saves them: not
    transposed. One of the two is never square, so their shapes tell.

    Args:
        shape_of: shape of a tensor of the folder by name.

    Raises:
        ValueError: they are of another shape.
    """
    both = [replace(stack, part=part) for part in ("gate", "down")]
    found = [shape_of(one.name) for one in both]
    if found == [one.shape for one in both]:
        return True
    plain = [(experts, outputs, inputs) for experts, inputs, outputs in (one.shape for one in both)]
    if found != plain:
        raise ValueError(
            f"{' and '.join(one.name for one in both)} are {found}, config.json implies "
            f"{[one.shape for one in both]} as published, or {plain}"
        )
    return False


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A Hugging Face tensor's place on a pipeline stage."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Full Hugging Face shape."""
    dim: int | None
    """Dimension split over tensor-parallel ranks; None: replicated."""
    stage: int
    """Pipeline stage that owns it (a tied output embedding is also held by the last stage)."""
    module: str
    """Megatron module path on that stage, layer number already local: ``decoder.layers.0.mlp...``."""
    part: str
    """Which part of the module's weight it is: whole, q, k, v, gate or up; ``parameter``: ``module`` names
    the parameter itself."""
    group: str
    """Tensors of one group belong to one fused rollout parameter, or to one stack, and travel together."""
    chunk: int = 0
    """Model chunk of that stage (virtual pipeline)."""
    expert: int | None = None
    """Number of the expert that it belongs to. Only the expert-parallel ranks that hold that expert own it,
    as a whole."""
    stack: Stack | None = None
    """The tensor that holds it in a Hugging Face folder, where that is not one called ``name``. (vLLM accepts
    ``name`` all the same.)"""
    pads_vocabulary: bool = False
    """Its rows are tokens: Megatron and vLLM pad them, each in its own way, before they split them."""
    copy_of_embedding: bool = False
    """The tied output weight on the last stage: loaded from the embedding, never exported."""

    def range_of(self, tp_rank: int, tp_size: int) -> tuple[int, int]:
        """Rows [start, stop) along ``dim`` that a tensor-parallel rank owns. The last ranks of a padded
        vocabulary may own fewer, or none."""
        if self.dim is None:
            raise ValueError(f"{self.name} is replicated, not split")
        size = self.shape[self.dim]
        share = -(-size // tp_size)
        return min(tp_rank * share, size), min((tp_rank + 1) * share, size)


def layers_of_stage(num_layers: int, stage: int, pp_size: int, *, chunk: int = 0, vpp_size: int = 1) -> range:
    """Decoder layers of one chunk of a pipeline stage. The split is even, as ``validate`` has checked."""
    share = num_layers // (pp_size * vpp_size)
    first = (chunk * pp_size + stage) * share
    return range(first, first + share)


def expert_owner(expert: int, num_experts: int, ep_size: int) -> int:
    """Expert-parallel rank that holds an expert."""
    return expert // (num_experts // ep_size)


def slots(dims: ModelShape, pp_size: int, vpp_size: int = 1) -> list[Slot]:
    """Every Hugging Face tensor of the model with its owner, in forward order."""
    hidden, head = dims.hidden_size, dims.head_dim
    queries, keys = dims.num_attention_heads * head, dims.num_query_groups * head
    last = pp_size - 1
    table: list[Slot] = []

    def put(
        name: str,
        shape: tuple[int, ...],
        dim: int | None,
        stage: int,
        module: str,
        part: str = "whole",
        **kw: Any,
    ) -> None:
        kw.setdefault("group", name)
        table.append(Slot(name=name, shape=shape, dim=dim, stage=stage, module=module, part=part, **kw))

    add = partial(put, chunk=0)
    if dims.vision is not None:
        for name, shape in vision_tensors(dims.vision).items():
            add(f"model.visual.{name}", shape, None, 0, f"visual.{name}", "parameter")
    decoder = dims.decoder_prefix
    tokens = partial(add, shape=(dims.vocab_size, hidden), dim=0, pads_vocabulary=True)
    tokens(f"{decoder}.embed_tokens.weight", stage=0, module="embedding.word_embeddings")
    for chunk, stage in itertools.product(range(vpp_size), range(pp_size)):
        for local, layer in enumerate(
            layers_of_stage(dims.num_layers, stage, pp_size, chunk=chunk, vpp_size=vpp_size)
        ):
            hf, core = f"{decoder}.layers.{layer}", f"decoder.layers.{local}"
            attention = f"{core}.self_attention"
            add = partial(put, chunk=chunk)
            add(f"{hf}.input_layernorm.weight", (hidden,), None, stage, f"{core}.input_layernorm")
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                add(
                    f"{hf}.self_attn.{part}_proj.weight",
                    (rows, hidden),
                    0,
                    stage,
                    f"{attention}.linear_qkv",
                    part,
                    group=f"{hf}.self_attn.qkv",
                )
            for part in ("q", "k"):
                add(
                    f"{hf}.self_attn.{part}_norm.weight",
                    (head,),
                    None,
                    stage,
                    f"{attention}.{part}_layernorm",
                )
            add(f"{hf}.self_attn.o_proj.weight", (hidden, queries), 1, stage, f"{attention}.linear_proj")
            add(f"{hf}.post_attention_layernorm.weight", (hidden,), None, stage, f"{core}.pre_mlp_layernorm")
            if dims.num_experts is None:
                _feed_forward(add, f"{hf}.mlp", stage, f"{core}.mlp", hidden, dims.ffn_hidden_size)
                continue
            add(f"{hf}.mlp.gate.weight", (dims.num_experts, hidden), None, stage, f"{core}.mlp.router")
            experts, module, ffn = f"{hf}.mlp.experts", f"{core}.mlp.experts", dims.expert_ffn_size
            stacks = None
            if dims.stacks_experts:
                stacks = partial(Stack, prefix=experts, num_experts=dims.num_experts, hidden=hidden, ffn=ffn)
            for expert in range(dims.num_experts):
                name = f"{experts}.{expert}"
                _feed_forward(add, name, stage, module, hidden, ffn, stacks=stacks, expert=expert)
    add = partial(put, chunk=vpp_size - 1)
    add(f"{decoder}.norm.weight", (hidden,), None, last, "decoder.final_layernorm")
    tokens = partial(tokens, chunk=vpp_size - 1, stage=last, module="output_layer")
    if not dims.tie_word_embeddings:
        tokens("lm_head.weight")
    elif pp_size > 1:
        tokens(f"{decoder}.embed_tokens.weight", copy_of_embedding=True)
    return table


def tied_copy(dims: ModelShape) -> dict[str, str]:
    """The output embedding that some folders store though it is tied, and what it is equal to."""
    return (
        {"lm_head.weight": f"{dims.decoder_prefix}.embed_tokens.weight"} if dims.tie_word_embeddings else {}
    )


def _feed_forward(
    add: Callable[..., None],
    name: str,
    stage: int,
    module: str,
    hidden: int,
    ffn: int,
    *,
    stacks: Callable[..., Stack] | None = None,
    **kw: Any,
) -> None:
    """Adds gate, up and down of an MLP, or of one expert, which tensor parallelism does not split.

    Args:
        stacks: makes the stack of a part, where a Hugging Face folder stacks the experts.
    """
    for part in ("gate", "up", "down"):
        down = part == "down"
        own: dict[str, Any] = {"part": "whole" if down else part}
        if not down:
            own["group"] = f"{name}.gate_up"
        if stacks is not None:
            own |= {"stack": (stack := stacks(part=part)), "group": stack.prefix}
        add(
            f"{name}.{part}_proj.weight",
            (hidden, ffn) if down else (ffn, hidden),
            None if "expert" in kw else int(down),
            stage,
            f"{module}.linear_fc2" if down else f"{module}.linear_fc1",
            **own,
            **kw,
        )


def vision_tensors(vision: VisionShape) -> dict[str, tuple[int, ...]]:
    """Names (below ``model.visual.``) and shapes of the vision tower's tensors, in forward order."""
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    merged = hidden * vision.spatial_merge_size**2
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    table: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (hidden, *patch),
        "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (vision.num_positions, hidden),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, size: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (size,), (size,)

    for layer in range(vision.depth):
        block = f"blocks.{layer}"
        norm(f"{block}.norm1", hidden)
        norm(f"{block}.norm2", hidden)
        linear(f"{block}.attn.qkv", 3 * hidden, hidden)
        linear(f"{block}.attn.proj", hidden, hidden)
        linear(f"{block}.mlp.linear_fc1", ffn, hidden)
        linear(f"{block}.mlp.linear_fc2", hidden, ffn)
    mergers = ["merger"] + [f"deepstack_merger_list.{i}" for i in range(vision.num_deepstack)]
    for name in mergers:
        norm(f"{name}.norm", hidden if name == "merger" else merged)
        linear(f"{name}.linear_fc1", merged, merged)
        linear(f"{name}.linear_fc2", vision.out_hidden_size, merged)
    return table
