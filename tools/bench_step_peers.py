"""What ``bench_step.py`` compares with: TRL's GRPO, and plain transformers as an actor.

Runs in an environment of its own, which has neither this package nor its engines:

    python tools/bench_step_peers.py trl|actor WORK.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step_gate import Gate


def trl(work: dict[str, Any], gate: Gate) -> None:
    """GRPO with generation by transformers, everything in one micro-batch, nothing recomputed."""
    from datasets import Dataset  # type: ignore[import-not-found]  # in its own environment
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    seconds: dict[str, float] = {}

    class Turns(TrainerCallback):
        begun = (0.0, 0.0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not gate.wait():
                control.should_training_stop = True
                sys.exit(0)
            seconds.clear()
            self.begun = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = time.perf_counter() - self.begun[0]
            cpu = time.process_time() - self.begun[1]
            gate.answer(
                {
                    **seconds,
                    "update": step - seconds["prepared"],
                    "cpu update": cpu - seconds["cpu prepared"],
                    "step": step,
                    "cpu step": cpu,
                }
            )

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float("7" in text) for text in completions]

    rows = work["prompts"] * work["generations"]
    arguments = GRPOConfig(
        output_dir=work["trl_output"],
        per_device_train_batch_size=rows,
        num_generations=work["generations"],
        max_completion_length=work["response"],
        max_steps=10**6,
        learning_rate=work["lr"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=work["model"],
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in work["texts"]]),
        callbacks=[Turns()],
    )
    _timed(trainer, "_generate_single_turn", "sampling", seconds)
    _timed(trainer, "_generate_and_score_completions", "prepared", seconds)
    gate.ready()
    trainer.train()


def _timed(owner: Any, name: str, label: str, seconds: dict[str, float]) -> None:
    """Adds the seconds of a method's calls to ``seconds[label]``, and those of the CPU."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - begin
            name_of_cpu = f"cpu {label}"
            seconds[name_of_cpu] = seconds.get(name_of_cpu, 0.0) + time.process_time() - cpu

    setattr(owner, name, timed)


def actor(work: dict[str, Any], gate: Gate) -> None:
    """Forward, backward and AdamW of a policy gradient by transformers; and how fast this machine multiplies.

    Rows have one length, so there is no padding and no mask. Logits are made at response tokens only, with
    their log-probabilities and entropies, as TRL does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], fused=True)
    rows, response = work["prompts"] * work["generations"], work["response"]
    length = work["prompt"] + response
    ids = torch.randint(0, work["vocab"], (rows, length), generator=torch.Generator().manual_seed(0))
    batches = ids.split(max(1, work["micro_batch_tokens"] // length))

    def step() -> dict[str, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        entropies: list[torch.Tensor] = []
        optimizer.zero_grad()
        for batch in batches:
            logits = model(input_ids=batch, logits_to_keep=response + 1, use_cache=False).logits[:, :-1]
            logprobs = logits.log_softmax(dim=-1)
            with torch.no_grad():
                entropies.append(-(logprobs.exp() * logprobs).sum(dim=-1).mean())
            chosen = logprobs.gather(-1, batch[:, -response:, None])
            (-(chosen - chosen.detach()).exp().sum() / (rows * response)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = {"update": time.perf_counter() - begin, "cpu update": time.process_time() - cpu}
        return {**seconds, "flops_per_second": _matrix_rate()}

    gate.serve(step)


def _matrix_rate() -> float:
    """Floating-point operations per second of float32 matrix products: the best of several, because whatever
    else runs only slows them down."""
    import torch

    size, best = 1024, 0.0
    left, right, out = (torch.ones(size, size) for _ in range(3))
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


if __name__ == "__main__":
    {"trl": trl, "actor": actor}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()), Gate())
