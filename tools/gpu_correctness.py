"""The correctness parts of ``tools/gpu_check.py``: scores, packing, agreement after a sync, one cycle."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_material import (
    ROOT,
    Media,
    Sample,
    make_actor,
    make_engine,
    make_folder,
    make_prompts,
    make_sequences,
    media_of,
    one_rank,
    random_weights,
    train_rows,
)
from gpu_measure import GIB, Figures, difference, profile_summary, release, timed

from copd_megatron.config.hardware import missing_for
from copd_megatron.config.schema import FP8Recipe, LossConfig, RolloutQuantization, WeightSyncConfig
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.objectives.surrogate import ClippedSurrogate
from copd_megatron.records import FloatArray


def environment(options: argparse.Namespace, figures: Figures) -> None:
    """Where this ran, and how fast its memory and its link to the host are."""
    from copd_megatron.launch.doctor import report

    found = report()
    on_cuda = torch.cuda.is_available()
    figures.add(
        date=time.strftime("%Y-%m-%d"),
        processor=torch.cuda.get_device_name(0) if on_cuda else platform.processor() or "CPU",
        findings={f.name: f"{f.status.value}: {f.found}" for f in found.findings},
        **{f.name: f.found for f in found.findings if f.name in ("torch", "Transformer Engine", "vLLM")},
        host_memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        shared_memory_gib=shutil.disk_usage("/dev/shm").total / GIB,
    )
    if not on_cuda:
        return
    here = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    there, host = torch.empty_like(here), torch.empty(2 * GIB, dtype=torch.uint8, pin_memory=True)
    for name, action in (
        ("device_copy_gb_per_second", partial(there.copy_, here)),
        ("to_host_gb_per_second", partial(host.copy_, here, non_blocking=True)),
        ("from_host_gb_per_second", partial(here.copy_, host, non_blocking=True)),
    ):
        action()
        figures.add(**{name: 2 * GIB / 1e9 / timed(action, 3)})
    figures.add(cudnn=torch.backends.cudnn.version(), memory_gib=torch.cuda.mem_get_info()[1] / GIB)


# ---- scores ----------------------------------------------------------------------------------------------


_SCORE_SHAPES = {
    "text": ("text-0.6b", "tiny"),
    "vl": ("vl-small", "tiny-vl"),
    "moe": ("moe-small", "tiny-moe"),
}
"""On a GPU, on CPU."""


def scores(options: argparse.Namespace, figures: Figures) -> None:
    """The actor's log-probabilities against transformers' in float32."""
    from copd_megatron.policy.megatron.settings import this_machine

    recipe = FP8Recipe(options.recipes[0])
    if reason := missing_for(recipe, this_machine()):
        figures.add(skipped=reason)
        return
    figures.add(**scores_with(recipe, options.work, kind=options.kind))


def scores_with(recipe: FP8Recipe, work: Path, *, kind: str = "text") -> dict[str, Any]:
    """Differences over the response tokens of a few sequences; with those of transformers in bfloat16, which
    say what that type costs.

    The delayed recipe has no scales until gradients have been computed, so it is measured after that;
    ``cold``: before, as an actor scores that has not been trained, or never is.
    """
    on_cuda = torch.cuda.is_available()
    folder = make_folder(work, _SCORE_SHAPES[kind][0 if on_cuda else 1], weights=True)
    media = media_of(folder)
    lengths = [700, 300, 1200, 430] if on_cuda else [40, 17, 25, 29]
    sequences = make_sequences(
        read_model_shape(folder), lengths, seed=3, media=media, patches=(20, 28) if on_cuda else (4, 6)
    )
    expected = reference_logprobs(folder, sequences, media, torch.float32)
    found: dict[str, Any] = {"reference_std": float(np.concatenate(expected).std())}
    delayed = recipe is FP8Recipe.delayed
    with one_rank():
        actor = make_actor(folder, media=media, recipe=recipe, trains=delayed)
        ours = difference([s.logprobs for s in actor.log_probs(sequences)], expected)
        if delayed:
            found |= {f"cold_{key}": value for key, value in ours.items()}
            for _ in range(3):
                actor.forward_backward(train_rows(sequences), ClippedSurrogate(LossConfig(), 1024))
            ours = difference([s.logprobs for s in actor.log_probs(sequences)], expected)
    if on_cuda:
        half = reference_logprobs(folder, sequences, media, torch.bfloat16)
        found |= {f"transformers_bfloat16_{key}": v for key, v in difference(half, expected).items()}
        found["attention"] = _attention_backend()
    return ours | found


def _attention_backend() -> str:
    """Which attention Transformer Engine chose last in this process; it has no public way to say so."""
    try:
        from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention
    except ImportError:
        return "not known"
    chosen: dict[str, Any] = getattr(dot_product_attention, "_attention_backends", {})
    used = [name.removeprefix("use_") for name, value in chosen.items() if name.startswith("use_") and value]
    return ", ".join(used) or "not known"


@torch.no_grad()
def reference_logprobs(
    folder: Path, sequences: Sequence[Sample], media: Media | None, dtype: torch.dtype
) -> list[FloatArray]:
    """[R] of each sequence's response tokens, from transformers."""
    from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

    # convolutions would use TF32, and the patch embedding is one
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = AutoModelForCausalLM if media is None else Qwen3VLForConditionalGeneration
    model: Any = kind.from_pretrained(folder, dtype=dtype).to(device).eval()
    found = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).to(device)[None]
        inputs: dict[str, Any] = {"input_ids": ids}
        features = None if media is None else media.features(sequence.media)
        if media is not None and features is not None:
            inputs["mm_token_type_ids"] = (ids == media.processor.image_token_id).int()
            inputs["pixel_values"] = torch.from_numpy(features.pixel_values.copy()).to(device, dtype)
            inputs["image_grid_thw"] = torch.from_numpy(features.image_grid_thw).long().to(device)
        logits = model(**inputs).logits[0, sequence.prompt_length - 1 : -1].float()
        picked = logits.log_softmax(-1).gather(1, ids[0, sequence.prompt_length :, None]).squeeze(1)
        found.append(picked.cpu().numpy())
    del model
    release()
    return found


# ---- packing ---------------------------------------------------------------------------------------------


def packing(options: argparse.Namespace, figures: Figures) -> None:
    """Packed against padded micro-batches, and against packs whose rows share prompts: log-probabilities,
    loss, gradient norm."""
    on_cuda = torch.cuda.is_available()
    shapes = {"text": "text-0.6b", "vl": "vl-small"} if on_cuda else {"text": "tiny", "vl": "tiny-vl"}
    lengths = [600, 90, 250, 400, 31, 700] if on_cuda else [40, 17, 25, 31, 5, 40]
    with one_rank(), random_weights():
        for kind, shape in shapes.items():
            folder = make_folder(options.work, shape)
            media = media_of(folder)
            patches = (16, 20) if on_cuda else (4, 6)
            sequences = make_sequences(
                read_model_shape(folder), lengths, seed=4, media=media, patches=patches
            )
            sequences += [_answered_again(sequence) for sequence in sequences[:2]]
            whole, shared, padded = (
                _trained_once(folder, media, sequences, packed=packed, share_prompts=share)
                for packed, share in ((True, False), (True, True), (False, False))
            )
            for name, (logprobs, loss, norm) in (("", padded), ("shared_", shared)):
                apart = difference(whole[0], logprobs)
                figures.add(
                    **{
                        f"{kind}_{name}max_logprob_difference": apart["max_logprob_error"],
                        f"{kind}_{name}mean_logprob_difference": apart["mean_logprob_error"],
                        f"{kind}_{name}loss_difference": abs(whole[1] - loss),
                        f"{kind}_{name}grad_norm_relative_difference": abs(whole[2] / norm - 1),
                    }
                )


def _answered_again(sequence: Sample) -> Sample:
    """Another response to the same prompt: the first one's, reversed."""
    prompt = sequence.prompt_length
    tokens = np.concatenate([sequence.token_ids[:prompt], sequence.token_ids[prompt:][::-1]])
    return replace(sequence, token_ids=tokens)


def _trained_once(
    folder: Path, media: Media | None, sequences: Sequence[Sample], *, packed: bool, share_prompts: bool
) -> tuple[list[FloatArray], float, float]:
    """Log-probabilities, loss and gradient norm."""
    actor = make_actor(
        folder, media=media, packed=packed, share_prompts=share_prompts, trains=True, budget=2048
    )
    logprobs = [s.logprobs for s in actor.log_probs(sequences)]
    loss = actor.forward_backward(train_rows(sequences), ClippedSurrogate(LossConfig(), 1024)).loss
    norm = actor.optimizer_step()["grad_norm"]
    del actor
    release()
    return logprobs, loss, norm


# ---- agreement after a sync ------------------------------------------------------------------------------

_SYNC_SHAPES = {
    "text": ("text-4b", "tiny"),
    "vl": ("vl-small", "tiny-vl"),
    "moe": ("moe-small", "tiny-moe"),
    "fp8": ("text-0.6b", "tiny"),
}
"""On a GPU, on CPU. ``fp8``: vLLM quantises what it takes in."""


def sync(options: argparse.Namespace, figures: Figures) -> None:
    """vLLM against the actor after a sync of live weights, when fresh and after it slept; the sync's time
    beside a copy of as many bytes."""
    from copd_megatron.weight_sync.sync import WeightSync

    on_cuda = torch.cuda.is_available()
    quantization = RolloutQuantization.fp8 if options.kind == "fp8" else RolloutQuantization.none
    if quantization is not RolloutQuantization.none and not on_cuda:
        figures.add(skipped="no GPU; FP8 rollouts need one")
        return
    folder = make_folder(options.work, _SYNC_SHAPES[options.kind][0 if on_cuda else 1])
    media = media_of(folder)
    with one_rank():
        with random_weights():
            actor = make_actor(folder, media=media)
        # nearly all of the device's memory is the engine's to profile; no graphs: their capture takes long
        engine = make_engine(
            folder,
            media=media,
            gpu_memory_utilization=0.5,
            max_new_tokens=128 if on_cuda else 16,
            enforce_eager=True,
            can_sleep=True,
            quantization=quantization,
        )
        sync_now = WeightSync(actor, engine, WeightSyncConfig())
        sync_now()
        with torch.no_grad():  # other weights than the engine has met
            for parameter in actor.model.parameters():
                parameter.mul_(1.05)
        reports = [sync_now() for _ in range(5)]
        seconds = statistics.median(report.seconds for report in reports)
        num_bytes = reports[-1].loaded_bytes
        figures.add(
            seconds=seconds,
            gb=num_bytes / 1e9,
            gb_per_second=num_bytes / 1e9 / seconds,
            loads_in_place=engine.loads_in_place,
            can_sleep=engine.can_sleep,
        )
        copy = _copy_seconds(num_bytes, actor.device)
        figures.add(copy_gb_per_second=num_bytes / 1e9 / copy, share_of_copy_rate=copy / seconds)
        figures.add(**_engine_difference(actor, engine, media, on_cuda))
        engine.sleep()
        sync_now()
        after = _engine_difference(actor, engine, media, on_cuda)
        figures.add(**{f"{name}_after_sleep": value for name, value in after.items()})
        figures.add(profile=profile_summary(sync_now))


def _copy_seconds(num_bytes: int, device: torch.device) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return timed(partial(target.copy_, source), 5)


def _engine_difference(actor: Any, engine: Any, media: Media | None, on_cuda: bool) -> dict[str, Any]:
    """On prompts of text, and with ``media`` then on prompts with images: what an engine holds for images
    must not reach prompts without them, and none has come before the first call."""
    from copd_megatron.rollout.engine import SamplingSettings

    found: dict[str, Any] = {}
    settings = SamplingSettings(num_generations=2, temperature=1.0)
    count, patches = (16, (20, 28)) if on_cuda else (4, (4, 6))
    kinds: dict[str, Media | None] = {"": None} if media is None else {"": None, "image_": media}
    for step, (kind, images) in enumerate(kinds.items()):
        prompts = make_prompts(count, 32, dims=actor.dims, media=images, patches=patches)
        rollouts = engine.sample(prompts, settings, step=step)
        apart = difference(
            [s.logprobs for s in actor.log_probs(rollouts)], [r.rollout_logprobs for r in rollouts]
        )
        found |= {
            f"{kind}gen_kl_error": apart["kl_error"],
            f"{kind}max_gen_logprob_error": apart["max_logprob_error"],
            f"{kind}num_sampled_tokens": apart["num_tokens"],
        }
    return found


# ---- one cycle -------------------------------------------------------------------------------------------

_BRANCHES = ("addition", "running_sums")
_RANK = "import sys; from gpu_correctness import branch_rank; sys.exit(branch_rank())"


def cycle(options: argparse.Namespace, figures: Figures) -> None:
    """One CoPD cycle of two branches, a process each, from a briefly warmed-up tiny base to the merge."""
    base, data, run = options.work / "base", options.work / "base_data", options.work / "cycle"
    shutil.rmtree(run, ignore_errors=True)
    make = [sys.executable, "tools/make_tiny_base.py", "--out", str(base), "--data", str(data)]
    begin = time.perf_counter()
    subprocess.run(
        [*make, "--steps", "150"], cwd=ROOT, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    figures.add(base_seconds=time.perf_counter() - begin)
    begin = time.perf_counter()
    statuses = _run_ranks(_cycle_arguments(options, base, data, run), options.work)
    if any(statuses):
        raise RuntimeError(f"copd train ended with {statuses}")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "addition/train/loss" in step]

    def worst(name: str) -> float:
        return max(step[f"{branch}/{name}"] for step in steps for branch in _BRANCHES)

    taught = [step for step in steps if step["addition/timing/teaching_seconds"] > 0]
    teaching = sum(step["addition/timing/teaching_seconds"] for step in taught)
    whole = sum(step["addition/timing/step_seconds"] for step in taught)
    figures.add(
        seconds=time.perf_counter() - begin,
        num_steps=len(steps),
        gen_kl_error=worst("train/gen_kl_error"),
        max_gen_logprob_error=worst("train/gen_logprob_error_max"),
        merged_exported=(run / "export" / "merged" / "model.safetensors").exists(),
        tiny_scoring_share_of_step=teaching / whole if whole else math.nan,
        memory={key: value for step in steps[-1:] for key, value in step.items() if "/perf/memory_" in key},
    )


def _cycle_arguments(options: argparse.Namespace, base: Path, data: Path, run: Path) -> list[str]:
    arguments = [
        "train",
        "configs/two_branch_tiny.yaml",
        f"run.dir={run}",
        f"run.device={options.device}",
        f"model.path={base}",
        "branch_defaults.parallel.tensor_model_parallel_size=1",
        "branch_defaults.rollout.gpu_memory_utilization=0.2",
        "branch_defaults.rollout.enforce_eager=true",
        "schedule.cycles=1",
        "schedule.rlvr_steps=3",
        "schedule.opd_steps=2",
        "branch_defaults.num_prompts_per_step=16",
        "opd.num_prompts_per_step=8",
        "evaluation.max_prompts=32",
    ]
    return arguments + [
        f"branches.{name}.data.{part}=[{data}/{name}-{part}-*.tar]"
        for name in _BRANCHES
        for part in ("train", "validation")
    ]


def _run_ranks(arguments: list[str], work: Path) -> list[int]:
    """Both branches on the one device: each is a world of its own, and the router speaks over Gloo."""
    launcher = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    launcher["COPD_GPU_TURNS"] = str(work / "turns.lock")
    launcher["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, *arguments],
            cwd=ROOT,
            env=os.environ | launcher | {"RANK": str(rank)},
        )
        for rank in range(len(_BRANCHES))
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.5)
        # where one failed, the other learns of it and ends with a report
        return [rank.wait(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def branch_rank() -> int:
    """One rank of ``cycle``, as ``copd`` runs it.

    Two engines on one device start, sleep and wake one after the other: vLLM reads the memory in use on the
    whole device, takes for its own what another process takes meanwhile, and ends if there is less free
    after it went to sleep than before. In a job every rank has its device for itself.
    """
    from copd_megatron.cli.main import main
    from copd_megatron.rollout.engine import RolloutEngine

    def in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any, **named: Any) -> Any:
            with open(os.environ["COPD_GPU_TURNS"], "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                return method(*arguments, **named)

        return locked

    for name in ("_start", "sleep", "load_weights"):
        setattr(RolloutEngine, name, in_turn(getattr(RolloutEngine, name)))
    return main()
