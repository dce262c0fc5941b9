"""The distillation graph: who teaches whom, on whose prompts, with what weight.

An edge (student, teacher) says: the student samples responses to the edge's prompts, the teacher scores their
tokens, and the student trains on token advantages beta * (log pi_teacher - log pi_student) (Eq. 8). CoPD has
edges both ways between live branches; static OPD and MOPD have edges from frozen branches; experts and mixed
RLVR have none. The paper's text (section 3.3) exchanges between a hub and every spoke, 2 (K - 1) edges;
Algorithm 1 lets everyone teach everyone, K (K - 1) edges. Both coincide at K = 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from copd_megatron.config.schema import Config, EdgeConfig, Privilege, Topology
from copd_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One student learning from one teacher."""

    student: str
    teacher: str
    prompts: str
    """Branch whose prompts the student samples on; as a rule the teacher's."""
    beta: float
    """Factor on the token advantage (Eq. 8)."""
    num_prompts: int
    """Prompts per step."""
    num_generations: int
    """Samples per prompt."""
    objective: str = "sampled_token"
    """What the student's rows are made with (``copd_megatron/objectives``)."""
    weight: float = 1.0
    """Factor on the loss of the edge's rows; 0: none are sampled."""
    context: Privilege = Privilege.none
    """What the teacher reads besides the student's prompt."""
    peer: str | None = None
    """Branch whose feedback is part of the context."""

    @property
    def is_self(self) -> bool:
        """The branch is its own teacher, with more to read."""
        return self.student == self.teacher

    @property
    def name(self) -> str:
        """``image<-text``: student, then teacher. Unique in a graph; the key of metrics and reports."""
        return f"{self.student}<-{self.teacher}"

    @property
    def component(self) -> str:
        """Component of the loss that the edge's rows belong to: ``cross:<teacher>``."""
        return f"cross:{self.teacher}"

    @property
    def num_rows(self) -> int:
        """Sequences per step."""
        return self.num_prompts * self.num_generations


@dataclass(frozen=True)
class Graph:
    """The edges of a run, in an order that every rank shares."""

    branches: tuple[str, ...]
    """All branches, in configuration order, those without edges included."""
    edges: tuple[Edge, ...]

    def into(self, branch: str) -> tuple[Edge, ...]:
        """Edges in which ``branch`` is the student."""
        self._known(branch)
        return tuple(edge for edge in self.edges if edge.student == branch)

    def out_of(self, branch: str) -> tuple[Edge, ...]:
        """Edges in which ``branch`` teaches."""
        self._known(branch)
        return tuple(edge for edge in self.edges if edge.teacher == branch)

    @property
    def links(self) -> Graph:
        """What crosses between branches: all edges but those from a branch to itself, and a link from a
        student to every peer that gives it feedback."""
        links = {(edge.student, edge.teacher): edge for edge in self.edges if not edge.is_self}
        for edge in self.edges:
            if edge.peer is not None:
                links.setdefault((edge.student, edge.peer), _peer_link(edge, edge.peer))
        return Graph(self.branches, tuple(links.values()))

    def link(self, student: str, other: str) -> Edge:
        """The link over which ``student`` asks ``other``."""
        return next(edge for edge in self.links.edges if (edge.student, edge.teacher) == (student, other))

    def describe(self) -> str:
        """One line an edge, for the dry run."""
        if not self.edges:
            return "no distillation: every branch learns alone"
        count = f"{len(self.edges)} edge{'s' if len(self.edges) > 1 else ''}"
        lines = [f"{count} over {len(self.branches)} branches (student<-teacher):"]
        width = max(len(edge.name) for edge in self.edges)
        lines += [
            f"  {edge.name:<{width}}  {edge.objective}, weight {edge.weight:g}, beta {edge.beta:g}, "
            f"{edge.num_prompts} prompts of {edge.prompts} x {edge.num_generations} samples{_extras(edge)}"
            for edge in self.edges
        ]
        return "\n".join(lines)

    def _known(self, branch: str) -> None:
        if branch not in self.branches:
            raise KeyError(f"no branch {branch!r} in the graph; branches: {', '.join(self.branches)}")


def _extras(edge: Edge) -> str:
    """What a line of the dry run says of an edge's context."""
    if edge.context is Privilege.none:
        return ""
    return f", context {edge.context.value}" + (f", feedback from {edge.peer}" if edge.peer else "")


def _peer_link(edge: Edge, peer: str) -> Edge:
    """A link that carries questions and feedback, and no rows to learn from."""
    return Edge(
        student=edge.student, teacher=peer, prompts=edge.prompts, beta=0.0, num_prompts=edge.num_prompts,
        num_generations=edge.num_generations, objective="none", weight=0.0,
    )  # fmt: skip


def build_graph(config: Config) -> Graph:
    """The distillation graph that a configuration describes.

    Frozen branches never learn: ``hub_and_spoke`` and ``all_to_all`` leave out the edges into them. Edges
    come by student, then teacher, in the order of ``branches`` (``custom``: in the order given).

    Raises:
        ConfigError: unknown branch, self edge, frozen student, duplicate edge, or an override of an
            edge that the topology does not make; with the remedy.
    """
    branches = tuple(config.branches)
    opd = config.opd
    overrides = _by_pair(opd.edges, branches)
    if opd.topology is Topology.custom:
        pairs = list(overrides)
        for i, (student, _) in enumerate(pairs):
            if config.branches[student].frozen:
                raise ConfigError(
                    f"opd.edges[{i}].student: branch {student!r} is frozen and cannot learn; swap student "
                    f"and teacher, or set branches.{student}.frozen=false"
                )
    else:
        pairs = [
            (student, teacher)
            for student, teacher in _pairs(opd.topology, branches, _hub(config))
            if not config.branches[student].frozen
        ]
        for i, (student, teacher) in enumerate(overrides):
            if (student, teacher) not in pairs:
                made = ", ".join(f"{s}<-{t}" for s, t in pairs) or "none"
                raise ConfigError(
                    f"opd.edges[{i}] overrides {student}<-{teacher}, which opd.topology={opd.topology.value} "
                    f"does not make (edges: {made}); remove it, or list every edge under opd.topology=custom"
                )
    return Graph(branches, tuple(_edge(config, s, t, overrides.get((s, t))) for s, t in pairs))


def _pairs(topology: Topology, branches: Sequence[str], hub: str | None) -> Iterable[tuple[str, str]]:
    """(student, teacher) of the topologies that name no edges."""
    for student in branches:
        for teacher in branches:
            if student == teacher or topology is Topology.none:
                continue
            if topology is Topology.all_to_all or hub in (student, teacher):
                yield student, teacher


def _hub(config: Config) -> str | None:
    if config.opd.topology is not Topology.hub_and_spoke or not config.branches:
        return None
    if config.opd.hub is None:
        return next(iter(config.branches))
    return _branch(config.opd.hub, tuple(config.branches), "opd.hub")


def _by_pair(edges: Sequence[EdgeConfig], branches: tuple[str, ...]) -> dict[tuple[str, str], EdgeConfig]:
    """``opd.edges`` by (student, teacher), names checked."""
    by_pair: dict[tuple[str, str], EdgeConfig] = {}
    for i, edge in enumerate(edges):
        where = f"opd.edges[{i}]"
        student = _branch(edge.student, branches, f"{where}.student")
        teacher = _branch(edge.teacher, branches, f"{where}.teacher")
        if edge.prompts is not None:
            _branch(edge.prompts, branches, f"{where}.prompts")
        if student == teacher and edge.context is Privilege.none:
            raise ConfigError(
                f"{where}: student and teacher are both {student!r}, and a branch that scores its own tokens "
                f"learns nothing (delta is 0); name another teacher, or let it read more as a teacher, with "
                f"context: own_correct"
            )
        if edge.peer is not None:
            _check_peer(edge, _branch(edge.peer, branches, f"{where}.peer"), where)
        if (student, teacher) in by_pair:
            first = list(by_pair).index((student, teacher))
            raise ConfigError(
                f"{where} repeats {student}<-{teacher} of opd.edges[{first}]; keep one of them and put both "
                "batches into its num_prompts_per_step"
            )
        by_pair[student, teacher] = edge
    return by_pair


def _check_peer(edge: EdgeConfig, peer: str, where: str) -> None:
    if edge.context is Privilege.none:
        raise ConfigError(
            f"{where}.peer: {peer!r} gives feedback that nobody reads without a context; set context: "
            "own_correct, or peer: null"
        )
    if peer == edge.student:
        raise ConfigError(f"{where}.peer: {peer!r} is the student itself; name another branch")


def _edge(config: Config, student: str, teacher: str, override: EdgeConfig | None) -> Edge:
    """Resolve an edge: its own setting, else ``opd``'s, else the student branch's."""
    opd, own = config.opd, config.branches[student]
    given = override or EdgeConfig(student=student, teacher=teacher)
    return Edge(
        student=student,
        teacher=teacher,
        prompts=given.prompts or teacher,
        beta=_first(given.beta, opd.beta),
        num_prompts=_first(given.num_prompts_per_step, opd.num_prompts_per_step, own.num_prompts_per_step),
        num_generations=_first(opd.num_generations_per_prompt, own.num_generations_per_prompt),
        objective=given.objective or opd.objective,
        weight=_first(given.weight, opd.weight),
        context=given.context,
        peer=given.peer,
    )


def _first[T](*values: T | None) -> T:
    """The first value that is set."""
    return next(value for value in values if value is not None)


def _branch(name: str, branches: tuple[str, ...], where: str) -> str:
    if name not in branches:
        close = difflib.get_close_matches(name, branches, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{where}: no branch {name!r}; {hint}Branches: {', '.join(branches) or 'none'}")
    return name
