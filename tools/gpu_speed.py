"""The speed parts of ``tools/gpu_check.py``: training, rollouts, and whole steps with their memory."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_material import (
    PACK_TOKENS,
    ROOT,
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
from gpu_measure import (
    GIB,
    Figures,
    device_memory,
    layers_that_fit,
    model_flops,
    peak_flops,
    profile_summary,
    synchronize,
    timed,
)

from copd_megatron.config.hardware import missing_for
from copd_megatron.config.schema import FP8Recipe, LossConfig, MemoryConfig, WeightSyncConfig
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.objectives.surrogate import ClippedSurrogate

# ---- training --------------------------------------------------------------------------------------------


def training(options: argparse.Namespace, figures: Figures) -> None:
    """An update of four packs of 8k tokens, gradient and optimizer step; and a scoring pass over them."""
    from copd_megatron.policy.megatron.settings import this_machine

    recipe = FP8Recipe(options.recipes[0])
    if reason := missing_for(recipe, this_machine()):
        figures.add(skipped=reason)
        return
    on_cuda, (shape,) = torch.cuda.is_available(), options.shape
    dims = read_model_shape(make_folder(options.work, shape))
    layers = None
    if on_cuda:
        fits = layers_that_fit(dims, tokens=PACK_TOKENS, fp8=recipe is not FP8Recipe.none)
        layers = None if fits == dims.num_layers else fits
    folder = make_folder(options.work, shape, layers=layers)
    dims, media = read_model_shape(folder), media_of(folder)
    # packs of 8,192: one long sequence, the rest as rollouts come
    lengths = [8192, *[4096] * 2, *[2048] * 4, *[1024] * 8] if on_cuda else [256, 128, 128, 64, 64]
    patches = (32, 32) if on_cuda else (4, 6)
    sequences = make_sequences(dims, lengths, seed=5, media=media, patches=patches)
    forward_flops = model_flops(dims, sequences, patches=patches[0] * patches[1])
    figures.add(num_layers=dims.num_layers)
    with one_rank():
        with random_weights():
            actor = make_actor(folder, media=media, recipe=recipe, trains=True)
        rows = train_rows(sequences)

        def gradient() -> None:
            actor.forward_backward(rows, ClippedSurrogate(LossConfig(), PACK_TOKENS))

        def step() -> None:
            gradient()
            actor.optimizer_step()
            actor.finish_update()

        for _ in range(2 if on_cuda else 1):
            step()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(step, 3 if on_cuda else 2)
        peak = peak_flops()
        figures.add(
            seconds=seconds,
            tokens_per_second=sum(lengths) / seconds,
            tflops=3 * forward_flops / seconds / 1e12,
            **({"mfu": 3 * forward_flops / seconds / peak} if peak else {}),
            **({"peak_gib": torch.cuda.max_memory_allocated() / GIB} if on_cuda else {}),
        )
        alone = timed(gradient)
        actor.log_probs(sequences)
        forward = timed(lambda: actor.log_probs(sequences), 2)
        figures.add(
            gradient_seconds=alone,
            optimizer_seconds=max(0.0, seconds - alone),
            scored_tokens_per_second=sum(lengths) / forward,
            **({"scoring_mfu": forward_flops / forward / peak} if peak else {}),
        )
        figures.add(profile=profile_summary(step))


# ---- rollouts --------------------------------------------------------------------------------------------

_PROMPT_TOKENS = 128


def _rollout_size() -> tuple[int, int]:
    """Sequences and new tokens of each."""
    return (256, 512) if torch.cuda.is_available() else (4, 16)


def rollout(options: argparse.Namespace, figures: Figures) -> None:
    """Tokens per second in process and, in a process of its own before it, of plain offline vLLM."""
    from copd_megatron.rollout.engine import SamplingSettings
    from copd_megatron.weight_sync.sync import WeightSync

    folder = make_folder(options.work, "text-4b" if torch.cuda.is_available() else "tiny")
    count, new_tokens = _rollout_size()
    done = subprocess.run(
        [sys.executable, "-c", "import gpu_speed; gpu_speed.plain_rollouts()", str(folder)],
        cwd=ROOT / "tools",
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    # vLLM logs to the same stream
    plain = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    figures.add(**plain)
    with one_rank():
        with random_weights():
            actor = make_actor(folder)
        engine = make_engine(folder, gpu_memory_utilization=0.6, max_new_tokens=new_tokens, max_num_seqs=256)
        WeightSync(actor, engine, WeightSyncConfig())()
        settings = SamplingSettings(num_generations=1, temperature=1.0)
        prompts = make_prompts(count, _PROMPT_TOKENS)

        def sample(step: int) -> int:
            return sum(r.response_length for r in engine.sample(prompts, settings, step=step))

        rate = _best_rate(sample)
        figures.add(tokens_per_second=rate, share_of_plain_vllm=rate / plain["plain_tokens_per_second"])


def _best_rate(sample: Callable[[int], int]) -> float:
    """Tokens per second of the better of two calls, after one that warms up."""
    rates = []
    for step in range(3):
        begin = time.perf_counter()
        tokens = sample(step)
        rates.append(tokens / (time.perf_counter() - begin))
    return max(rates[1:])


def plain_rollouts() -> None:
    """The same prompts through ``vllm.LLM`` as anybody would call it; prints its figures as one line of JSON.
    Beside it the same with a seed for every request, as our rollouts have."""
    import vllm

    folder, on_cuda = sys.argv[1], torch.cuda.is_available()
    count, new_tokens = _rollout_size()
    more: dict[str, Any] = {"kv_cache_memory_bytes": 2**28, "dtype": "float32"}
    if on_cuda:
        more = {"gpu_memory_utilization": 0.6, "dtype": "bfloat16"}
    llm: Any = vllm.LLM(
        folder,
        max_model_len=2048,
        max_num_seqs=256,
        enforce_eager=not on_cuda,
        load_format="dummy",
        seed=0,
        **more,
    )
    prompts = [{"prompt_token_ids": p.token_ids.tolist()} for p in make_prompts(count, _PROMPT_TOKENS)]

    def sampler(**settings: Any) -> Callable[[int], int]:
        def sample(step: int) -> int:
            parameters = [
                vllm.SamplingParams(
                    temperature=1.0,
                    max_tokens=new_tokens,
                    **{k: 1000 * step + i if k == "seed" else v for k, v in settings.items()},
                )
                for i in range(count)
            ]
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        return sample

    found = {
        "plain_tokens_per_second": _best_rate(sampler(logprobs=0)),
        "plain_seeded_tokens_per_second": _best_rate(sampler(logprobs=0, seed=0)),
    }
    print(json.dumps(found), flush=True)


# ---- whole steps, and their memory -----------------------------------------------------------------------


class _Phases:
    """Largest memory and median seconds of a step's phases, by name."""

    def __init__(self) -> None:
        self.memory: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, list[float]] = {}

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        begin = time.perf_counter()
        result = action()
        synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        now = device_memory()
        if on_cuda:
            now["peak"] = torch.cuda.max_memory_allocated() / GIB
        known = self.memory.setdefault(name, {})
        for key, value in now.items():
            known[key] = max(value, known.get(key, 0.0))
        return result


def steps(options: argparse.Namespace, figures: Figures) -> None:
    """Whole steps of a branch, actor and engine taking turns on one device: seconds and memory of each
    phase, the teacher's scoring as a share, and what ``--cycles`` of them leave behind."""
    from copd_megatron.weight_sync.sync import WeightSync

    started, on_cuda = time.monotonic(), torch.cuda.is_available()
    shape = "text-4b" if on_cuda else "tiny"
    dims = read_model_shape(make_folder(options.work, shape))
    layers = None
    if on_cuda:  # beside what a sleeping engine keeps
        fits = layers_that_fit(dims, tokens=PACK_TOKENS, reserve_gib=14)
        layers = None if fits == dims.num_layers else fits
    folder = make_folder(options.work, shape, layers=layers)
    dims = read_model_shape(folder)
    phases = _Phases()
    with one_rank():
        with random_weights():
            actor = phases.run(
                "actor",
                lambda: make_actor(folder, trains=True, memory=MemoryConfig(offload_weights=True)),
            )
        phases.run("offload", lambda: actor.give_memory(weights=False))
        engine = phases.run(
            "engine",
            lambda: make_engine(
                folder,
                gpu_memory_utilization=0.4,
                max_new_tokens=256 if on_cuda else 16,
                max_num_seqs=128,
                can_sleep=True,
            ),
        )
        sync_now = WeightSync(actor, engine, WeightSyncConfig())
        phases.run("sync", sync_now)
        figures.add(num_layers=dims.num_layers)
        for number in range(3 if on_cuda else 2):
            _whole_step(actor, engine, sync_now, phases, number, prompts=16 if on_cuda else 2)
            if number == 0:
                phases.seconds.clear()  # it also warmed up
            figures.add(**_step_figures(phases))
        left = 0.85 * 60 * options.minutes - (time.monotonic() - started)
        _cycles(actor, engine, sync_now, figures, count=options.cycles if on_cuda else 3, seconds=left)


def _whole_step(
    actor: Any, engine: Any, sync_now: Callable[[], Any], phases: _Phases, number: int, *, prompts: int
) -> None:
    """One step of a branch that is taught and teaches: native and as many cross rollouts, both scored where
    a run scores them, one update, one sync."""
    from copd_megatron.rollout.engine import SamplingSettings

    settings = SamplingSettings(num_generations=8, temperature=1.0)
    rollouts: list[Any] = []
    for kind in range(2):

        def sample(kind: int = kind) -> list[Any]:
            actor.give_memory(weights=True)
            found: list[Any] = engine.sample(
                make_prompts(prompts, 128 if torch.cuda.is_available() else 16, seed=2 * number + kind),
                settings,
                step=number,
            )
            return found

        rollouts += phases.run("native_sampling" if kind == 0 else "cross_sampling", sample)
    cross = rollouts[len(rollouts) // 2 :]
    phases.run("own_scoring", lambda: actor.log_probs(cross))
    phases.run("teacher_scoring", lambda: actor.log_probs(cross))
    phases.run("sleep", engine.sleep)

    def update() -> None:
        actor.forward_backward(train_rows(rollouts), ClippedSurrogate(LossConfig(), PACK_TOKENS))
        actor.optimizer_step()
        actor.finish_update()

    phases.run("take_memory", actor.take_memory)
    phases.run("update", update)
    phases.run("offload", lambda: actor.give_memory(weights=False))
    phases.run("sync", sync_now)


def _step_figures(phases: _Phases) -> dict[str, Any]:
    seconds = {name: statistics.median(values) for name, values in phases.seconds.items()}
    total = sum(seconds.values())
    found: dict[str, Any] = {f"{name}_seconds": value for name, value in seconds.items()}
    if total:
        found |= {
            "step_seconds": total,
            "teacher_scoring_share_of_step": seconds["teacher_scoring"] / total,
        }
    of = "device" if torch.cuda.is_available() else "resident"
    names = {
        "asleep_and_offloaded_gib": "offload",
        "sampling_gib": "cross_sampling",
        "scoring_gib": "teacher_scoring",
        "asleep_gib": "sleep",
        "update_gib": "update",
        "sync_gib": "sync",
    }
    found |= {figure: phases.memory[name][of] for figure, name in names.items() if name in phases.memory}
    return found | {"memory": phases.memory}


def _cycles(
    actor: Any,
    engine: Any,
    sync_now: Callable[[], Any],
    figures: Figures,
    *,
    count: int,
    seconds: float,
) -> None:
    """What turns of sampling, scoring, sleep, update, offload and sync leave behind, on sequences of other
    lengths each time; fewer turns than ``count`` where ``seconds`` are over before."""
    from copd_megatron.rollout.engine import SamplingSettings

    on_cuda, begin = torch.cuda.is_available(), time.monotonic()
    rng = np.random.default_rng(8)
    seen: list[dict[str, float]] = []
    taken: list[float] = []
    for number in range(count):
        if seen and time.monotonic() - begin + max(taken) > seconds:
            break
        start = time.monotonic()
        longest = 2048 if on_cuda else 64
        lengths = rng.integers(longest // 8, longest, size=8 if on_cuda else 4).tolist()
        sequences = make_sequences(actor.dims, lengths, seed=number)
        actor.give_memory(weights=True)
        settings = SamplingSettings(num_generations=1, temperature=1.0)
        engine.sample(make_prompts(8, int(rng.integers(16, 40)), seed=number), settings, step=number)
        actor.log_probs(sequences[:4])
        engine.sleep()
        actor.forward_backward(train_rows(sequences), ClippedSurrogate(LossConfig(), PACK_TOKENS))
        actor.optimizer_step()
        actor.finish_update()
        actor.give_memory(weights=False)
        seen.append(device_memory())
        sync_now()
        taken.append(time.monotonic() - start)
        figures.add(cycles=len(seen), seconds_per_cycle=statistics.median(taken), **_growth(seen))
    figures.add(memory_of_cycles=seen)


def _growth(seen: Sequence[dict[str, float]]) -> dict[str, float]:
    """GiB that the last cycles hold more than the first, the very first two left out."""
    first = seen[2:7] or seen[-1:]
    last = seen[-min(5, len(seen)) :]

    def median(cycles: Sequence[dict[str, float]], key: str) -> float:
        return statistics.median(cycle[key] for cycle in cycles)

    return {f"{key}_growth_gib": median(last, key) - median(first, key) for key in seen[0]}
