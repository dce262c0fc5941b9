"""Small actors and rollout engines, made by the ranks of a test, and the training steps that tests repeat.

Everything here imports Megatron or vLLM when it is called: on the ranks, not when pytest collects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from copd_megatron.config.schema import LossConfig, ParallelConfig, RolloutConfig, TrainingConfig
from copd_megatron.records import Prompt, TrainRow
from tests.support.texts import random_texts

if TYPE_CHECKING:
    from copd_megatron.policy.actor import MegatronActor
    from copd_megatron.rollout.engine import RolloutEngine


def make_actor(parallel: ParallelConfig, folder: Path, **changes: Any) -> MegatronActor:
    """A float32 actor of a Hugging Face folder, without an optimizer unless ``changes`` names one.

    Args:
        changes: further arguments of ``MegatronActor``, or other values for those set here.
    """
    import torch

    from copd_megatron.policy.actor import MegatronActor

    fields: dict[str, Any] = {
        "training": TrainingConfig(),
        "optimizer": None,
        "dtype": torch.float32,
        "max_tokens": 128,
        "temperature": 1.0,
        "seed": 3,
        "total_steps": 10,
    }
    return MegatronActor(model_path=folder, parallel=parallel, **fields | changes)


class Step(NamedTuple):
    """One update's numbers."""

    loss: float
    grad_norm: float
    lr: float


def train(actor: MegatronActor, rows: Sequence[TrainRow], steps: int) -> list[Step]:
    """Updates on the same rows with the clipped surrogate."""
    from copd_megatron.objectives.surrogate import ClippedSurrogate

    taken = []
    for _ in range(steps):
        loss = actor.forward_backward(rows, ClippedSurrogate(LossConfig(), 64)).loss
        stepped = actor.optimizer_step()
        taken.append(Step(loss, stepped["grad_norm"], stepped["lr"]))
    return taken


def make_engine(folder: Path, config: RolloutConfig) -> RolloutEngine:
    """A float32 rollout engine of branch ``b``."""
    import torch

    from copd_megatron.rollout.engine import RolloutEngine

    return RolloutEngine(
        model_path=folder,
        config=config,
        branch="b",
        run_id="test",
        dtype=torch.float32,
        max_tokens=64,
        seed=1,
    )


def random_prompts(count: int, *, length: int) -> list[Prompt]:
    """Prompts of random bytes for ``make_engine``."""
    return [
        Prompt(prompt_id=str(i), domain="b", token_ids=text.token_ids[:length], answer="", verifier="exact")
        for i, text in enumerate(random_texts(count, 256, seed=4))
    ]


def load_and_compare(
    parallel: ParallelConfig, folder: Path, checkpoint: Path
) -> tuple[MegatronActor, list[str]]:
    """Has Megatron load a checkpoint of the weights that ``folder`` holds.

    Returns:
        The actor, and the names of the tensors that then differ from the folder's.
    """
    import torch

    from copd_megatron.checkpoint.actor_state import load_weights

    actor = make_actor(parallel, folder)
    direct = {slot.name: actor.view.read(slot).clone() for slot in actor.view.local}
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.fill_(7.0)
    load_weights(actor, str(checkpoint))
    return actor, [s.name for s in actor.view.local if not torch.equal(actor.view.read(s), direct[s.name])]
