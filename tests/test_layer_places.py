"""This machine's layers (Transformer Engine's on a GPU, Megatron's own on a CPU) against the folder and the
checkpoint format: every tensor has its place. Nothing is computed."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.distributed import run_distributed
from tests.support.models import make_model
from tests.support.models_vl import make_vl_model

Entries = set[tuple[str, tuple[int, ...]]]


def make_folders(root: Path) -> list[Path]:
    """Text and vision-language, dense and mixtures."""
    return [
        make_model(root / "text"),
        make_model(root / "text_mixture", num_experts=4, num_experts_per_tok=2),
        make_vl_model(root / "vision"),
        make_vl_model(root / "vision_mixture", mixture=True),
    ]


def check_places(folder: Path) -> None:
    """Loads a folder into the layers, reads it back, and compares names and shapes with what the converter,
    which knows no layers, expects of a checkpoint."""
    from copd_megatron.config.schema import ParallelConfig
    from copd_megatron.hf.folder import HFFolder
    from copd_megatron.hf.model_config import read_model_shape
    from copd_megatron.model.places import megatron_tensors, stack_sizes
    from copd_megatron.policy import cpu
    from copd_megatron.policy.megatron.model import build_chunks, transformer_config
    from copd_megatron.policy.shard import ShardView, load_hf

    dims, source = read_model_shape(folder), HFFolder(folder)
    config = transformer_config(dims, ParallelConfig(), torch.float32)
    with cpu.cuda_to_cpu():
        chunks = build_chunks(dims, config, 64, model_path=folder)
    view = ShardView(chunks, dims, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
    load_hf(view, folder)
    filled = set()
    for slot in view.local:
        if slot.stack is None or slot.expert is None:
            stored = source.read(slot.name)
        else:
            stored = source.read_expert(slot.stack, slot.expert)
        assert torch.equal(view.read(slot).cpu(), stored), slot.name
        filled.add(view._parameter(slot).data_ptr())
    assert [n for n, p in chunks[0].named_parameters() if p.data_ptr() not in filled] == []

    saved: Entries = {
        (entry.key, tuple(entry.global_shape))
        for entry in chunks[0].sharded_state_dict(prefix="").values()
        if hasattr(entry, "global_shape") and not entry.key.endswith("_extra_state")
    }
    expected: Entries = {
        (tensor.key, (*stack_sizes(dims, tensor.key), *tensor.shape)) for tensor in megatron_tensors(dims)
    }
    # gate and up are one tensor to the converter, two pieces of it to Megatron
    assert {e for e in saved if "fc1.weight" not in e[0]} == {e for e in expected if "fc1.weight" not in e[0]}


def _check(folders: list[Path]) -> None:
    from copd_megatron.config.schema import ParallelConfig
    from copd_megatron.policy import cpu
    from copd_megatron.policy.megatron.model import initialize_parallel

    if not torch.cuda.is_available():
        cpu.enable()
    torch.distributed.init_process_group("gloo")
    initialize_parallel(ParallelConfig(), 1)
    for folder in folders:
        check_places(folder)


def test_every_tensor_has_its_place_in_the_layers(tmp_path: Path) -> None:
    run_distributed(_check, 1, args=(make_folders(tmp_path),), timeout=200, gpus=True)
