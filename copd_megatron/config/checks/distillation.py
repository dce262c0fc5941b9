"""Branches together: the schedule, the distillation graph, and what both ends of an edge must share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from copd_megatron.config.graph import Graph, build_graph
from copd_megatron.config.schema import Config, Gate, Margin, Privilege, Topology
from copd_megatron.errors import ConfigError
from copd_megatron.model.shape import ModelShape
from copd_megatron.plugins import OBJECTIVES, RECIPES


def problems(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """What is wrong between branches.

    Args:
        shapes: models by branch, as far as they are known.
    """
    yield from _schedule(config)
    yield from _hub(config)
    yield from _names(config)
    yield from _vocabularies(shapes)
    try:
        graph = build_graph(config)
    except ConfigError as error:
        yield str(error)
        return
    yield from _edges_exist(config, graph)
    # a recipe of one's own may not say it in so many words; the ranks ask what they have imported
    yield from distils_nothing(config, graph, distils=RECIPES.told(config.recipe, "distils") is not False)
    yield from _temperatures(config, graph)
    yield from _objectives_fit(config, graph)
    yield from _verdicts(config, graph)
    yield from _peers_sample(config, graph)
    yield from _lag(config, graph)
    yield from _ids(config, graph, shapes)


def _schedule(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.rlvr_steps == 0 and schedule.opd_steps == 0:
        yield "schedule: rlvr_steps and opd_steps are both 0, there is nothing to train; raise one"
    if all(branch.frozen for branch in config.branches.values()):
        yield "branches: every branch is frozen, there is nothing to train; set frozen: false for one"
    teaches_itself = any(edge.student == edge.teacher for edge in config.opd.edges)
    if schedule.opd_steps > 0 and len(config.branches) < 2 and not teaches_itself:
        yield (
            f"schedule.opd_steps: {schedule.opd_steps} with {len(config.branches)} branch: distillation "
            f"needs a teacher; add a branch, let it teach itself (opd.topology=custom, an edge with a "
            f"context) or set schedule.opd_steps=0"
        )
    if config.native.weight == 0 and schedule.rlvr_steps > 0:
        yield (
            f"native.weight: 0 leaves nothing to learn in Phase I, but schedule.rlvr_steps="
            f"{schedule.rlvr_steps}; set schedule.rlvr_steps=0 for pure distillation"
        )


def _hub(config: Config) -> Iterator[str]:
    opd = config.opd
    if opd.hub is not None and opd.topology is not Topology.hub_and_spoke:
        yield (
            f"opd.hub: {opd.hub!r} has no effect with opd.topology {opd.topology.value}, which has no hub; "
            f"set opd.topology=hub_and_spoke, or opd.hub=null"
        )


def _names(config: Config) -> Iterator[str]:
    """The recipe and the objectives that the settings name."""
    named = [
        (RECIPES, config.recipe, "recipe"),
        (OBJECTIVES, config.native.objective, "native.objective"),
        (OBJECTIVES, config.opd.objective, "opd.objective"),
    ]
    named += [
        (OBJECTIVES, edge.objective, f"opd.edges[{i}].objective")
        for i, edge in enumerate(config.opd.edges)
        if edge.objective is not None
    ]
    for room, name, key in named:
        try:
            room.check(name, key)
        except ConfigError as error:
            yield str(error)


def _vocabularies(shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """Teachers score the student's token ids: one vocabulary for all."""
    for (first, a), (second, b) in pairwise(shapes.items()):
        if a.vocab_size != b.vocab_size:
            yield (
                f"branches.{second}.model_path: vocabulary of {b.vocab_size} tokens, branches.{first} has "
                f"{a.vocab_size}; branches exchange token ids, so all need the same tokenizer"
            )


def _edges_exist(config: Config, graph: Graph) -> Iterator[str]:
    steps = config.schedule.opd_steps
    if steps > 0 and len(config.branches) > 1 and not graph.edges:
        yield (
            f"schedule.opd_steps: {steps} with opd.topology {config.opd.topology.value}, which makes no edge "
            f"here, would distil nothing; set schedule.opd_steps=0 (its steps can go into rlvr_steps), or "
            f"choose another topology"
        )


def distils_nothing(config: Config, graph: Graph, *, distils: bool) -> Iterator[str]:
    """Steps of distillation whose edges no stage of the recipe would use.

    Args:
        distils: whether a stage of the recipe makes rows of edges.
    """
    if not distils and config.schedule.opd_steps and graph.edges:
        yield (
            f"recipe={config.recipe} has no stage that distils, but the schedule has "
            f"{config.schedule.opd_steps} steps of distillation a cycle; set schedule.opd_steps=0 or "
            "opd.topology=none, or choose another recipe"
        )


_OF_EDGES = ("sampled_token", "topk", "full")
_DISTRIBUTIONS = ("topk", "full")
"""Objectives that compare whole distributions."""


def _objectives_fit(config: Config, graph: Graph) -> Iterator[str]:
    """Objectives stand where they belong, and what is set has an effect on them."""
    opd = config.opd
    if config.native.objective in _OF_EDGES:
        yield (
            f"native.objective: {config.native.objective!r} needs a teacher, which a branch's own rows do "
            f"not have; use native.objective=grpo, and this one as opd.objective"
        )
    for edge in graph.edges:
        if edge.objective == "grpo":
            yield (
                f"edge {edge.name}: objective 'grpo' learns from rewards and asks its teacher nothing; use "
                f"{', '.join(_OF_EDGES)} or one of your own"
            )
    distributions = [edge.name for edge in graph.edges if edge.objective in _DISTRIBUTIONS and edge.weight]
    if not distributions:
        return
    scalars = {
        "opd.calibration.margin=shift": opd.calibration.margin is Margin.shift,
        f"opd.extrapolation={opd.extrapolation:g}": opd.extrapolation != 1,
        f"opd.outcome_weight={opd.outcome_weight:g}": opd.outcome_weight != 0,
        f"opd.delta_clip={opd.delta_clip}": opd.delta_clip is not None,
    }
    for setting, is_on in scalars.items():
        if is_on:
            yield (
                f"{setting} changes the advantages of sampled tokens, and {', '.join(distributions)} compare "
                f"distributions, which have none; use objective sampled_token there, or switch it off"
            )


def _verdicts(config: Config, graph: Graph) -> Iterator[str]:
    """What reads the rewards of cross responses needs them graded."""
    opd = config.opd
    readers = {
        "opd.calibration": opd.calibration.needs_verdicts,
        "opd.outcome_weight": opd.outcome_weight != 0,
        "opd.gate": opd.gate.scope is not Gate.none,
        "opd.edges[].context": any(edge.context is not Privilege.none for edge in graph.edges),
    }
    needed = [name for name, reads in readers.items() if reads]
    if needed and not opd.grade_responses:
        yield (
            f"opd.grade_responses: false, but {', '.join(needed)} depends on the responses' rewards; set "
            f"opd.grade_responses=true, or switch {'it' if len(needed) == 1 else 'them'} off"
        )


def _peers_sample(config: Config, graph: Graph) -> Iterator[str]:
    """Branches that are asked to write must be able to sample; frozen ones only score."""
    for edge in graph.edges:
        if edge.peer is not None and config.branches[edge.peer].frozen:
            yield (
                f"edge {edge.name}: its peer {edge.peer!r} is frozen and cannot write feedback; set "
                f"branches.{edge.peer}.frozen=false, or peer: null"
            )
        gated = config.opd.gate.scope is not Gate.none and not edge.is_self
        if gated and config.branches[edge.teacher].frozen:
            yield (
                f"opd.gate.scope: {config.opd.gate.scope.value}, but teacher {edge.teacher!r} is frozen and "
                f"cannot answer the prompts it would teach on; set opd.gate.scope=none"
            )


_MOST_LAG = 1


def _lag(config: Config, graph: Graph) -> Iterator[str]:
    """Teachers that may lag have something to answer, and nothing is asked that cannot wait for a step."""
    opd, lag = config.opd, config.opd.max_teacher_lag
    if not lag:
        return
    if lag > _MOST_LAG:
        yield (
            f"opd.max_teacher_lag: {lag} is more than {_MOST_LAG}: with 1, each branch can already be half a "
            f"step ahead at any time; more makes the samples older and hides hardly more waiting; use 1"
        )
    if lag > config.training.max_weight_lag:
        yield (
            f"opd.max_teacher_lag: {lag} trains on responses that weights {lag} update older have sampled, "
            f"training.max_weight_lag={config.training.max_weight_lag} forbids it; set "
            f"training.max_weight_lag={lag}"
        )
    if not graph.links.edges:
        yield (
            f"opd.max_teacher_lag: {lag}, but nothing crosses between branches here, so nobody waits for a "
            f"teacher; set opd.max_teacher_lag=0"
        )
    schedule = config.schedule
    if max(schedule.opd_steps, schedule.rlvr_steps if opd.behaviour.num_states else 0) < 2:
        yield (
            f"opd.max_teacher_lag: {lag} has no effect with schedule.opd_steps={schedule.opd_steps}: "
            f"branches meet at the first step of a phase, and can be apart from its second step on; set "
            f"opd.max_teacher_lag=0, or longer phases"
        )
    waits = {
        f"opd.gate.scope={opd.gate.scope.value}": opd.gate.scope is not Gate.none,
        "opd.edges[].peer": any(edge.peer is not None for edge in graph.edges),
    }
    for setting, is_on in waits.items():
        if is_on:
            yield (
                f"opd.max_teacher_lag: {lag} with {setting}, which has other branches write in the same step "
                f"and waits for them, so nobody can be ahead; set opd.max_teacher_lag=0, or switch it off"
            )


def _ids(config: Config, graph: Graph, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    """As many likeliest ids as there are."""
    smallest = min((shape.vocab_size for shape in shapes.values()), default=None)
    asked = config.opd.distribution.top_k
    uses = any(edge.objective == "topk" for edge in graph.edges)
    if smallest is not None and uses and asked > smallest:
        yield (
            f"opd.distribution.top_k: {asked} is more than the {smallest} tokens of the vocabulary; lower it "
            f"or use opd.objective=full"
        )


def _temperatures(config: Config, graph: Graph) -> Iterator[str]:
    """Log-probabilities that are subtracted from each other are those of one temperature."""
    if config.schedule.opd_steps == 0 and config.opd.behaviour.num_states == 0:
        return
    pairs = {frozenset((edge.student, edge.teacher)): edge for edge in graph.edges}
    for edge in pairs.values():  # the two directions of a pair have the same fault
        student = config.branches[edge.student].rollout.temperature
        teacher = config.branches[edge.teacher].rollout.temperature
        if student != teacher:
            yield (
                f"branches.{edge.teacher}.rollout.temperature: {teacher:g}, but its student {edge.student} "
                f"samples at {student:g}: every branch computes log-probabilities at its own temperature, so "
                f"log pi_teacher - log pi_student (Eq. 8), overlap and KL would compare two differently "
                f"sharpened distributions and be off even for equal models; give both the same temperature"
            )
