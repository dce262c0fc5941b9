"""What ``bench_step.py`` measures of this package's side: the training loop itself, and vLLM without it.

`bench_step_ours.py ours|vllm|vllm_for_rl WORK.json`; each rank of ours has a launcher's variables.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench_step_gate import Gate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def ours(work: dict[str, Any], gate: Gate) -> None:
    """The steps of ``copd train`` with one branch; each waits for its turn."""
    from copd_megatron.branch.observer import Observer
    from copd_megatron.branch.schedule import steps
    from copd_megatron.branch.start import start
    from copd_megatron.branch.state import Batch
    from copd_megatron.branch.update import sync_weights
    from copd_megatron.config import load_config
    from copd_megatron.plugins import RECIPES
    from copd_megatron.topology.layout import Layout

    config = load_config(work["config"])
    stages = RECIPES.load(config.recipe, "recipe").stages
    with start(config, Layout.from_config(config)) as me, Observer(me) as observer:
        sync_weights(me)
        gate.ready()
        for step in steps(config.schedule):
            if not gate.wait():
                break
            observer.begin(step)
            me.clock.restart()
            batch, cpu, begun = Batch(), dict[str, float](), time.process_time()
            for stage in stages:
                before = time.process_time()
                batch = stage(me, step, batch)
                phase = _PHASE_OF_STAGE.get(stage.__name__)
                if phase is not None:
                    cpu[f"cpu {phase}"] = time.process_time() - before
            observer.step(step)
            cpu["cpu step"] = time.process_time() - begun
            gate.answer({**cpu, **(_phases(me.run_dir) if me.world.is_first else {})})


_PHASE_OF_STAGE = {"native": "sampling", "update": "update", "sync": "sync"}


def _phases(run_dir: Path) -> dict[str, float]:
    """The last step's seconds, as the run's own metrics say."""
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    timing = {name.partition("timing/")[2]: value for name, value in last.items() if "/timing/" in name}
    named = {
        "sampling": "generation_seconds",
        "grading": "grading_seconds",
        "update": "update_seconds",
        "sync": "weight_sync_seconds",
        "other": "other_seconds",
        "step": "step_seconds",
    }
    return {phase: timing[name] for phase, name in named.items()}


def vllm(work: dict[str, Any], gate: Gate, engine: dict[str, Any] | None = None, **wanted: Any) -> None:
    """Offline vLLM as its documentation shows it: text, unless more is ``wanted``; with further settings of
    the ``engine``."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    rows, length = work["prompts"] * work["generations"], work["prompt"] + work["response"]
    llm = LLM(
        work["model"],
        dtype="float32",
        max_model_len=length,
        max_num_seqs=rows,
        kv_cache_memory_bytes=int(work["kv_gib"] * 2**30),
        enforce_eager=not work["compile"],
        **engine or {},
    )
    sampling = SamplingParams(n=work["generations"], max_tokens=work["response"], ignore_eos=True, **wanted)

    def step() -> dict[str, float]:
        llm.reset_prefix_cache()
        begin, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in work["ids"]], sampling, use_tqdm=False)
        seconds = {"sampling": time.perf_counter() - begin, "cpu sampling": time.process_time() - cpu}
        assert sum(len(one.token_ids) for o in outputs for one in o.outputs) == rows * work["response"]
        return seconds

    gate.serve(step)


def vllm_for_rl(work: dict[str, Any], gate: Gate) -> None:
    """Offline vLLM asked for what a step needs: a seed for each response, its tokens' log-probabilities."""
    rows, length = work["prompts"] * work["generations"], work["prompt"] + work["response"]
    # after a part of a prompt it rewinds the seeded generator by an offset, which those of a CPU do not have
    whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": rows * length}
    vllm(work, gate, whole_prompts, seed=1, logprobs=0)


if __name__ == "__main__":
    {"ours": ours, "vllm": vllm, "vllm_for_rl": vllm_for_rl}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text()), Gate()
    )
