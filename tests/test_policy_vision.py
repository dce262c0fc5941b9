"""The Qwen3-VL actor against transformers: log-probabilities and gradients, decoder and vision tower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config.schema import (
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    TrainingConfig,
)
from copd_megatron.objectives.surrogate import ClippedSurrogate
from copd_megatron.policy.batch.positions import multimodal_positions
from copd_megatron.records import FloatArray, IntArray, TrainRow
from tests.support import models_vl
from tests.support.actors import make_actor
from tests.support.layouts import Job, run_layouts
from tests.support.models_vl import TOKEN_IDS, make_vl_model

IMAGE, VIDEO = TOKEN_IDS[models_vl.IMAGE], TOKEN_IDS[models_vl.VIDEO]
START, END = TOKEN_IDS[models_vl.VISION_START], TOKEN_IDS[models_vl.VISION_END]
PATCH_VALUES = 3 * 2 * 8 * 8
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
SEQUENCE = {"sequence_parallel": True}
SPREAD = {"expert_model_parallel_size": 2}
FURTHER: dict[tuple[str, str], dict[str, Any]] = {
    ("untied", "sequence"): {"tp": 2, "also": SEQUENCE},
    ("untied", "context"): {"cp": 2},
    ("mixture", "one"): {},
    ("mixture", "experts over data"): {"dp": 2, "also": SPREAD},
    ("mixture", "experts over tensor"): {"tp": 2, "also": SPREAD | SEQUENCE},
    ("mixture", "experts and pipeline"): {"pp": 2, "dp": 2, "also": SPREAD},
}
RECOMPUTED: dict[tuple[str, str], dict[str, Any]] = {
    ("untied", "recomputed"): {},
    ("untied", "recomputed, sequence"): {"tp": 2, "also": SEQUENCE},
    ("untied", "recomputed, pipeline"): {"pp": 2},
    ("mixture", "recomputed"): {},
}
STEP = 1e4
"""Adam's first update is lr * g / (|g| + eps): with both at 1e4 it is the gradient, to 1e-4 relative."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """Processed media of one row, made up. Rows with the same media are planned together, so media have a
    hash: here that of the object, since arrays have none."""

    pixel_values: FloatArray | None = None
    image_grid_thw: IntArray | None = None
    pixel_values_videos: FloatArray | None = None
    video_grid_thw: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    token_ids: IntArray
    prompt_length: int
    media: Media | None


def make_small_vl_model(folder: Path, *, tied: bool, mixture: bool) -> Path:
    """Half as wide as the other tests' model: every gradient of it is compared."""
    text = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 323}
    experts = {"moe_intermediate_size": 64} if mixture else {}
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    return make_vl_model(folder, tied=tied, mixture=mixture, text=text | experts, **vision)


def make_samples() -> list[Sample]:
    """Text only, one image, several images, a video, a video with an image, and text again; then two further
    responses to the fifth and one to the first, which share their prompts."""
    rng = np.random.default_rng(0)

    def text(count: int) -> list[int]:
        return rng.integers(0, 256, size=count).tolist()

    def patches(count: int) -> FloatArray:
        return rng.normal(size=(count, PATCH_VALUES)).astype(np.float32)

    def sample(images: list[tuple[int, int]], videos: list[tuple[int, int, int]]) -> Sample:
        ids = text(4)
        for height, width in images:
            ids += [START] + [IMAGE] * (height * width // 4) + [END] + text(2)
        for frames, height, width in videos:
            for _ in range(frames):
                ids += [*text(3), START, *[VIDEO] * (height * width // 4), END]
        ids += text(3)
        prompt = len(ids)
        ids += text(int(rng.integers(3, 9)))
        media = Media(
            pixel_values=patches(sum(h * w for h, w in images)) if images else None,
            image_grid_thw=np.array([(1, h, w) for h, w in images], np.int32) if images else None,
            pixel_values_videos=patches(sum(t * h * w for t, h, w in videos)) if videos else None,
            video_grid_thw=np.array(videos, np.int32) if videos else None,
        )
        has_media = bool(images or videos)
        tokens = np.array(ids, np.int32)
        return Sample(token_ids=tokens, prompt_length=prompt, media=media if has_media else None)

    def another(first: Sample, count: int) -> Sample:
        prompt = first.token_ids[: first.prompt_length]
        return replace(first, token_ids=np.concatenate([prompt, np.array(text(count), np.int32)]))

    made = [
        sample([], []),
        sample([(4, 4)], []),
        sample([(4, 6), (2, 4)], []),
        sample([], [(3, 4, 4)]),
        sample([(4, 4)], [(2, 2, 4)]),
        sample([], []),
    ]
    return [*made, another(made[4], 5), another(made[4], 2), another(made[0], 7)]


def _advantages(index: int, sample: Sample) -> FloatArray:
    length = len(sample.token_ids) - sample.prompt_length
    return np.random.default_rng(index).normal(size=length).astype(np.float32)


def _reference_inputs(sample: Sample) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
    inputs = {"input_ids": ids}
    if sample.media is None:
        return inputs
    kinds = torch.zeros_like(ids, dtype=torch.int32)
    kinds[ids == IMAGE], kinds[ids == VIDEO] = 1, 2
    inputs["mm_token_type_ids"] = kinds
    for name, value in vars(sample.media).items():
        if value is not None:
            tensor = torch.from_numpy(value)
            inputs[name] = tensor.long() if name.endswith("thw") else tensor
    return inputs


def _reference(folder: Path, samples: list[Sample]) -> tuple[list[FloatArray], dict[str, FloatArray]]:
    """transformers' log-probabilities, and the gradient of the seq-mean-token-mean policy gradient loss."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    logprobs, loss = [], torch.zeros(())
    for index, sample in enumerate(samples):
        inputs = _reference_inputs(sample)
        full = model(**inputs).logits[0].log_softmax(-1)
        where = torch.arange(sample.prompt_length, len(sample.token_ids))
        picked = full[where - 1, inputs["input_ids"][0, where]]
        logprobs.append(picked.detach().numpy())
        loss = loss - (picked * torch.from_numpy(_advantages(index, sample))).mean() / len(samples)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs, _by_expert(gradients)


def _by_expert(tensors: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What transformers keeps for all experts together, expert by expert."""
    single: dict[str, FloatArray] = {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(".experts"):
            single[name] = value
            continue
        for expert, matrix in enumerate(value):
            if leaf == "down_proj":
                single[f"{stem}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                single |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
    return single


def _exercise(
    parallel: ParallelConfig, folder: Path, samples: list[Sample], freeze: bool, settings: dict[str, Any]
) -> Any:
    """Log-probabilities and this rank's shares of the gradient (weights before minus after one step);
    ``settings`` are further fields of TrainingConfig."""
    media = {sample.token_ids.tobytes(): sample.media for sample in samples}
    actor = make_actor(
        parallel,
        folder,
        training=TrainingConfig(micro_batch_tokens=150, logprob_chunk_tokens=16, **settings),
        optimizer=OptimizerConfig(lr=STEP, adam_eps=STEP, clip_grad=0.0),
        max_tokens=256,
        total_steps=1,
        freeze_vision=freeze,
        features=lambda row: media[row.token_ids.tobytes()],
    )
    scores = actor.log_probs(samples)
    rows = [
        TrainRow(
            token_ids=sample.token_ids,
            prompt_length=sample.prompt_length,
            advantages=_advantages(index, sample),
            loss_mask=np.ones(len(sample.token_ids) - sample.prompt_length, np.float32),
            component="native",
        )
        for index, sample in enumerate(samples)
    ]
    before = {slot: actor.view.read(slot).clone() for slot in actor.view.local}
    actor.forward_backward(rows, ClippedSurrogate(LossConfig(), 64))
    actor.optimizer_step()
    gradients = {}
    for slot, old in before.items():
        if slot.copy_of_embedding:
            continue
        start, stop = slot.range_of(actor.tp_rank, actor.view.tp_size) if slot.dim is not None else (0, 0)
        gradients[slot.name] = (slot.dim, start, stop, (old - actor.view.read(slot)).numpy())
    text_only = actor.log_probs([sample for sample in samples if sample.media is None])
    if actor.pp_rank == 0:
        rotary = actor.chunks[0].visual.rotary_pos_emb
        before, _ = rotary.inv_freq.clone(), actor.modules[0].bfloat16()
        assert rotary.inv_freq.dtype is torch.float32 and torch.equal(rotary.inv_freq, before)
        assert actor.chunks[0].visual.patch_embed.proj.weight.dtype is torch.bfloat16
    return [s.logprobs for s in scores], gradients, len(text_only)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = {
        kind: make_small_vl_model(
            tmp_path_factory.mktemp(kind), tied=kind == "tied", mixture=kind == "mixture"
        )
        for kind in ("tied", "untied", "mixture")
    }
    samples = make_samples()
    jobs: list[Job] = []
    names: list[tuple[Any, ...]] = []
    for tp, pp, dp in LAYOUTS:
        kind = "tied" if tp == pp else "untied"
        jobs.append(Job(tp=tp, pp=pp, dp=dp, args=(folders[kind], samples, False, {})))
        names.append((kind, tp, pp, dp))
    again = {"recompute": Recompute.full}
    for further, settings in ((FURTHER, {}), (RECOMPUTED, again)):
        for (kind, name), sizes in further.items():
            jobs.append(Job(**sizes, args=(folders[kind], samples, False, settings)))
            names.append((kind, name))
    jobs.append(Job(args=(folders["tied"], samples, False, {"sequence_packing": False})))
    jobs.append(Job(args=(folders["tied"], samples, True, again)))
    results = run_layouts(_exercise, jobs)
    references = {kind: _reference(folder, samples) for kind, folder in folders.items()}
    return {
        "layouts": dict(zip(names, results[:-2], strict=True)),
        "padded": results[-2],
        "frozen": results[-1],
        "references": references,
    }


def test_logprobs_equal_transformers_at_every_layout(outcomes: dict[str, Any]) -> None:
    for (kind, *layout), ranks in outcomes["layouts"].items():
        expected, _ = outcomes["references"][kind]
        for logprobs, _, _ in ranks:
            for number, (ours, theirs) in enumerate(zip(logprobs, expected, strict=True)):
                np.testing.assert_allclose(
                    ours, theirs, atol=1e-4, err_msg=f"{kind} {layout} sample {number}"
                )


def test_gradients_of_decoder_and_vision_equal_transformers(outcomes: dict[str, Any]) -> None:
    for (kind, *layout), ranks in outcomes["layouts"].items():
        _, expected = outcomes["references"][kind]
        seen = set()
        for _, gradients, _ in ranks:
            for name, (dim, start, stop, ours) in gradients.items():
                theirs = expected[name]
                if dim is not None:
                    theirs = np.take(theirs, range(start, stop), axis=dim)
                np.testing.assert_allclose(
                    ours, theirs, atol=1e-4, rtol=1e-3, err_msg=f"{kind} {layout} {name}"
                )
                seen.add(name)
        assert seen == set(expected), f"{kind} {layout}: every tensor has its gradient"
        assert any("visual" in name and np.abs(expected[name]).max() > 1e-2 for name in seen)


def test_packed_equals_padded(outcomes: dict[str, Any]) -> None:
    """Text, images and videos in one pack: positions, vision features and deepstack included."""
    ((packed, gradients, _),) = outcomes["layouts"]["tied", 1, 1, 1]
    ((padded, other_gradients, _),) = outcomes["padded"]
    for mine, other in zip(packed, padded, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    norm, other_norm = (
        np.sqrt(sum(float((values.astype(np.float64) ** 2).sum()) for *_, values in every.values()))
        for every in (gradients, other_gradients)
    )
    assert norm == pytest.approx(other_norm, rel=1e-5)
    assert set(gradients) == set(other_gradients)


def test_frozen_vision_does_not_move_and_the_decoder_does(outcomes: dict[str, Any]) -> None:
    ((_, gradients, _),) = outcomes["frozen"]
    moved = {name for name, (*_, change) in gradients.items() if np.abs(change).max() > 0}
    assert moved and not any("visual" in name for name in moved)


def test_text_only_batches_skip_the_tower(outcomes: dict[str, Any]) -> None:
    assert all(count == 3 for ranks in outcomes["layouts"].values() for _, _, count in ranks)


def test_positions_follow_the_grids() -> None:
    ids = np.array([5, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 6], np.int32)
    positions = multimodal_positions(
        ids,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_thw=np.array([[1, 4, 4]], np.int32),
        video_grid_thw=np.zeros((0, 3), np.int32),
        spatial_merge_size=2,
    )
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 5],
        [0, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 2, 3, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize("grid", [[[1, 4, 6]], [[1, 4, 4], [1, 2, 2]], []])
def test_grids_that_do_not_match_the_placeholders_are_refused(grid: list[list[int]]) -> None:
    ids = np.array([5, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 6], np.int32)
    with pytest.raises(ValueError, match="placeholder"):
        multimodal_positions(
            ids,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_thw=np.array(grid, np.int32).reshape(-1, 3),
            video_grid_thw=np.zeros((0, 3), np.int32),
            spatial_merge_size=2,
        )
