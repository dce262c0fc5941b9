"""The parts of ``tools/gpu_check.py``: each runs in a process of its own and returns its figures.

Sequences, weights and media are random and seeded. On CPU everything is tiny and in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from copd_megatron.config.hardware import missing_for
from copd_megatron.config.model_shape import ModelShape, read_model_shape
from copd_megatron.config.schema import (
    FP8Recipe,
    LossConfig,
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainingConfig,
    WeightSyncConfig,
)
from copd_megatron.records import FloatArray, IntArray, Prompt, TrainRow

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PACK_TOKENS = 8192
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "GH200": 989.5e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16, by a part of the device's name."""

# ---- models of real shapes, with random weights ----------------------------------------------------------

TEXT: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "rope_theta": 1e5,
    },
    "text-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6,
    },
    "text-4b": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6,
    },
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "tiny-vl": {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
        "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    },
    "vl-4b": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip
_VISION_TEXT = {"tiny-vl": ("tiny", [8, 4, 4]), "vl-4b": ("text-4b", [24, 20, 20])}
IMAGE, VIDEO, VISION_START, VISION_END = 300, 301, 302, 303


def make_folder(work: Path, shape: str, *, scale: float = 0.02) -> Path:
    """A Hugging Face folder of that shape, made once; ``scale`` is the matrices' standard deviation."""
    from safetensors.torch import save_file

    from copd_megatron.policy.hf_layout import slots
    from copd_megatron.tiny.tokenizer import build_tokenizer
    from copd_megatron.weight_sync.export import shard_name, write_index

    folder = work / f"{shape}-{scale:g}"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_hf_config(shape), indent=2))
    build_tokenizer(320).save_pretrained(folder)
    save_file({"placeholder": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    table = slots(read_model_shape(folder), 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str, size: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(size, generator=generator, device=device)
        if len(size) == 1:
            norm = name.endswith("norm.weight") or (".norm" in name and name.endswith("weight"))
            return (1 + 0.1 * noise if norm else 0.1 * noise).to(dtype).cpu()
        return (scale * noise).to(dtype).cpu()

    groups: list[list[Any]] = [[]]
    held = 0
    for slot in table:
        size = math.prod(slot.shape) * dtype.itemsize
        if held and held + size > 2 * GIB:
            groups.append([])
            held = 0
        groups[-1].append(slot)
        held += size
    where: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        tensors = {slot.name: tensor(slot.name, slot.shape) for slot in group}
        file = shard_name(number, len(groups))
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(groups) > 1:
        (folder / "model.safetensors").unlink()
    write_index(folder, where, total)
    (folder / "done").touch()
    return folder


def _hf_config(shape: str) -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3VLConfig

    if shape in TEXT:
        config = Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            tie_word_embeddings=True,
            max_position_embeddings=40960,
            **TEXT[shape],
        )
        return dict(config.to_dict())
    base, section = _VISION_TEXT[shape]
    text = {**TEXT[base]}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": section}
    visual = Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True, "pad_token_id": 0},
        vision_config={"spatial_merge_size": 2, "temporal_patch_size": 2, **VISION[shape]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    return dict(visual.to_dict())


# ---- sequences -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A random prompt and response, with the media of one image or none."""

    token_ids: IntArray
    prompt_length: int
    pixel_values: FloatArray | None = None
    image_grid_thw: IntArray | None = None
    pixel_values_videos: FloatArray | None = None
    video_grid_thw: IntArray | None = None


def make_sequences(
    dims: ModelShape, lengths: Sequence[int], *, seed: int, grid: tuple[int, int] = (4, 6)
) -> list[Sample]:
    """Sequences of these lengths; for a vision-language model every second one has an image of ``grid``
    patches."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        tokens = rng.integers(0, 290, size=length).astype(np.int32)
        prompt = max(1, length // 4)
        media: dict[str, Any] = {}
        if dims.vision is not None and number % 2:
            merge = dims.vision.spatial_merge_size
            count = grid[0] * grid[1] // merge**2
            prompt = count + 3
            assert length > prompt + 1, "the image leaves no room"
            tokens[1] = VISION_START
            tokens[2 : 2 + count] = IMAGE
            tokens[2 + count] = VISION_END
            width = dims.vision.in_channels * dims.vision.temporal_patch_size * dims.vision.patch_size**2
            media["pixel_values"] = rng.normal(size=(grid[0] * grid[1], width)).astype(np.float32)
            media["image_grid_thw"] = np.array([(1, *grid)], np.int32)
        made.append(Sample(token_ids=tokens, prompt_length=prompt, **media))
    return made


def train_rows(sequences: Sequence[Sample]) -> list[TrainRow]:
    """Their policy-gradient rows, with random advantages."""
    rng = np.random.default_rng(0)
    rows = []
    for sequence in sequences:
        length = len(sequence.token_ids) - sequence.prompt_length
        rows.append(
            TrainRow(
                token_ids=sequence.token_ids,
                prompt_length=sequence.prompt_length,
                advantages=rng.normal(size=length).astype(np.float32),
                loss_mask=np.ones(length, np.float32),
                component="native",
            )
        )
    return rows


# ---- engines ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A world of one process, and Megatron's state taken down at its end."""
    from megatron.core import parallel_state

    from copd_megatron.topology.single import single_process

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29507")
    with single_process():
        try:
            yield
        finally:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()


def compute_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def make_actor(
    folder: Path,
    sequences: Sequence[Sample] = (),
    *,
    recipe: FP8Recipe = FP8Recipe.none,
    packed: bool = True,
    trains: bool = False,
    memory: MemoryConfig | None = None,
    budget: int = PACK_TOKENS,
) -> Any:
    """A one-rank actor; a process may have one after the other."""
    from megatron.core import parallel_state

    from copd_megatron.policy.actor import MegatronActor

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    media = {s.token_ids.tobytes(): s if s.pixel_values is not None else None for s in sequences}
    return MegatronActor(
        model_path=folder,
        parallel=ParallelConfig(),
        training=TrainingConfig(micro_batch_tokens=budget, sequence_packing=packed, max_weight_lag=10**6),
        optimizer=OptimizerConfig(lr=1e-6) if trains else None,
        dtype=compute_dtype(),
        max_tokens=PACK_TOKENS,
        temperature=1.0,
        seed=1,
        total_steps=1000,
        precision=PrecisionConfig(fp8=recipe),
        memory=memory,
        features=lambda row: media[row.token_ids.tobytes()],
    )


def make_engine(folder: Path, **settings: Any) -> Any:
    """The in-process vLLM engine of a one-rank branch."""
    from copd_megatron.rollout.engine import RolloutEngine

    max_tokens = settings.pop("max_tokens", 2048)
    can_sleep = settings.pop("can_sleep", False)
    return RolloutEngine(
        model_path=folder,
        config=RolloutConfig(**settings),
        branch="check",
        run_id="gpu_check",
        dtype=compute_dtype(),
        max_tokens=max_tokens,
        seed=1,
        can_sleep=can_sleep,
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(action: Callable[[], Any], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        _synchronize()
        begin = time.perf_counter()
        action()
        _synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


# ---- correctness -----------------------------------------------------------------------------------------


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Where this ran."""
    from copd_megatron.doctor import report

    found = report()
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "findings": {f.name: f"{f.status.value}: {f.found}" for f in found.findings},
        **{f.name: f.found for f in found.findings if f.name in ("torch", "Transformer Engine", "vLLM")},
    }


def scores(options: argparse.Namespace) -> dict[str, Any]:
    """The actor's log-probabilities against transformers' in float32."""
    from copd_megatron.policy.megatron_settings import this_machine

    recipe = FP8Recipe(options.recipes[0])
    if reason := missing_for(recipe, this_machine()):
        return {"skipped": reason}
    with one_rank():
        return scores_with(recipe, options.work)


def scores_with(recipe: FP8Recipe, work: Path) -> dict[str, Any]:
    """Largest and mean difference over the response tokens of a few sequences."""
    on_cuda = torch.cuda.is_available()
    folder = make_folder(work, "text-0.6b" if on_cuda else "tiny")
    lengths = [700, 300, 1200, 64] if on_cuda else [40, 17, 25, 5]
    sequences = make_sequences(read_model_shape(folder), lengths, seed=3)
    expected = _reference_logprobs(folder, sequences)
    ours = make_actor(folder, sequences, recipe=recipe).log_probs(sequences)
    errors = np.concatenate([np.abs(s.logprobs - e) for s, e in zip(ours, expected, strict=True)])
    gaps = np.concatenate([s.logprobs - e for s, e in zip(ours, expected, strict=True)])
    return {
        "max_logprob_error": float(errors.max()),
        "mean_logprob_error": float(errors.mean()),
        "kl_error": float((np.expm1(gaps) - gaps).mean()),
        "num_tokens": len(errors),
    }


@torch.no_grad()
def _reference_logprobs(folder: Path, sequences: Sequence[Sample]) -> list[FloatArray]:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    found = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).to(device)[None]
        logits = model(input_ids=ids).logits[0, sequence.prompt_length - 1 : -1].float()
        picked = logits.log_softmax(-1).gather(1, ids[0, sequence.prompt_length :, None]).squeeze(1)
        found.append(picked.cpu().numpy())
    return found


def packing(options: argparse.Namespace) -> dict[str, Any]:
    """Packed against padded, text and vision-language."""
    on_cuda = torch.cuda.is_available()
    figures: dict[str, Any] = {}
    with one_rank():
        for kind, shape in (("text", "text-0.6b" if on_cuda else "tiny"), ("vl", "tiny-vl")):
            folder = make_folder(options.work, shape, scale=0.02 if kind == "text" else 0.06)
            lengths = [600, 90, 250, 400, 31, 700] if on_cuda and kind == "text" else [40, 17, 25, 31, 5, 40]
            sequences = make_sequences(read_model_shape(folder), lengths, seed=4)
            outcomes = []
            for packed in (True, False):
                actor = make_actor(folder, sequences, packed=packed, trains=True, budget=2048)
                logprobs = np.concatenate([s.logprobs for s in actor.log_probs(sequences)])
                loss = actor.forward_backward(train_rows(sequences), LossConfig(), max_new_tokens=1024).loss
                outcomes.append((logprobs, loss, actor.optimizer_step()["grad_norm"]))
                del actor
            (one, loss, norm), (other, other_loss, other_norm) = outcomes
            figures[f"{kind}_max_logprob_difference"] = float(np.abs(one - other).max())
            figures[f"{kind}_loss_difference"] = abs(loss - other_loss)
            figures[f"{kind}_grad_norm_relative_difference"] = abs(norm / other_norm - 1)
    return figures


def sync(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM against the actor after a sync of live weights; its time beside a copy of as many bytes."""
    from copd_megatron.weight_sync.sync import WeightSync

    on_cuda = torch.cuda.is_available()
    folder = make_folder(options.work, "text-4b" if on_cuda else "tiny")
    with one_rank():
        actor = make_actor(folder)
        # nearly all of the device's memory is the engine's to profile
        engine = make_engine(folder, gpu_memory_utilization=0.5, max_new_tokens=128 if on_cuda else 16)
        sync_now = WeightSync(actor, engine, WeightSyncConfig())
        sync_now()
        with torch.no_grad():  # other weights than the folder's
            for parameter in actor.model.parameters():
                parameter.mul_(1.05)
        reports = [sync_now() for _ in range(5)]
        seconds = statistics.median(report.seconds for report in reports)
        num_bytes = reports[-1].loaded_bytes
        source = torch.empty(num_bytes, dtype=torch.uint8, device=actor.device)
        target = torch.empty_like(source)
        copy_seconds = _timed(partial(target.copy_, source), 5)
        del source, target
        difference = _engine_difference(actor, engine, num_prompts=16 if on_cuda else 4)
    return {
        "seconds": seconds,
        "gb": num_bytes / 1e9,
        "gb_per_second": num_bytes / 1e9 / seconds,
        "copy_gb_per_second": num_bytes / 1e9 / copy_seconds,
        "share_of_copy_rate": copy_seconds / seconds,
        **difference,
    }


def _engine_difference(actor: Any, engine: Any, *, num_prompts: int) -> dict[str, Any]:
    from copd_megatron.rollout.engine import SamplingSettings

    prompts = _prompts(num_prompts, 32)
    rollouts = engine.sample(prompts, SamplingSettings(num_generations=2, temperature=1.0), step=0)
    found = actor.log_probs(rollouts)
    gaps = np.concatenate([s.logprobs - r.rollout_logprobs for s, r in zip(found, rollouts, strict=True)])
    return {
        "gen_kl_error": float((np.expm1(gaps) - gaps).mean()),
        "max_gen_logprob_error": float(np.abs(gaps).max()),
        "num_sampled_tokens": len(gaps),
    }


def _prompts(count: int, length: int) -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [
        Prompt(
            prompt_id=str(i),
            domain="check",
            token_ids=rng.integers(0, 250, size=length).astype(np.int32),
            answer="",
            verifier="exact",
        )
        for i in range(count)
    ]


def cycle(options: argparse.Namespace) -> dict[str, Any]:
    """One CoPD cycle of two branches, a process each, from a briefly warmed-up tiny base to the merge."""
    base, data, run = options.work / "base", options.work / "base_data", options.work / "cycle"
    shutil.rmtree(run, ignore_errors=True)
    make = [sys.executable, "tools/make_tiny_base.py", "--out", str(base), "--data", str(data)]
    subprocess.run([*make, "--steps", "300"], cwd=ROOT, check=True)
    arguments = [
        "train",
        "configs/two_branch_tiny.yaml",
        f"run.dir={run}",
        f"run.device={options.device}",
        f"model.path={base}",
        "branch_defaults.parallel.tensor_model_parallel_size=1",
        "branch_defaults.rollout.gpu_memory_utilization=0.2",
        "schedule.cycles=1",
        "schedule.rlvr_steps=3",
        "schedule.opd_steps=2",
        "branch_defaults.num_prompts_per_step=16",
        "opd.num_prompts_per_step=8",
        "evaluation.max_prompts=32",
    ]
    for name in ("addition", "running_sums"):
        arguments += [
            f"branches.{name}.data.{part}=[{data}/{name}-{part}-*.tar]" for part in ("train", "validation")
        ]
    code = "import sys; from copd_megatron.cli import main; sys.exit(main())"
    # both on the one GPU: each branch is a world of its own, and the router speaks over Gloo
    launcher = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    begin = time.perf_counter()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            env=os.environ | launcher | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        statuses = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(statuses):
        raise RuntimeError(f"copd train ended with {statuses}")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "addition/train/loss" in step]

    def worst(name: str) -> float:
        return max(step[f"{branch}/{name}"] for step in steps for branch in ("addition", "running_sums"))

    teaching = [
        step["addition/timing/teaching_seconds"]
        for step in steps
        if "addition/timing/teaching_seconds" in step
    ]
    whole = [
        step["addition/timing/step_seconds"] for step in steps if "addition/timing/teaching_seconds" in step
    ]
    return {
        "num_steps": len(steps),
        "seconds": time.perf_counter() - begin,
        "gen_kl_error": worst("train/gen_kl_error"),
        "merged_exported": (run / "export" / "merged" / "model.safetensors").exists(),
        "scoring_share_of_step": sum(teaching) / sum(whole) if whole else math.nan,
        "memory": {
            key: max(step[key] for step in steps if key in step)
            for step in steps[-1:]
            for key in step
            if "/perf/memory_" in key
        },
    }


# ---- speed -----------------------------------------------------------------------------------------------


def model_flops(dims: ModelShape, sequences: Sequence[Sample]) -> float:
    """Multiplications and additions of one training step: forward once, backward twice; matrices, causal
    attention, the output layer on response tokens, the vision tower on its patches."""
    query = dims.num_attention_heads * dims.head_dim
    total = 0.0
    for sequence in sequences:
        length = len(sequence.token_ids)
        total += dims.num_layers * (2 * dims.active_layer_parameters * length + 2 * query * length**2)
        total += 2 * dims.embedding_parameters * (length - sequence.prompt_length)
        if dims.vision is not None and sequence.pixel_values is not None:
            patches, vision = len(sequence.pixel_values), dims.vision
            total += 2 * vision.num_parameters * patches + 4 * vision.depth * vision.hidden_size * patches**2
    return 3 * total


def training(options: argparse.Namespace) -> dict[str, Any]:
    """An update of four packs of 8k tokens: gradient and optimizer step."""
    from copd_megatron.policy.megatron_settings import this_machine

    recipe = FP8Recipe(options.recipes[0])
    if reason := missing_for(recipe, this_machine()):
        return {"skipped": reason}
    (shape,) = options.shape
    on_cuda = torch.cuda.is_available()
    folder = make_folder(options.work, shape)
    dims = read_model_shape(folder)
    # packs of 8,192: one long, the rest as rollouts come
    lengths = [8192, *[4096] * 2, *[2048] * 4, *[1024] * 8] if on_cuda else [256, 128, 128, 64, 64]
    grid = (32, 32) if on_cuda else (4, 6)
    sequences = make_sequences(dims, lengths, seed=5, grid=grid)
    with one_rank():
        actor = make_actor(folder, sequences, recipe=recipe, trains=True)
        rows = train_rows(sequences)

        def step() -> None:
            actor.forward_backward(rows, LossConfig(), max_new_tokens=PACK_TOKENS)
            actor.optimizer_step()
            actor.finish_update()

        for _ in range(3 if on_cuda else 1):
            step()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = _timed(step, 5 if on_cuda else 2)
        forward = _timed(lambda: actor.log_probs(sequences), 3 if on_cuda else 1)
    flops = model_flops(dims, sequences)
    tokens = sum(lengths)
    name = torch.cuda.get_device_name(0) if on_cuda else ""
    peak = next((flop for part, flop in PEAK_FLOPS.items() if part in name), None)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "scored_tokens_per_second": tokens / forward,
        "tflops": flops / seconds / 1e12,
        **({"mfu": flops / seconds / peak} if peak else {}),
        **({"peak_gib": torch.cuda.max_memory_allocated() / GIB} if on_cuda else {}),
    }


def rollout(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second in process and, in a process of its own, of plain offline vLLM."""
    on_cuda = torch.cuda.is_available()
    folder = make_folder(options.work, "text-4b" if on_cuda else "tiny")
    count, new_tokens = (256, 512) if on_cuda else (4, 16)
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(folder), str(count), str(new_tokens)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    # vLLM logs to the same stream
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("{")][-1:]
    plain = json.loads(answer)
    from copd_megatron.rollout.engine import SamplingSettings
    from copd_megatron.weight_sync.sync import WeightSync

    with one_rank():
        actor = make_actor(folder)
        engine = make_engine(
            folder, gpu_memory_utilization=0.6, max_new_tokens=new_tokens, max_num_seqs=256, max_tokens=2048
        )
        WeightSync(actor, engine, WeightSyncConfig())()
        settings = SamplingSettings(num_generations=1, temperature=1.0)
        prompts = _prompts(count, 128)
        rates = []
        for step in range(3):
            begin = time.perf_counter()
            rollouts = engine.sample(prompts, settings, step=step)
            rates.append(sum(r.response_length for r in rollouts) / (time.perf_counter() - begin))
    return {
        "tokens_per_second": max(rates[1:]),
        "plain_tokens_per_second": plain["tokens_per_second"],
        "share_of_plain_vllm": max(rates[1:]) / plain["tokens_per_second"],
    }


_PLAIN = """
import json, sys, time
import torch, vllm
from tools.gpu_parts import _prompts
folder, count, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
on_cuda = torch.cuda.is_available()
more = dict(gpu_memory_utilization=0.6) if on_cuda else dict(kv_cache_memory_bytes=2**28, dtype="float32")
llm = vllm.LLM(folder, max_model_len=2048, max_num_seqs=256, enforce_eager=not on_cuda, seed=0, **more)
prompts = [{"prompt_token_ids": p.token_ids.tolist()} for p in _prompts(count, 128)]
rates = []
for step in range(3):
    parameters = vllm.SamplingParams(temperature=1.0, max_tokens=new_tokens, logprobs=0, seed=step)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    rates.append(tokens / (time.perf_counter() - begin))
print(json.dumps({"tokens_per_second": max(rates[1:])}))
"""


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """What the device holds in each phase, and whether anything is left over from cycle to cycle."""
    from copd_megatron.weight_sync.sync import WeightSync

    on_cuda = torch.cuda.is_available()
    folder = make_folder(options.work, "text-4b" if on_cuda else "tiny")
    dims = read_model_shape(folder)
    sequences = make_sequences(dims, [2048] * 4 if on_cuda else [64] * 4, seed=6)
    rows = train_rows(sequences)

    def used() -> float:
        if not on_cuda:
            return 0.0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB

    with one_rank():
        actor = make_actor(folder, trains=True, memory=MemoryConfig(offload_weights=True))
        actor.forward_backward(rows, LossConfig(), max_new_tokens=PACK_TOKENS)
        actor.optimizer_step()
        training_gib = used()
        actor.give_memory(weights=False)
        offloaded_gib = used()
        engine = make_engine(folder, gpu_memory_utilization=0.5, max_new_tokens=32, can_sleep=True)
        sync_now = WeightSync(actor, engine, WeightSyncConfig())
        after = []
        seconds = []
        for _ in range(options.cycles if on_cuda else 2):
            begin = time.perf_counter()
            sync_now()
            actor.give_memory(weights=True)
            awake = used()
            engine.sleep()
            asleep = used()
            actor.take_memory()
            actor.forward_backward(rows, LossConfig(), max_new_tokens=PACK_TOKENS)
            actor.optimizer_step()
            actor.finish_update()
            actor.give_memory(weights=False)
            after.append(used())
            seconds.append(time.perf_counter() - begin)
    return {
        "training_gib": training_gib,
        "offloaded_gib": offloaded_gib,
        "vllm_awake_gib": awake,
        "vllm_asleep_gib": asleep,
        "growth_gib": after[-1] - after[min(4, len(after) - 1)],
        "cycles": len(after),
        "seconds_per_cycle": statistics.median(seconds),
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "environment": environment,
    "scores": scores,
    "packing": packing,
    "sync": sync,
    "cycle": cycle,
    "training": training,
    "rollout": rollout,
    "memory": memory,
}
