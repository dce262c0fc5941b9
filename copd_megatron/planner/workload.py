"""What a branch does in a step: which rows it samples, scores, answers for others and trains on. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from copd_megatron.config.graph import Edge, Graph
from copd_megatron.config.schema import Config
from copd_megatron.planner.lengths import Lengths

_STATES_PER_PROBE = 8
"""As ``branch/probes.py`` spreads them over rows."""


@dataclass(frozen=True, kw_only=True)
class BranchLengths:
    """Of a branch's prompts and of the responses to them."""

    prompt: Lengths
    response: Lengths
    media_tokens: float = 0.0
    """Of a mean prompt's tokens, those of images and videos."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sequences of one kind in a step."""

    count: float
    group: int
    """Responses to one prompt."""
    lengths: BranchLengths

    @property
    def tokens(self) -> float:
        """Of prompts and responses, over all rows."""
        return self.count * (self.lengths.prompt.average + self.lengths.response.average)

    @property
    def response_tokens(self) -> float:
        return self.count * self.lengths.response.average

    def prompts(self, parts: int) -> float:
        """Different ones in each of ``parts`` random parts of the rows, summed over the parts: in a part are
        those of which at least one of ``group`` rows is."""
        return self.count / self.group * parts * (1 - (1 - 1 / parts) ** self.group)

    @property
    def squares(self) -> float:
        """Sum of the squared row lengths: prompt and response vary independently."""
        prompt, response = self.lengths.prompt, self.lengths.response
        return self.count * (prompt.square + 2 * prompt.average * response.average + response.square)

    def of(self, count: float) -> Rows:
        """Rows of the same kind, ``count`` of them."""
        return Rows(count=count, group=self.group, lengths=self.lengths)


@dataclass(frozen=True, kw_only=True)
class BranchWork:
    """One branch's rows in one step."""

    sampled: tuple[Rows, ...] = ()
    trained: tuple[Rows, ...] = ()
    scored: tuple[Rows, ...] = ()
    """Forward passes over rows of its own."""
    taught: tuple[Rows, ...] = ()
    """Forward passes over rows of others, as their teacher."""
    asked: tuple[Rows, ...] = ()
    """Rows that it sends to its teachers."""


def branch_work(
    config: Config, graph: Graph, name: str, lengths: Mapping[str, BranchLengths], *, opd: bool
) -> BranchWork:
    """A branch's rows in a step of Phase I, or of Phase II (``opd``).

    Args:
        lengths: of every branch's prompts.
    """
    branch = config.branches[name]
    native: tuple[Rows, ...] = ()
    if not branch.frozen and config.native.weight:
        count = branch.num_prompts_per_step * branch.num_generations_per_prompt
        native = (Rows(count=count, group=branch.num_generations_per_prompt, lengths=lengths[name]),)
    learning, teaching = graph.into(name), graph.out_of(name)
    cross = tuple(_edge_rows(edge, lengths) for edge in learning if opd and edge.weight)
    answered = tuple(_edge_rows(edge, lengths) for edge in teaching if opd and edge.weight)
    probes = () if branch.frozen else _probes(config, native or cross)  # scored even if nobody is asked
    asked_probes = tuple(
        rows for edge in teaching for rows in _probes(config, _visited(config, edge, lengths, opd=opd))
    )
    return BranchWork(
        sampled=(*native, *_with_over_sampling(branch.rollout.over_sampling, native), *cross),
        trained=(*native, *cross),
        scored=(*_own_scores(config, native, cross), *probes),
        taught=(*answered, *asked_probes),
        asked=(*cross, *(rows for _ in learning for rows in probes)),
    )


def _edge_rows(edge: Edge, lengths: Mapping[str, BranchLengths]) -> Rows:
    return Rows(count=edge.num_rows, group=edge.num_generations, lengths=lengths[edge.prompts])


def _with_over_sampling(share: float, native: tuple[Rows, ...]) -> tuple[Rows, ...]:
    return tuple(rows.of(rows.count * share) for rows in native) if share else ()


def _own_scores(config: Config, native: tuple[Rows, ...], cross: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """Passes over native rows where several mini-batches or the KL term need them; over cross rows always,
    and once more where the base model is asked."""
    of_native = (config.training.num_mini_batches > 1) + (config.loss.kl_coefficient > 0)
    of_cross = 1 + (config.opd.extrapolation != 1)
    return native * of_native + cross * of_cross


def _visited(
    config: Config, edge: Edge, lengths: Mapping[str, BranchLengths], *, opd: bool
) -> tuple[Rows, ...]:
    """The rows of a student among which its probes are."""
    student = config.branches[edge.student]
    if config.native.weight:
        count = student.num_prompts_per_step * student.num_generations_per_prompt
        return (Rows(count=count, group=1, lengths=lengths[edge.student]),)
    return (_edge_rows(edge, lengths),) if opd and edge.weight else ()


def _probes(config: Config, visited: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """The rows on which behaviour is measured, as a mean over steps."""
    options = config.opd.behaviour
    if not options.num_states or not visited:
        return ()
    rows = visited[0]
    per_row = max(1.0, min(_STATES_PER_PROBE, rows.lengths.response.average))
    count = min(rows.count, -(-options.num_states // per_row)) / options.every_steps
    return (rows.of(count),)
