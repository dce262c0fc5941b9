"""The tiny Qwen3-VL base: what its demonstrations say, how it is made and cached, how a run reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config import load_config
from copd_megatron.config.schema import MediaConfig
from copd_megatron.data import ShardSet
from copd_megatron.data.processing import MultimodalProcessor
from copd_megatron.rewards import registry
from copd_megatron.tiny import vl_recipe
from copd_megatron.tiny.base import MARKER
from copd_megatron.tiny.demonstrations import running_total
from copd_megatron.tiny.shares import Share
from copd_megatron.tiny.tasks.families import VisualTask, family
from copd_megatron.tiny.vl import (
    build_processor,
    build_visual_model,
    collate,
    examples_loss,
    make_visual_base,
    make_visual_data,
    part_of,
    validation_tasks,
)
from copd_megatron.tiny.vl_demonstrations import (
    VISUAL_WORKINGS,
    batches_of_examples,
    encoded_pools,
    shown,
    shown_digits,
    visual_tasks,
    written_digits,
)
from copd_megatron.tiny.vl_recipe import (
    VL_BASE,
    VisualBase,
    VisualDomain,
    visual_base_digest,
    visual_data_digest,
)
from copd_megatron.tiny.warm_up import reproducible
from tests.support.commands import ROOT, run_script_without

SMALL = dataclasses.replace(
    VL_BASE,
    pool_size=30,
    num_train=24,
    num_validation=12,
    num_threads=1,
    warm_up=dataclasses.replace(VL_BASE.warm_up, num_steps=3, batch_size=9),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vl") / "base"
    assert make_visual_base(out, SMALL, seed=3)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vl_data") / "data"
    assert make_visual_data(out, SMALL)
    return out


def processor_of(folder: Path) -> MultimodalProcessor:
    return MultimodalProcessor.from_folder(folder, load_config(QUICKSTART).media)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder).tokenizer


QUICKSTART = ROOT / "configs" / "three_branch_tiny.yaml"


def test_workings_add_the_digits_that_are_drawn() -> None:
    def of(name: str, **settings: Any) -> VisualTask:
        kind = family(name)
        return kind.make(kind.configure(settings), random.Random(2))

    image, video = of("read_digits", max_digits=4), of("digit_sequence", ask_sum=False)
    total = running_total(" ".join(image.answer))  # without ask_sum the answer is the digits
    assert written_digits(image) == total and total.count("=") == len(image.answer) - 1
    assert shown_digits(video) == running_total(" ".join(video.answer))


@pytest.mark.parametrize("domain", VL_BASE.visual, ids=lambda domain: domain.name)
def test_workings_end_in_the_gold_answer_and_fit_the_quickstart(domain: VisualDomain) -> None:
    config = load_config(QUICKSTART)
    longest = config.branches[domain.name].rollout.max_new_tokens
    kind, rng = family(domain.family), random.Random(5)
    settings = kind.configure(domain.settings)
    for _ in range(200):
        task = kind.make(settings, rng)
        worked = VISUAL_WORKINGS[domain.working](task)
        assert worked.rsplit("=", 1)[-1] == task.answer
        verify = registry.get(task.verifier).verify
        assert verify(f"<think>{worked}</think>{task.answer}", task.answer, task.metadata) == 1.0
        # <think>, </think> and the end of turn are one token each, everything else one a byte.
        assert len(worked) + len(task.answer) + 3 <= longest


def test_validation_tasks_do_not_depend_on_the_training_shards_and_are_held_out(data: Path) -> None:
    prompts, visual = validation_tasks(SMALL)
    shards = ShardSet.open([f"{data}/*-validation-*.tar"])
    assert len(shards) == 3 * SMALL.num_validation == len(prompts) + len(visual)
    for ref in shards.refs:
        sample = shards.read(ref)
        assert isinstance(sample.prompt, str)
        media = {name: shards.read_member(ref, name) for name in sample.media}
        assert shown(sample.prompt, media) in visual if media else sample.prompt in prompts
    domain = SMALL.visual[0]
    drawn = [shown(task.question, media) for task, media in visual_tasks(domain, 8, seed=2)]
    kept = [
        shown(task.question, media)
        for task, media in visual_tasks(domain, 8, seed=2, held_out=set(drawn[:3]))
    ]
    assert kept[:5] == drawn[3:] and not set(drawn[:3]) & set(kept)


def test_batches_hold_all_domains_and_fit_the_model() -> None:
    processor = MultimodalProcessor(build_processor(SMALL), MediaConfig(frame_rate=1000.0))
    with reproducible(1, 1):
        model = build_visual_model(SMALL, processor._processor)
        assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
        pools = encoded_pools(SMALL, processor, seed=1)
        batch = next(batches_of_examples(SMALL, processor, seed=1, pools=pools))
        assert tuple(batch) == SMALL.names and all(batch.values())
        assert sum(map(len, batch.values())) == SMALL.warm_up.batch_size
        by_hand, count = 0.0, 0
        for examples in batch.values():
            for example in examples:  # alone, hence without padding
                inputs, labels = collate([example], processor)
                with torch.no_grad():
                    logprobs = model(**inputs).logits.log_softmax(-1)
                for position in range(len(example.prompt_ids), labels.shape[1]):
                    by_hand -= float(logprobs[0, position - 1, labels[0, position]])
                    count += 1
        with torch.no_grad():
            whole = examples_loss(model, part_of(batch, slice(None)), processor).item()
            assert whole == pytest.approx(by_hand / count, rel=1e-4)
            halves = [examples_loss(model, part_of(batch, Share(n, 2).rows), processor) for n in range(2)]
            assert float(sum(halves)) == pytest.approx(whole, rel=1e-5)


def test_the_folder_is_a_qwen3_vl_that_the_run_reads(base: Path, data: Path) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(base)
    config: Any = model.config
    assert config.text_config.head_dim == 32 and config.text_config.num_attention_heads == 4
    # The first of two pipeline stages holds all layers that deepstack feeds.
    assert len(config.vision_config.deepstack_visual_indexes) <= config.text_config.num_hidden_layers // 2
    assert len(tokenizer_of(base)) == config.text_config.vocab_size
    run, processor = load_config(QUICKSTART), processor_of(base)
    shards = ShardSet.open([f"{data}/*-train-*.tar"])
    lengths: dict[str, int] = {}
    for ref in shards.refs:
        sample = shards.read(ref)
        where, kind = ref.id, {(): None, ("0.png",): "image", ("mp4",): "video"}[sample.media]
        items = (
            [processor.decode_and_process(kind, shards.read_member(ref, sample.media[0]), where)]
            if kind
            else []
        )
        if kind == "video":  # two frames a temporal patch: none is left out
            patches, *sides = items[0].grid_thw.tolist()
            assert 3 <= patches <= 5 and sides == [4, 4]
        kinds = [item.kind for item in items]
        ids = processor.encode(processor.parts(sample.prompt, kinds, where), items, where)
        text = str(kind)
        lengths[text] = max(lengths.get(text, 0), len(ids))
    branch = run.branches["video"]
    limit = branch.data.max_prompt_tokens
    assert lengths.keys() == {"None", "image", "video"} and max(lengths.values()) <= limit, lengths
    assert limit + branch.rollout.max_new_tokens <= run.model.max_sequence_tokens


def test_phrases_are_single_tokens_and_round_trip(base: Path) -> None:
    tokenizer = tokenizer_of(base)
    text = "Sum of the digits? Calculate 1 + 2.<0.1 seconds>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < len(text) / 2


def test_the_same_recipe_and_seed_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    make_visual_base(again, SMALL, seed=3)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        assert (again / file).read_bytes() == (base / file).read_bytes(), file
    make_visual_base(
        other, dataclasses.replace(SMALL, warm_up=dataclasses.replace(SMALL.warm_up, num_steps=1))
    )
    assert (other / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_a_finished_folder_is_kept_and_a_stale_one_replaced(data: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    assert not make_visual_data(data, SMALL)
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == before
    (data / MARKER).write_text(json.dumps({"digest": "of another recipe"}))
    assert make_visual_data(data, SMALL)
    assert json.loads((data / MARKER).read_text())["digest"] == visual_data_digest(SMALL)


def test_the_digest_follows_what_matters() -> None:
    def changed(**values: object) -> VisualBase:
        return dataclasses.replace(SMALL, **values)  # type: ignore[arg-type]

    variants = [
        visual_base_digest(SMALL, 1),
        visual_base_digest(SMALL, 2),
        visual_base_digest(changed(pool_size=31), 1),
        visual_base_digest(changed(visual=SMALL.visual[::-1]), 1),
        visual_base_digest(changed(vision=dataclasses.replace(SMALL.vision, depth=4)), 1),
    ]
    assert len(set(variants)) == len(variants)
    assert visual_data_digest(SMALL) == visual_data_digest(changed(pool_size=31))
    assert visual_data_digest(SMALL) != visual_data_digest(changed(num_train=25))


def test_a_finished_folder_is_found_without_torch(base: Path, tmp_path: Path) -> None:
    """As the quickstart does when it is started again, within a second on an idle machine."""
    (tmp_path / "base").mkdir()
    digest = visual_base_digest(VL_BASE, 1)
    (tmp_path / "base" / MARKER).write_text(json.dumps({"digest": digest}))
    (tmp_path / "base_data").mkdir()
    (tmp_path / "base_data" / MARKER).write_text(json.dumps({"digest": visual_data_digest(VL_BASE)}))
    absent = ("torch", "transformers", "reasoning_gym", "av")
    result = run_script_without(absent, "make_tiny_base.py", "--kind", "vl", "--out", tmp_path / "base")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("there already") == 2
    assert "text, image, video" in result.stdout


def test_the_quickstart_refuses_an_unknown_option_before_it_sets_anything_up() -> None:
    result = subprocess.run(
        [ROOT / "launchers" / "quickstart.sh", "--txet"],
        capture_output=True,
        text=True,
        env=os.environ | {"COPD_PYTHON": "/nonexistent/python"},
    )
    assert result.returncode == 2
    assert "unknown option --txet. Use --text" in result.stderr


def test_a_change_of_the_code_that_draws_tasks_makes_new_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = vl_recipe.task_sources()
    assert {"image.py", "video.py", "text.py", "encode.py"} <= set(sources)
    before = vl_recipe.visual_data_digest(VL_BASE)
    monkeypatch.setattr(vl_recipe, "task_sources", lambda: sources | {"image.py": "changed"})
    assert vl_recipe.visual_data_digest(VL_BASE) != before


def test_every_shown_digit_has_a_temporal_patch_of_its_own(base: Path) -> None:
    """A digit and the empty frame after it: the model need not tell two digits in one patch apart."""
    processor = processor_of(base)
    for task, media in visual_tasks(SMALL.visual[1], 5, seed=9):
        item = processor.decode_and_process("video", media["mp4"], "test")
        patches, height, width = item.grid_thw.tolist()
        assert patches == shown_digits(task).count("=") + 1
        # Black is -1, white +1. Each patch: [channel, 2 frames, y, x].
        pixels = np.asarray(item.pixel_values).reshape(patches, height * width, 3, 2, -1)
        assert (pixels[:, :, :, 0].min(axis=(1, 2, 3)) < 0).all() and (pixels[:, :, :, 1] > 0.9).all()
