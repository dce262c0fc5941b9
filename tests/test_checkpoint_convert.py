"""Hugging Face to Megatron's format and back: byte for byte, text and vision-language, tied and untied; and
what the real Megatron saves at several layouts, converted, against what transformers saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from copd_megatron.checkpoint.manifest import CheckpointError, hash_file
from copd_megatron.config.schema import ParallelConfig
from copd_megatron.formats.open import open_source
from copd_megatron.formats.tensors import read_whole
from copd_megatron.hf.folder import HFFolder
from copd_megatron.merge.convert import hf_to_megatron, megatron_to_hf
from tests.support.actors import load_and_compare
from tests.support.commands import run_tool
from tests.support.layouts import Job, run_layouts
from tests.support.models import make_model
from tests.support.models_vl import make_vl_model, publish

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("text tied", "text untied", "vision tied", "vision untied", "text mixture", "vision mixture")
EXPERTS = {"sequence_parallel": True, "expert_model_parallel_size": 2}
"""Of mixtures, where tokens are split over two ranks."""
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind; the untied text model in several files of bfloat16."""
    base = tmp_path_factory.mktemp("models")
    found = {}
    for kind in KINDS:
        what, how = kind.split()
        folder = base / kind.replace(" ", "_")
        if what == "text":
            experts = {"num_experts": 4, "num_experts_per_tok": 2} if how == "mixture" else {}
            found[kind] = make_model(folder, tie_word_embeddings=how == "tied", **experts)
        else:
            found[kind] = make_vl_model(folder, tied=how == "tied", mixture=how == "mixture")
    publish(found["vision mixture"])
    _split(found["text untied"])
    return found


def _split(folder: Path) -> None:
    """The same folder in three files and bfloat16, tensors in an order of its own."""
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    where = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {name: tensors[name].contiguous() for name in names if where[name] == file}
        save_file(part, folder / file, {"format": "pt", "made by": "a test"})
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_folder(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    hf_to_megatron(models[kind], tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected, found = _files(models[kind]), _files(tmp_path / "back")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def _through_megatron(parallel: ParallelConfig, model: Path, converted: Path, out: Path) -> str:
    """Loads the converted folder with Megatron itself, compares with direct loading, and saves again."""
    import torch.distributed as dist

    from copd_megatron.checkpoint.distcp import write_metadata
    from copd_megatron.checkpoint.joint import plan_save

    actor, wrong = load_and_compare(parallel, model, converted)
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
    dist.barrier()
    writer = plan_save(actor, out, teacher=None, copy=False)
    writer.write()
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(writer.result(), parts, dst=0)
    if parts is not None:
        assert writer.metadata is not None
        write_metadata(out, writer.metadata, [place for part in parts for place in part.places])
    return ", ".join(wrong)


@pytest.fixture(scope="module")
def saved(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, Any], tuple[list[str], Path]]:
    """Every model through the real Megatron at several layouts: what was wrong, and where it saved."""
    base = tmp_path_factory.mktemp("saved")
    jobs, keys = [], []
    for kind in KINDS:
        converted = base / kind.replace(" ", "_")
        hf_to_megatron(models[kind], converted)
        for tp, pp, dp in LAYOUTS:
            out = base / f"{kind.replace(' ', '_')}_{tp}_{pp}"
            also = EXPERTS if "mixture" in kind and tp > 1 else {}
            jobs.append(Job(tp=tp, pp=pp, dp=dp, args=(models[kind], converted, out), also=also))
            keys.append((kind, (tp, pp, dp), out))
    results = run_layouts(_through_megatron, jobs, timeout=500)
    return {(kind, at): (wrong, out) for (kind, at, out), wrong in zip(keys, results, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_megatron_loads_and_saves_the_same_tensors(
    models: dict[str, Path], saved: Any, tmp_path: Path, kind: str, layout: Any
) -> None:
    wrong, out = saved[kind, layout]
    assert wrong == [""] * len(wrong), "tensors that the ranks did not load"
    source = open_source(out, model_path=models[kind])
    tensors = {
        name: value
        for layout_ in HFFolder(models[kind]).layouts
        for name, value in load_file(models[kind] / layout_.name).items()
    }
    assert source.names() == sorted(tensors)
    for name, value in tensors.items():
        assert torch.equal(read_whole(source, name), value.float()), name
    megatron_to_hf(out, tmp_path / "back", model_path=models[kind], dtype=next(iter(tensors.values())).dtype)
    assert _files(tmp_path / "back") == _files(models[kind])


@pytest.mark.parametrize("kind", ["vision tied", "vision mixture"])
def test_ranges_of_a_tensor_are_what_the_whole_has_there(
    models: dict[str, Path], saved: Any, kind: str
) -> None:
    _, out = saved[kind, (2, 2, 1)]
    source = open_source(out, model_path=models[kind])
    generator = torch.Generator().manual_seed(1)
    for name in source.names():
        whole = read_whole(source, name).view(-1)
        for _ in range(4):
            start, stop = sorted(torch.randint(0, len(whole) + 1, (2,), generator=generator).tolist())
            piece = torch.empty(stop - start)
            source.read_into(name, start, piece)
            assert torch.equal(piece, whole[start:stop]), (name, start, stop)


def test_what_does_not_fit_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models["text tied"], broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.extra": torch.ones(1)}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"broken has 1 tensors too many for a Qwen3Fo.* model\.extra"):
        hf_to_megatron(broken, tmp_path / "out")
    gone = {n: t for n, t in tensors.items() if "k_norm" not in n}
    save_file(gone, broken / "model.safetensors")
    with pytest.raises(ValueError, match="broken lacks 4 tensors"):
        hf_to_megatron(broken, tmp_path / "out")
    mixed = {n: t.half() if n.endswith("q_proj.weight") else t for n, t in tensors.items()}
    save_file(mixed, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"have types torch\.float16, torch\.float32"):
        hf_to_megatron(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    (broken / "model.safetensors").write_bytes((models["text tied"] / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="its header says"):
        hf_to_megatron(broken, tmp_path / "out")


def test_experts_that_are_not_transposed_come_back_as_published(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """As transformers 5 saves them."""
    folder = make_vl_model(tmp_path / "saved", mixture=True)
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    publish(folder)
    expected, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    save_file(
        {n: t[:, :-1].contiguous() for n, t in expected.items() if t.ndim == 3}
        | {n: t for n, t in expected.items() if t.ndim != 3},
        folder / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"gate_up_proj and .*down_proj are \[\(4, 127, 64\)"):
        hf_to_megatron(folder, tmp_path / "out")


def test_a_tied_output_embedding_may_be_stored(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    shutil.copytree(models["text tied"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert _files(tmp_path / "back") == _files(folder)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="ties them"):
        hf_to_megatron(folder, tmp_path / "out")


def test_a_damaged_checkpoint_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    hf_to_megatron(models["text tied"], tmp_path / "megatron")
    file = tmp_path / "megatron" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing; give a local folder"):
        megatron_to_hf(tmp_path / "nothing", tmp_path / "out")


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Both directions on 340 MB of weights, the largest tensor 67 MB, in a process that tells its peak."""
    folder = make_model(
        tmp_path / "large", vocab_size=32768, hidden_size=512, intermediate_size=2048, num_hidden_layers=16
    )
    total = (folder / "model.safetensors").stat().st_size
    script = f"""
import resource, sys
from pathlib import Path
from copd_megatron.merge.convert import hf_to_megatron, megatron_to_hf
root = Path({str(tmp_path)!r})
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
hf_to_megatron(root / "large", root / "megatron")
there = peak() - before
megatron_to_hf(root / "megatron", root / "back")
print(there, peak() - before)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    there, both = map(int, done.stdout.split())
    largest = 32768 * 512 * 4
    assert total > 4.5 * largest
    assert there < 1.6 * largest and both < 1.6 * largest, (there, both, largest)
    assert _files(tmp_path / "back") == _files(folder)


def test_the_tools_convert_there_and_back(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert run_tool("convert_hf_to_megatron", models["text untied"], megatron) == 0
    assert f"wrote {megatron}: " in capsys.readouterr().out
    assert run_tool("inspect_checkpoint", megatron, "--files") == 0
    looked = capsys.readouterr().out
    assert "weights bfloat16: " in looked
    assert f"{hash_file(megatron / '__0_0.distcp')}  __0_0.distcp, " in looked
    assert run_tool("convert_megatron_to_hf", megatron, back) == 0
    assert _files(back) == _files(models["text untied"])
    assert run_tool("convert_megatron_to_hf", megatron, back) == 2
    assert "is there already" in capsys.readouterr().err
