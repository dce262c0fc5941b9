"""The uniform and weighted mean of Hugging Face folders, tensor by tensor, by one process and by several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from copd_megatron.hf.folder import HFFolder
from copd_megatron.merge.mean import merge_mean
from tests.support.distributed import run_distributed
from tests.support.models import make_model, reference_model
from tests.support.texts import random_texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / str(seed), seed=seed, num_hidden_layers=2) for seed in range(3)]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(HFFolder(folder).iterate())


def _expected(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    sources = [_tensors(folder) for folder in folders]
    return {
        name: sum(w * s[name].double() for w, s in zip(weights, sources, strict=True)).to(tensor.dtype)  # type: ignore[union-attr]
        for name, tensor in sources[0].items()
    }


def _assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    merged = _tensors(folder)
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        assert tensor.dtype is expected[name].dtype
        # the order of a float64 sum may differ; rounded to the target type that is one unit at most
        torch.testing.assert_close(tensor, expected[name], rtol=1.2e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "weights", [None, [0.5, 0.3, 0.2], [1.0, 1.0, -1.0]], ids=["uniform", "convex", "arithmetic"]
)
def test_merge_equals_the_float64_mean(
    folders: list[Path], tmp_path: Path, weights: list[float] | None
) -> None:
    merge_mean(folders, tmp_path / "merged", weights=weights)
    _assert_equal(tmp_path / "merged", _expected(folders, weights or [1 / 3] * 3))


def test_merged_folder_is_a_model(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge_mean(folders[:2], out)
    text = random_texts(1, 256)[0]
    with torch.no_grad():
        logits = reference_model(out)(
            input_ids=torch.from_numpy(text.token_ids.astype(np.int64))[None]
        ).logits
    assert logits.isfinite().all()
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((out / name).read_text()) == json.loads((folders[0] / name).read_text())


def test_a_folder_of_that_name_is_replaced(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "stale.safetensors").write_bytes(b"")
    merge_mean(folders[:2], out)
    _assert_equal(out, _expected(folders[:2], [0.5, 0.5]))
    assert not (out / "stale.safetensors").exists()


def test_the_mean_of_one_model_is_the_model(folders: list[Path], tmp_path: Path) -> None:
    merge_mean(folders[:1], tmp_path / "merged")
    _assert_equal(tmp_path / "merged", _tensors(folders[0]))


def test_sums_do_not_lose_what_bfloat16_would(folders: list[Path], tmp_path: Path) -> None:
    """Each half of 256 and 1 would be rounded by itself, and their sum again."""
    halves = []
    for i, values in enumerate(([1.0, 256.0, 3.0], [1.0078125, 1.0, -3.0])):
        folder = tmp_path / str(i)
        merge_mean(folders[:1], folder)
        tensors = {name: t.to(torch.bfloat16) for name, t in load_file(folder / "model.safetensors").items()}
        tensors["model.norm.weight"][:3] = torch.tensor(values, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        halves.append(folder)
    merge_mean(halves, tmp_path / "merged")
    norm = _tensors(tmp_path / "merged")["model.norm.weight"]
    assert norm.dtype is torch.bfloat16
    exact = torch.tensor([1.00390625, 128.5, 0.0], dtype=torch.float64)
    assert torch.equal(norm[:3], exact.to(torch.bfloat16))


def test_shards_have_an_index_and_a_bound(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    bound = 100_000
    merge_mean(folders[:2], out, shard_bytes=bound)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= bound
    _assert_equal(out, _expected(folders[:2], [0.5, 0.5]))


def _merge_together(folders: list[Path], out: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    merge_mean(
        folders,
        out,
        shard_bytes=100_000,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        barrier=dist.barrier,
    )
    dist.destroy_process_group()


def test_several_processes_write_the_same_bytes_as_one(folders: list[Path], tmp_path: Path) -> None:
    merge_mean(folders, tmp_path / "one", shard_bytes=100_000)
    run_distributed(_merge_together, 3, args=(folders, tmp_path / "three"))
    _assert_equal(tmp_path / "three", _expected(folders, [1 / 3] * 3))
    for file in (tmp_path / "one").glob("model*"):
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes()


# ---- refusals -------------------------------------------------------------------------------------------


def test_differing_tensors_are_refused(folders: list[Path], tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    merge_mean(folders[:1], partial)
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        merge_mean([folders[0], partial], tmp_path / "merged")
    tied = make_model(tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings|lm_head"):
        merge_mean([folders[0], tied], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_differing_shapes_are_refused(folders: list[Path], tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", num_hidden_layers=2, intermediate_size=256)
    with pytest.raises(ValueError, match=r"intermediate_size|mlp\.|shape"):
        merge_mean([folders[0], wide], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_weights_must_match_the_models(folders: list[Path], tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} weights for 2 models"):
        merge_mean(folders[:2], tmp_path / "merged", weights=[1.0] * count)
    with pytest.raises(ValueError, match="0 models"):
        merge_mean([], tmp_path / "merged")
