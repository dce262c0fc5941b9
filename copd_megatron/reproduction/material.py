"""The base model and the shards of a setting of tables, each made once for each seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.tiny.base import Progress, build_model, make_once
from copd_megatron.tiny.recipe import (
    PACKAGES_THAT_MATTER,
    ModelSize,
    TextBase,
    WarmUpSettings,
    digest_of_parts,
    package_versions,
)
from copd_megatron.tiny.tasks.tables import (
    TEXT,
    Chain,
    TableDomain,
    TableWorld,
    chains,
    distinct_chains,
    num_chains,
    respond,
)
from copd_megatron.tiny.vl_recipe import VL_BASE, VisionSize

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from copd_megatron.data.processing import ItemFeatures, MultimodalProcessor

Report = Callable[[int, float], None]
"""Called with a step of the warm-up and its loss."""
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
    vision: VisionSize | None = None
    """Of the vision tower; None: a model of text alone."""
    num_pictures: int = 40
    """Images or videos of every number that the warm-up shows, in each domain that has them."""


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
            rng = random.Random(f"{world.seed}/{domain.name}/media")
            samples = [
                NewSample(
                    prompt=chain.prompt,
                    answer=str(chain.values(world)[-1]),
                    verifier=VERIFIER,
                    media=_medium(chain, world.num_symbols, rng),
                )
                for chain in found
            ]
            write_shards(samples[: material.num_validation], folder, f"{domain.name}-validation")
            write_shards(samples[material.num_validation :], folder, f"{domain.name}-train")
        return {"material": asdict(material)}

    parts = [asdict(material.world), material.num_train, material.num_validation]
    return make_once(out, digest_of_parts(parts), make)


def _medium(chain: Chain, num_symbols: int, rng: random.Random) -> Mapping[str, bytes]:
    if chain.domain.medium == TEXT:
        return {}
    from copd_megatron.tiny.tasks.table_media import medium_of

    return medium_of(chain, num_symbols, rng)


def make_base(out: Path, material: Material, *, progress: Progress | None = None) -> bool:
    """Makes the model folder: a Qwen3, or a Qwen3-VL if the material has vision, that imitates the world's
    beliefs. Returns False if it is there already."""

    def make(folder: Path) -> dict[str, object]:
        train = _train_text if material.vision is None else _train_visual
        steps = material.warm_up.num_steps
        report = None if progress is None else lambda n, loss: progress(n, steps, loss)
        losses = train(folder, material, report)
        return {"material": asdict(material), "final_loss": sum(losses[-50:]) / len(losses[-50:])}

    parts: list[object] = [asdict(material), package_versions(PACKAGES_THAT_MATTER)]
    return make_once(out, digest_of_parts(parts), make)


def _train_text(folder: Path, material: Material, report: Report | None) -> list[float]:
    from copd_megatron.data import encode_prompt
    from copd_megatron.tiny.tokenizer import build_tokenizer
    from copd_megatron.tiny.warm_up import pad_batch, reproducible, warm_up

    def batches() -> Iterator[dict[str, Any]]:
        for rows in _demonstrations(material):
            encoded = [
                (encode_prompt(tokenizer, chain.prompt).tolist(), _ids(tokenizer, said))
                for chain, said in rows
            ]
            normalizer = sum(len(response) for _, response in encoded)
            yield {**pad_batch(encoded, tokenizer.pad_token_id), "normalizer": normalizer}

    tokenizer = build_tokenizer(material.model.vocab_size)
    with reproducible(material.world.seed, num_threads=1):
        model = build_model(TextBase(domains=(), model=material.model), tokenizer)
        losses = warm_up(model, batches(), material.warm_up, report=report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _train_visual(folder: Path, material: Material, report: Report | None) -> list[float]:
    from copd_megatron.config.schema import MediaConfig
    from copd_megatron.data.processing import MultimodalProcessor
    from copd_megatron.tiny.vl import build_processor, build_visual_model, examples_loss
    from copd_megatron.tiny.warm_up import reproducible, warm_up

    assert material.vision is not None
    recipe = dataclasses.replace(VL_BASE, model=material.model, vision=material.vision)
    processor = build_processor(recipe)
    every_frame = MultimodalProcessor(processor, MediaConfig(frame_rate=1000.0))
    with reproducible(material.world.seed, num_threads=1):
        model = build_visual_model(recipe, processor)
        losses = warm_up(
            model,
            _visual_batches(material, every_frame),
            material.warm_up,
            report=report,
            loss=lambda model, batch: examples_loss(model, batch, every_frame),
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return losses


def _visual_batches(material: Material, processor: MultimodalProcessor) -> Iterator[dict[str, Any]]:
    """Examples by domain. Media come from a pool, since encoding one costs more than learning from it."""
    from copd_megatron.tiny.vl_demonstrations import Example

    world = material.world
    rng = random.Random(f"{world.seed}/pool")
    pools = {
        d.name: _pool(world, d, processor, rng, material.num_pictures)
        for d in world.domains
        if d.medium != TEXT
    }
    for rows in _demonstrations(material):
        batch: dict[str, list[Example]] = {domain.name: [] for domain in world.domains}
        for chain, said in rows:
            name = chain.domain.name
            item = rng.choice(pools[name][chain.start]) if name in pools else None
            items = [] if item is None else [item]
            parts = processor.parts(chain.prompt, [each.kind for each in items], chain.prompt)
            batch[name].append(
                Example(
                    prompt_ids=tuple(processor.encode(parts, items, chain.prompt).tolist()),
                    response_ids=tuple(_ids(processor.tokenizer, said)),
                    item=item,
                )
            )
        normalizer = sum(len(example.response_ids) for examples in batch.values() for example in examples)
        yield {"examples": batch, "normalizer": normalizer}


def _pool(
    world: TableWorld,
    domain: TableDomain,
    processor: MultimodalProcessor,
    rng: random.Random,
    num_pictures: int,
) -> list[list[ItemFeatures]]:
    """Encoded images or videos by the number that they show."""
    found = []
    for number in range(world.num_symbols):
        chain = Chain(domain=domain, start=number, steps=())
        media = [next(iter(_medium(chain, world.num_symbols, rng).values())) for _ in range(num_pictures)]
        found.append([processor.decode_and_process(domain.medium, data, domain.name) for data in media])
    return found


def _demonstrations(material: Material) -> Iterator[list[tuple[Chain, str]]]:
    """Batches of tasks and of what the base believes, of every domain in turn; validation prompts are not
    held out, because a demonstration holds beliefs and no gold answer."""
    world, settings = material.world, material.warm_up
    rng = random.Random(world.seed)
    streams = [chains(world, domain, rng) for domain in world.domains]
    for _ in range(settings.num_steps):
        rows = []
        for number in range(settings.batch_size):
            chain = next(streams[number % len(streams)])
            rows.append((chain, respond(chain, chain.values(world, rng))))
        yield rows


def _ids(tokenizer: Any, response: str) -> list[int]:
    return [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
