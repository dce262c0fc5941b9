"""The base model and the shards of a setting of tables, each made once for each seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from copd_megatron.tiny.base import Progress, build_model, make_once
from copd_megatron.tiny.recipe import (
    PACKAGES_THAT_MATTER,
    ModelSize,
    TextBase,
    WarmUpSettings,
    digest_of_parts,
    package_versions,
)
from copd_megatron.tiny.tasks.tables import TableWorld, chains, distinct_chains, num_chains, respond

VERIFIER = "exact"


@dataclass(frozen=True, kw_only=True)
class Material:
    """All that determines a base model and its shards, but the seed, which is the world's."""

    world: TableWorld
    model: ModelSize
    warm_up: WarmUpSettings
    num_train: int
    """Training prompts of a domain; fewer where it has no more besides the held-out ones."""
    num_validation: int


def make_shards(out: Path, material: Material) -> bool:
    """Writes ``<out>/<domain>-{train,validation}-NNNNNN.tar``. Returns False if they are there already.

    No validation prompt is a training prompt. Raises TinyBaseError if ``out`` holds something else.
    """

    def make(folder: Path) -> dict[str, object]:
        from copd_megatron.data.convert.write import NewSample, write_shards

        world = material.world
        for domain in world.domains:
            wanted = material.num_validation + material.num_train
            found = distinct_chains(world, domain, min(wanted, num_chains(world, domain) * 9 // 10))
            samples = [
                NewSample(prompt=c.prompt, answer=str(c.values(world)[-1]), verifier=VERIFIER) for c in found
            ]
            write_shards(samples[: material.num_validation], folder, f"{domain.name}-validation")
            write_shards(samples[material.num_validation :], folder, f"{domain.name}-train")
        return {"material": asdict(material)}

    parts = [asdict(material.world), material.num_train, material.num_validation]
    return make_once(out, digest_of_parts(parts), make)


def make_base(out: Path, material: Material, *, progress: Progress | None = None) -> bool:
    """Makes the model folder: a Qwen3 that imitates the world's beliefs. Returns False if it is there
    already."""

    def make(folder: Path) -> dict[str, object]:
        from copd_megatron.tiny.tokenizer import build_tokenizer
        from copd_megatron.tiny.warm_up import reproducible, warm_up

        settings = material.warm_up
        tokenizer = build_tokenizer(material.model.vocab_size)
        with reproducible(material.world.seed, num_threads=1):
            model = build_model(TextBase(domains=(), model=material.model), tokenizer)
            losses = warm_up(
                model,
                _batches(material, tokenizer),
                settings,
                report=None if progress is None else lambda n, loss: progress(n, settings.num_steps, loss),
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"material": asdict(material), "final_loss": sum(losses[-50:]) / len(losses[-50:])}

    parts: list[object] = [asdict(material), package_versions(PACKAGES_THAT_MATTER)]
    return make_once(out, digest_of_parts(parts), make)


def _batches(material: Material, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Demonstrations of what the base believes, of every domain in turn; validation prompts are not held
    out, because a demonstration holds beliefs and no gold answer."""
    from copd_megatron.data import encode_prompt
    from copd_megatron.tiny.warm_up import pad_batch

    world, settings = material.world, material.warm_up
    rng = random.Random(world.seed)
    streams = [chains(world, domain, rng) for domain in world.domains]
    for _ in range(settings.num_steps):
        rows = []
        for number in range(settings.batch_size):
            chain = next(streams[number % len(streams)])
            response = respond(chain, chain.values(world, rng))
            ids = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
            rows.append((encode_prompt(tokenizer, chain.prompt).tolist(), ids))
        normalizer = sum(len(response) for _, response in rows)
        yield {**pad_batch(rows, tokenizer.pad_token_id), "normalizer": normalizer}
