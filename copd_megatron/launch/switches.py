"""Which host is which node of a placement, so that branches that talk are near each other: pure arithmetic.

``placement`` says which ranks share a node. Here its nodes are given to hosts by the network's switches:

    cost = sum over branches (switches it is spread over - 1) weight_in
         + sum over edges (1 if no switch holds ranks of both)

A branch's own ranks exchange gradients and weights, gigabytes a step; an edge carries megabytes. So a branch
that fits on one switch is put on one, and then a spoke is put where its hub is. Branches are placed whole,
hub first, each on the switch with the least room that suffices, the hub's switch first; one that no switch
can hold takes the emptiest switches. The hub itself is tried on the tightest and on the emptiest switch.
Hosts whose switch is unknown count as one switch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from copd_megatron.config.graph import Edge
from copd_megatron.launch.placement import Placement
from copd_megatron.topology.layout import Layout

_WITHIN: Final = 100
"""Weight of a branch's own traffic, next to that of an edge."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of a job in the order of a placement's nodes, and how good that is."""

    names: tuple[str, ...]
    switches: Mapping[str, int]
    """Branch to number of switches that it is spread over."""
    far_edges: int
    """Edges between branches that share no switch."""

    @property
    def cost(self) -> int:
        """As in the formula above."""
        return _WITHIN * sum(count - 1 for count in self.switches.values()) + self.far_edges

    def describe(self) -> str:
        """One line for people."""
        spread = ", ".join(
            f"{name} on {count} switch{'es' if count > 1 else ''}" for name, count in self.switches.items()
        )
        far = f"; {self.far_edges} edges between branches on different switches" if self.far_edges else ""
        return f"{spread}{far}"


def arrange(
    placement: Placement,
    layout: Layout,
    hosts: Sequence[str],
    switch_of: Mapping[str, str],
    edges: Iterable[Edge] = (),
) -> Hosts:
    """Gives hosts to the nodes of a placement: the cheapest of the given order and those described above.

    Args:
        hosts: as many as the placement has nodes.
        switch_of: host to switch; hosts that are missing are on one unnamed switch.
        edges: who teaches whom.
    """
    links = [(edge.student, edge.teacher) for edge in edges]
    known = [switch_of.get(host, "") for host in hosts]
    members = _nodes_of(placement, layout)
    as_given = rated(tuple(hosts), known, members, links)
    tried = [as_given]
    for roomy in (False, True):
        order = _by_switch(members, known, links, roomy=roomy)
        tried.append(rated(tuple(hosts[i] for i in order), [known[i] for i in order], members, links))
    return min(tried, key=lambda one: one.cost)


def rated(
    names: tuple[str, ...],
    switches: Sequence[str],
    members: Mapping[str, Sequence[int]],
    links: Sequence[tuple[str, str]],
) -> Hosts:
    """Hosts in the order of nodes, with what that order costs.

    Args:
        switches: of every node.
        members: branch to its nodes.
        links: pairs of branches.
    """
    found = {branch: {switches[node] for node in nodes} for branch, nodes in members.items()}
    far = sum(not found[a] & found[b] for a, b in links)
    return Hosts(names=names, switches={branch: len(s) for branch, s in found.items()}, far_edges=far)


def _nodes_of(placement: Placement, layout: Layout) -> dict[str, list[int]]:
    """Branch to its nodes, ascending."""
    return {
        name: sorted({placement.node_of_rank[rank] for rank in layout.ranks_of(name)})
        for name in layout.branch_names
    }


def _by_switch(
    members: Mapping[str, Sequence[int]],
    known: Sequence[str],
    links: Sequence[tuple[str, str]],
    *,
    roomy: bool,
) -> list[int]:
    """Host number of every node. With ``roomy``, the first branch takes the emptiest switch."""
    free: dict[str, list[int]] = {}
    for number, switch in enumerate(known):
        free.setdefault(switch, []).append(number)
    host_of: dict[int, int] = {}
    degree = {name: sum(name in pair for pair in links) for name in members}
    for name in sorted(members, key=lambda branch: (-degree[branch], -len(members[branch]))):
        waiting = [node for node in members[name] if node not in host_of]
        near = {known[host_of[n]] for other in _partners(name, links) for n in members[other] if n in host_of}
        near |= {known[host_of[n]] for n in members[name] if n in host_of}
        wanted = len(known) if roomy and not host_of else len(waiting)
        for switch in _order(free, wanted, near):
            while waiting and free[switch]:
                host_of[waiting.pop(0)] = free[switch].pop(0)
    rest = [host for hosts in free.values() for host in hosts]
    return [host_of[node] if node in host_of else rest.pop(0) for node in range(len(known))]


def _partners(name: str, links: Sequence[tuple[str, str]]) -> set[str]:
    return {a if b == name else b for a, b in links if name in (a, b)} - {name}


def _order(free: Mapping[str, Sequence[int]], wanted: int, near: set[str]) -> list[str]:
    """Switches in the order in which a branch takes hosts: those that hold all of it, near ones first, then
    the tightest; else the emptiest first."""
    holds = [s for s in free if len(free[s]) >= wanted]
    holds.sort(key=lambda s: (s not in near, len(free[s])))
    others = sorted((s for s in free if s not in holds), key=lambda s: (s not in near, -len(free[s])))
    return [*holds, *others] if holds else sorted(free, key=lambda s: (-len(free[s]), s not in near))
