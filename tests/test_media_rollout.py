"""vLLM sees the trainer's own patches and tokens: compared with what its front end makes by itself, and by
log-probability with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from copd_megatron.config import MediaConfig
from copd_megatron.data.decode import VideoFrames
from copd_megatron.data.processing import ItemFeatures, MediaFeatures, MultimodalProcessor
from copd_megatron.rollout.media import engine_settings
from tests.support.distributed import run_distributed
from tests.support.models_vl import make_processor, make_vl_model

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
CASES: dict[str, tuple[str, list[tuple[int, int]], list[tuple[int, int, int, float]]]] = {
    "text": ("just words", [], []),
    "image": ("hi <image> there", [(64, 64)], []),
    "images": ("<image><image>hm", [(64, 64), (50, 90)], []),
    "video": ("<video>what", [], [(7, 64, 64, 4.0)]),
    "mixed": ("a<image>b<video>c<video>", [(70, 64)], [(7, 64, 64, 4.0), (4, 33, 47, 3.0)]),
}
"""Prompt, sizes of images, and frames, height, width, rate of videos."""


def test_sizes_are_told_only_where_they_change() -> None:
    hf = make_processor()
    assert "mm_processor_kwargs" not in engine_settings(MultimodalProcessor(hf, MediaConfig()))
    changed = MultimodalProcessor(hf, MediaConfig(image_max_pixels=4096, video_max_pixels=65536))
    assert engine_settings(changed)["mm_processor_kwargs"] == {
        "size": {"shortest_edge": 1024, "longest_edge": 65536}
    }


def test_engine_inputs_are_vllms_own_and_log_probabilities_agree(tmp_path: Path) -> None:
    folder = make_vl_model(tmp_path / "model")
    (errors,) = run_distributed(
        run_in_vllm, 1, args=(str(folder),), env=ENVIRONMENT, timeout=500, megatron=True
    )
    assert errors.keys() == CASES.keys()
    assert max(errors.values()) < 1e-4, errors


# ---------------------------------------------------------------- the other process, with vLLM


def make_case(processor: MultimodalProcessor, name: str) -> tuple[Any, MediaFeatures | None, dict[str, Any]]:
    """Our expanded ids and features, and the raw prompt as vLLM's front end takes it."""
    text, image_sizes, video_sizes = CASES[name]
    rng = np.random.default_rng(len(name))
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in image_sizes]
    videos = [
        VideoFrames(
            frames=rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8),
            fps=fps,
            frames_indices=tuple(range(0, 2 * n, 2)),
            total_num_frames=2 * n,
        )
        for n, h, w, fps in video_sizes
    ]
    made: dict[str, Any] = {
        "image": iter([processor.process_image(image, name) for image in images]),
        "video": iter([processor.process_video(video, name) for video in videos]),
    }
    messages = processor.parts(text, ["image"] * len(images) + ["video"] * len(videos), name)
    items: list[ItemFeatures] = [
        next(made[part["type"]]) for part in messages[0]["content"] if part["type"] in made
    ]
    raw: dict[str, Any] = {"prompt_token_ids": processor.unexpanded(messages), "multi_modal_data": {}}
    if images:
        raw["multi_modal_data"]["image"] = images
    if videos:
        raw["multi_modal_data"]["video"] = [
            (video.frames, {**video.metadata(), "do_sample_frames": False}) for video in videos
        ]
    if not items:
        del raw["multi_modal_data"]
    features = MediaFeatures(items=tuple(items)) if items else None
    return processor.encode(messages, items, name), features, raw


def compare_inputs(name: str, ours: Any, theirs: Any) -> None:
    import torch

    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"], name
    assert ours["type"] == theirs["type"], name
    if ours["type"] == "token":
        return
    assert ours["mm_placeholders"].keys() == theirs["mm_placeholders"].keys(), name
    for modality, places in ours["mm_placeholders"].items():
        assert list(places) == list(theirs["mm_placeholders"][modality]), name
        for mine, other in zip(ours["mm_kwargs"][modality], theirs["mm_kwargs"][modality], strict=True):
            assert mine.keys() == other.keys(), name
            for key in mine:
                a, b = mine[key].data, other[key].data
                equal = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
                assert equal and mine[key].field == other[key].field, (name, key)


def run_in_vllm(folder: str) -> dict[str, float]:
    """Largest difference of sampled tokens' log-probabilities to transformers', by case."""
    import torch
    import vllm
    from transformers import Qwen3VLForConditionalGeneration
    from vllm.sampling_params import RequestOutputKind

    from copd_megatron.rollout.media import engine_input

    processor = MultimodalProcessor.from_folder(folder, MediaConfig())
    llm = vllm.LLM(
        model=folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        **engine_settings(processor),
    )
    cases = {name: make_case(processor, name) for name in CASES}
    for number, (name, (ids, features, raw)) in enumerate(cases.items()):
        ours = engine_input(ids, features, processor, version=1)
        compare_inputs(name, ours, llm._preprocess_cmpl_one(raw))
        parameters = vllm.SamplingParams(max_tokens=12, seed=number, logprobs=0, ignore_eos=True)
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        llm.llm_engine.add_request(str(number), ours, parameters)
    outputs = llm.wait_for_completion(use_tqdm=False)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    errors = {}
    for (name, (ids, features, _)), output in zip(cases.items(), outputs, strict=True):
        assert output.prompt_token_ids == ids.tolist(), name
        completion = output.outputs[0]
        tokens = torch.tensor([[*ids.tolist(), *completion.token_ids]])
        inputs: dict[str, Any] = {}
        if features is not None:
            kinds = torch.zeros_like(tokens)
            kinds[tokens == processor.image_token_id] = 1
            kinds[tokens == processor.video_token_id] = 2
            inputs["mm_token_type_ids"] = kinds
            for field in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
                value = getattr(features, field)
                if value is not None:
                    inputs[field] = torch.tensor(value, dtype=torch.long if "grid" in field else None)
        with torch.no_grad():
            logprobs = model(input_ids=tokens, **inputs).logits[0].log_softmax(-1)
        expected = logprobs[len(ids) - 1 : -1].gather(1, tokens[0, len(ids) :, None])[:, 0].numpy()
        got = [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        errors[name] = float(np.abs(expected - np.array(got)).max())
    return errors
