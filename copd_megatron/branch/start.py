"""Joins the job and builds what this process holds of its branch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from copd_megatron.branch.schedule import num_steps
from copd_megatron.branch.state import Branch
from copd_megatron.config import Config
from copd_megatron.config.graph import Edge, build_graph
from copd_megatron.config.schema import BranchConfig
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.media_share import MediaShare
from copd_megatron.data.sources import PromptSources
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.launch.lock import RunLock
from copd_megatron.launch.preflight import check_place, free_run_dir
from copd_megatron.launch.run_dir import run_directory
from copd_megatron.launch.waiting import waiting
from copd_megatron.objectives.base import Context, Objective, ObjectiveFactory
from copd_megatron.opd.privilege import Splicer
from copd_megatron.opd.router import Router
from copd_megatron.plugins import OBJECTIVES
from copd_megatron.policy.actor import MegatronActor
from copd_megatron.policy.device import model_dtype, uses_cuda
from copd_megatron.records import NATIVE
from copd_megatron.rewards.grader import Grader
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.samples.log import SampleLog
from copd_megatron.topology.layout import Layout
from copd_megatron.topology.world import World, init_world
from copd_megatron.weight_sync.sync import WeightSync

_GRADING_SHARE = 1 / 3
"""Of ``run.collective_timeout_seconds``: the most that grading one batch of responses may take."""


@contextlib.contextmanager
def start(config: Config, layout: Layout) -> Iterator[Branch]:
    """Joins the job and builds this rank's branch; leaves in good order at the end.

    Data is checked before models are loaded, models before engines start, so that a mistake shows early.
    """
    device: Literal["cuda", "cpu"] = "cuda" if uses_cuda(config) else "cpu"
    run_dir = run_directory(config)
    with (
        init_world(
            {name: list(layout.ranks_of(name)) for name in layout.branch_names},
            device=device,
            timeout_seconds=config.run.collective_timeout_seconds,
            run_id=os.environ.get("COPD_RUN_ID", "run"),
            report_dir=run_dir,
        ) as world,
        _place(config, world, run_dir),
    ):
        world.adopt_branch_environment()
        branch = _build(config, world, run_dir)
        try:
            yield branch
        finally:
            branch.grader.close()
            if branch.media is not None:
                branch.media.close()


@contextlib.contextmanager
def _place(config: Config, world: World, run_dir: Path) -> Iterator[None]:
    """Checks this machine and the run directory, which is the first rank's for as long as the run lasts."""
    with world.watch.operation("startup.place"):
        check_place(config)
    world.barrier("startup.place")  # nothing is deleted before every machine has said yes
    with RunLock(run_dir) if world.is_first else contextlib.nullcontext():
        if world.is_first:
            free_run_dir(config, run_dir)
        yield


def _build(config: Config, world: World, run_dir: Path) -> Branch:
    """This rank's branch, part by part."""
    name = world.branch
    settings = config.branches[name]
    graph = build_graph(config)
    edges = graph.into(name)
    objectives = objectives_of(config, name, edges)
    model_path = settings.model_path or config.model.path
    with world.watch.operation("startup.data"), waiting("reading the data"):
        shape = read_model_shape(model_path)
        sources = PromptSources(config, model_path, shape, share=_media_share(world, settings))
        verifiers = [v for branch in config.branches.values() for v in branch.reward.verifiers]
        # the other ranks wait for the grades: hanging verifiers must not take them to their limit
        max_seconds = config.run.collective_timeout_seconds * _GRADING_SHARE
        grader = Grader(settings.reward, also=verifiers, max_seconds=max_seconds, terms=settings.reward.terms)
        samples_own = not settings.frozen and config.native.weight > 0
        prompts = sources.stream(name, "native") if samples_own else None
        edge_prompts = {edge: sources.stream(edge.prompts, edge.name) for edge in edges}
        validation = sources.validation()
        sources.know_all_media()
        media = sources.media
    with world.watch.operation("startup.actor"), waiting("loading the model"):
        actor = _actor(config, settings, model_path, media)
    engine = sync = None
    if not settings.frozen:
        actor.give_memory(weights=False)  # the engine takes its share of what is free
        with world.watch.operation("startup.rollout"), waiting("starting vLLM"):
            engine = _engine(config, name, model_path, media)
        sync = WeightSync(actor, engine, config.weight_sync)
    router = Router(
        world,
        graph.links,
        encoded=media.encoded if media is not None and config.opd.ship_media else None,
        take_file=media.put_encoded if media is not None else None,
        vocab_size=actor.dims.vocab_size,
    )
    return Branch(
        name=name,
        config=config,
        settings=settings,
        world=world,
        graph=graph,
        router=router,
        actor=actor,
        engine=engine,
        sync=sync,
        grader=grader,
        objectives=objectives,
        prompts=prompts,
        edge_prompts=edge_prompts,
        splicer=Splicer(sources.tokenizer),
        media=media,
        validation=validation,
        run_dir=run_dir,
        samples=SampleLog(
            run_dir,
            name,
            config.logging.samples,
            sources.tokenizer,
            run_seed=config.run.seed,
            writes=world.is_branch_first,
        ),
        reference=actor.snapshot() if config.loss.kl_coefficient or config.opd.extrapolation != 1 else None,
    )


def _media_share(world: World, settings: BranchConfig) -> MediaShare | None:
    """Each rollout replica decodes what it will sample; None where there is only one."""
    size = settings.rollout.tensor_parallel_size
    if world.branch_size <= size:
        return None
    return MediaShare(
        index=world.branch_rank // size,
        count=world.branch_size // size,
        sends=world.branch_rank % size == 0,
        exchange=lambda found: world.branch_gather(found, "data.media"),
    )


def objectives_of(config: Config, branch: str, edges: Sequence[Edge]) -> dict[str, Objective]:
    """Objectives of a branch's components: its own rows, and those of every edge into it.

    Raises:
        ConfigError: a name that stands for nothing, or settings that make no sense for its objective.
    """

    def build(name: str, edge: Edge | None) -> Objective:
        factory: ObjectiveFactory = OBJECTIVES.load(
            name, "native.objective" if edge is None else "opd.objective"
        )
        return factory.of(Context(config=config, branch=branch, edge=edge))

    return {
        NATIVE: build(config.native.objective, None),
        **{edge.component: build(edge.objective, edge) for edge in edges},
    }


def _actor(
    config: Config, settings: BranchConfig, model_path: str, media: MediaLoader | None
) -> MegatronActor:
    return MegatronActor(
        model_path=model_path,
        parallel=settings.parallel,
        training=config.training,
        optimizer=None if settings.frozen else config.optimizer,
        dtype=model_dtype(config),
        max_tokens=config.model.max_sequence_tokens,
        temperature=settings.rollout.temperature,
        seed=config.run.seed,
        total_steps=num_steps(config.schedule) * config.training.num_mini_batches,
        precision=config.precision,
        memory=config.memory if uses_cuda(config) else None,
        freeze_vision=config.model.freeze_vision,
        features=lambda row: None if media is None else media.features(row.media),
    )


def _engine(config: Config, branch: str, model_path: str, media: MediaLoader | None) -> RolloutEngine:
    return RolloutEngine(
        model_path=model_path,
        config=config.branches[branch].rollout,
        branch=branch,
        run_id=os.environ.get("COPD_RUN_ID", "run"),
        dtype=model_dtype(config),
        max_tokens=config.model.max_sequence_tokens,
        seed=config.run.seed,
        media=media,
        can_sleep=config.memory.sleep_rollouts,
    )
