"""One actor as a Megatron sharded state dict, and back, at any layout.

The model's tensors keep their own names, so that Megatron's tools find them. The optimizer's are stored under
``optimizer.``, shaped like the model's (Megatron's ``fully_reshardable``), so that tensor, pipeline and data
parallel sizes may change between saving and loading. A teacher snapshot is stored under ``teacher.``, each
rank's random states under ``rng``.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import Tensor

from copd_megatron.checkpoint.distcp import check_items
from copd_megatron.checkpoint.manifest import CheckpointError
from copd_megatron.policy import cpu
from copd_megatron.policy.actor import MegatronActor, WeightSnapshot

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_TEACHER = "teacher."
_RNG = "rng"


def actor_layout(actor: MegatronActor) -> dict[str, int]:
    """The layout as a manifest records it."""
    parallel = actor.parallel
    return {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "dp": parallel.data_parallel_size,
    }


def sharded_state(
    actor: MegatronActor, *, teacher: WeightSnapshot | None, loading: bool, with_rng: bool = True
) -> dict[str, Any]:
    """What this rank saves, or (``loading``) what it wants: model, optimizer, random states, teacher.

    Tensors alias the live ones (the optimizer's are gathered copies in host memory). Collective over the
    branch.

    Args:
        teacher: a snapshot to save as well; when loading, any snapshot means that one is wanted.
        with_rng: random states belong to ranks, so they cannot be loaded at another layout.
    """
    actor.take_memory()
    state: dict[str, Any] = {"model": actor.model.sharded_state_dict(prefix="")}
    if teacher is not None:
        state["teacher"] = _snapshot_state(actor, state["model"], teacher)
    if actor.optimizer is not None:
        _allocate_optimizer_state(actor)
        with cpu.cuda_to_cpu(), _offsets_without_padding(actor):
            state["optimizer"] = actor.optimizer.sharded_state_dict(
                state["model"], is_loading=loading, metadata=_METADATA
            )
        state["scheduler_steps"] = actor.scheduler.num_steps
    if with_rng:
        rng = {} if loading else random_states()
        state["rng"] = ShardedObject(_RNG, rng, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
    return state


def load_state(
    actor: MegatronActor, folder: str, *, with_teacher: bool, same_layout: bool
) -> WeightSnapshot | None:
    """Puts a branch's saved state into the actor; collective over the branch.

    Learning rate, weight decay and the like stay as configured now; moments, step counts and the position in
    the learning-rate schedule come from the checkpoint.

    Args:
        folder: the branch's folder of a checkpoint.
        with_teacher: the checkpoint has a teacher snapshot.
        same_layout: saved at this layout, so that each rank finds its own random states.

    Returns:
        The teacher snapshot (its version is the caller's to set), if there is one.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    wanted = actor.snapshot() if with_teacher else None
    state = sharded_state(actor, teacher=wanted, loading=True, with_rng=same_layout)
    groups = _hyperparameters(actor)
    loaded = _load(state, folder, actor.device)
    with cpu.cuda_to_cpu(), torch.no_grad():
        _copy_model(actor, loaded["model"])
        if actor.optimizer is not None:
            _load_optimizer(actor, loaded["optimizer"])
            _set_hyperparameters(actor, groups)
            actor.scheduler.num_steps = 0
            actor.scheduler.step(increment=loaded["scheduler_steps"])
    if same_layout:
        set_random_states(loaded["rng"])
    if wanted is None:
        return None
    return WeightSnapshot(version=wanted.version, tensors=_in_parameter_order(actor, loaded["teacher"]))


def load_weights(actor: MegatronActor, folder: str) -> None:
    """Puts only the weights of a folder in Megatron's format into the actor; collective over the branch.

    Raises:
        CheckpointError: the folder does not fit the model.
    """
    actor.take_weights()
    state = {"model": actor.model.sharded_state_dict(prefix="")}
    loaded = _load(state, folder, actor.device)
    with torch.no_grad():
        _copy_model(actor, loaded["model"])


def _load(state: dict[str, Any], folder: str, device: torch.device) -> dict[str, Any]:
    """``dist_checkpointing.load`` without entries that the checkpoint lacks, and with errors that help."""
    _refuse_programs(folder, device)
    _drop_extra_state(state, folder)
    try:
        with warnings.catch_warnings():
            # torch tells of its own calls to itself
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
            loaded: dict[str, Any] = dist_checkpointing.load(state, folder)
    except (CheckpointingException, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder} does not fit the model: {error}; use the model.path and the branches that it was "
            "saved with"
        ) from error
    return loaded


def _refuse_programs(folder: str, device: torch.device) -> None:
    """Megatron's loader runs what the pickles in a folder ask for: the ranks look at them first, each at its
    share, and none loads until all have looked."""
    problem: Exception | None = None
    try:
        check_items(Path(folder), part=dist.get_rank(), num_parts=dist.get_world_size())
    except (CheckpointError, OSError) as error:  # whatever it is, the others wait
        problem = error
    refusals = torch.tensor(int(problem is not None), device=device)
    dist.all_reduce(refusals)
    if problem is not None:
        raise problem
    if refusals:
        raise CheckpointError(f"{folder}: refused by another rank, whose message says why")


# ---- weights ---------------------------------------------------------------------------------------------


def _copy_model(actor: MegatronActor, values: dict[str, Any]) -> None:
    """Copies what is not in the parameters yet: loading writes into them, but returns tensors that Megatron
    had to rebuild (fused ones)."""
    named = dict(actor.model.named_parameters())
    for name, value in values.items():
        if name in named and isinstance(value, Tensor) and value.data_ptr() != named[name].data_ptr():
            named[name].copy_(value)


def _snapshot_state(actor: MegatronActor, model: dict[str, Any], snapshot: WeightSnapshot) -> dict[str, Any]:
    """The model's sharding with a snapshot's tensors in it."""
    held = {id(p): tensor for p, tensor in zip(actor.model.parameters(), snapshot.tensors, strict=True)}
    return {
        name: replace(entry, key=_TEACHER + entry.key, data=held[id(entry.data)])
        for name, entry in model.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _in_parameter_order(actor: MegatronActor, values: dict[str, Any]) -> list[Tensor]:
    """Loaded teacher tensors in the order that ``WeightSnapshot`` keeps."""
    by_parameter = {
        id(entry.data): values[name]
        for name, entry in actor.model.sharded_state_dict(prefix="").items()
        if name in values
    }
    return [by_parameter[id(p)].to("cpu") for p in actor.model.parameters()]


def _drop_extra_state(state: dict[str, Any], folder: str) -> None:
    """Drops Transformer Engine's bookkeeping from the state where the checkpoint has none (saved on CPU)."""
    saved = load_sharded_metadata(folder)
    model = state["model"]
    for name in [n for n, e in model.items() if isinstance(e, ShardedObject) and e.unique_key not in saved]:
        del model[name]


# ---- optimizer -------------------------------------------------------------------------------------------


def _optimizers(actor: MegatronActor) -> Iterator[Any]:
    """Megatron's optimizers, out of the chain that holds them."""
    yield from getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])


def _allocate_optimizer_state(actor: MegatronActor) -> None:
    """Makes zero moments where no step has been taken yet: Megatron's state dict needs them to exist."""
    for optimizer in _optimizers(actor):
        inner = optimizer.optimizer
        if inner is None or inner.state:
            continue
        optimizer.init_state_fn(inner, optimizer.config)
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state.setdefault("step", torch.zeros((), dtype=torch.float32))


@contextlib.contextmanager
def _offsets_without_padding(actor: MegatronActor) -> Iterator[None]:
    """Lets parameters have the offsets of the gathered state while Megatron cuts it up.

    Megatron-Core 0.19 gathers the optimizer's buckets without the padding between them, and then cuts the
    parameters out at their offsets with padding: from a buffer's second bucket on (a tied output layer on the
    last stage has one of its own) it silently saves shifted values. Without padding, nothing changes.
    Upstream: ``DistributedOptimizer.sharded_param_state_fully_reshardable``.
    """
    buffers = [buffer for optimizer in _optimizers(actor) for buffer in optimizer.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        shift, total = {}, 0
        for bucket in buffer.buckets:
            shift[bucket.bucket_id] = total - bucket.offset
            total += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start + shift[bucket], stop + shift[bucket], bucket)
            for parameter, (start, stop, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, padded, strict=True):
            buffer.param_index_map = offsets


def _load_optimizer(actor: MegatronActor, loaded: dict[Any, Any]) -> None:
    """Moments, master weights and step counts.

    Megatron's loader cannot do it in one call: with torch's AdamW (CPU) it looks for a ``step`` tensor that
    these states do not have, and leaves all parameters sharing one. It skips a ``step`` that is a number, so
    steps are numbers while the moments are loaded, and each parameter then gets a tensor of its own.
    """
    optimizers = list(_optimizers(actor))
    if ("optimizer" in loaded) != (len(optimizers) == 1):
        raise CheckpointError(
            "the checkpoint keeps the optimizer of experts "
            + ("together with" if "optimizer" in loaded else "apart from")
            + " the rest, as parallel.expert_model_parallel_size "
            + ("1" if "optimizer" in loaded else "above 1")
            + f" does; now it is {actor.parallel.expert_model_parallel_size}: resume with that, or start "
            "from exported weights"
        )
    for number, optimizer in enumerate(optimizers):
        state = dict(loaded if len(optimizers) == 1 else loaded[number])
        moments = state.pop("param_state")
        optimizer.load_state_dict(_with_rates(state, optimizer.param_groups))
        own = [entry for entry in optimizer.optimizer.state.values() if "step" in entry]
        for entry in own:
            entry["step"] = float(entry["step"])
        optimizer.load_parameter_state_from_fully_reshardable(moments)
        for entry in own:
            entry["step"] = torch.tensor(entry["step"], dtype=torch.float32)


_RATES: Final = ("max_lr", "min_lr")


def _with_rates(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's saved state whose groups have the learning rates that are configured now. Megatron finds
    a group by them, among other things, and no group after ``optimizer.lr`` has been changed. They are the
    same for all groups."""
    now = {key: groups[0][key] for key in _RATES if key in groups[0]} if groups else {}
    own = dict(state["optimizer"])
    own["param_groups"] = [{**group, **now} for group in own["param_groups"]]
    return {**state, "optimizer": own}


def _hyperparameters(actor: MegatronActor) -> list[list[dict[str, Any]]]:
    """The configured settings of every parameter group."""
    if actor.optimizer is None:
        return []
    return [
        [{k: v for k, v in group.items() if k not in ("params", "step")} for group in o.param_groups]
        for o in _optimizers(actor)
    ]


def _set_hyperparameters(actor: MegatronActor, groups: list[list[dict[str, Any]]]) -> None:
    for optimizer, settings in zip(_optimizers(actor), groups, strict=True):
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)


# ---- random states ---------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """Every generator of this process that training may draw from, as plain types and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.tensor(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restores what ``random_states`` returned."""
    random.setstate(_tuples(states["python"]))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])


def _tuples(value: Any) -> Any:
    """Lists as tuples, which ``random.setstate`` insists on."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
