"""The exchange plan, without processes: coverage, balance, determinism, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.graph import Edge, Graph, build_graph
from copd_megatron.config.schema import BranchConfig, Config, OPDConfig, Topology
from copd_megatron.opd.plan import MOST_LANES, plan_exchange, split_rows
from copd_megatron.planner.traffic import edge_count, router_bytes

TOPOLOGIES = [Topology.hub_and_spoke, Topology.all_to_all]


def _graph(num_branches: int, topology: Topology) -> Graph:
    branches = {
        f"b{i}": BranchConfig(num_prompts_per_step=4, num_generations_per_prompt=2)
        for i in range(num_branches)
    }
    return build_graph(Config(branches=branches, opd=OPDConfig(topology=topology)))


def _ranks(sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    ranks, first = {}, 0
    for i, size in enumerate(sizes):
        ranks[f"b{i}"] = tuple(range(first, first + size))
        first += size
    return ranks


def _check(graph: Graph, branch_ranks: Mapping[str, Sequence[int]]) -> None:
    plan = plan_exchange(graph.edges, branch_ranks)
    assert plan == plan_exchange(graph.edges, branch_ranks), "every rank must compute the same plan"
    assert tuple(plan.lanes) == graph.edges
    for edge, lanes in plan.lanes.items():
        sizes = len(branch_ranks[edge.student]), len(branch_ranks[edge.teacher])
        assert len(lanes) == min(*sizes, MOST_LANES)
        assert [lane.index for lane in lanes] == list(range(len(lanes)))
        assert {lane.edge for lane in lanes} == {edge}
        assert {lane.source for lane in lanes} <= set(branch_ranks[edge.student])
        assert {lane.destination for lane in lanes} <= set(branch_ranks[edge.teacher])
        # No rank serves two lanes of an edge: the router's receive relies on it.
        assert len({lane.source for lane in lanes}) == len({lane.destination for lane in lanes}) == len(lanes)
    everyone = [rank for ranks in branch_ranks.values() for rank in ranks]
    all_lanes = [lane for lanes in plan.lanes.values() for lane in lanes]
    sends = [lane for rank in everyone for lane in plan.sends_of(rank)]
    receives = [lane for rank in everyone for lane in plan.receives_of(rank)]
    assert Counter(map(id, sends)) == Counter(map(id, receives)) == Counter(map(id, all_lanes))
    for rank in everyone:
        assert all(lane.source == rank != lane.destination for lane in plan.sends_of(rank))
        assert all(lane.destination == rank != lane.source for lane in plan.receives_of(rank))
    for ranks in branch_ranks.values():
        load = [len(plan.sends_of(rank)) + len(plan.receives_of(rank)) for rank in ranks]
        assert max(load) - min(load) <= 1, "lane ends must be spread over a branch's ranks"


@pytest.mark.parametrize("num_branches", range(2, 7))
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("sizes", [(1,) * 6, (2,) * 6, (8, 1, 2, 4, 3, 5), (1, 8, 8, 2, 6, 7)])
def test_every_edge_is_covered_once_by_balanced_lanes(
    num_branches: int, topology: Topology, sizes: tuple[int, ...]
) -> None:
    _check(_graph(num_branches, topology), _ranks(sizes[:num_branches]))


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), topology=st.sampled_from(TOPOLOGIES))
def test_any_sizes(sizes: list[int], topology: Topology) -> None:
    _check(_graph(len(sizes), topology), _ranks(sizes))


def test_a_hub_uses_another_rank_for_each_spoke() -> None:
    graph = _graph(5, Topology.hub_and_spoke)
    plan = plan_exchange(graph.edges, _ranks((8, 1, 1, 1, 1)))
    hub_ends = [lane.source if edge.student == "b0" else lane.destination
                for edge, lanes in plan.lanes.items() for lane in lanes]  # fmt: skip
    assert sorted(hub_ends) == list(range(8))


def test_branches_without_edges_have_nothing_to_do() -> None:
    plan = plan_exchange(_graph(2, Topology.all_to_all).edges, _ranks((2, 2, 3)))
    for rank in (4, 5, 6):
        assert plan.sends_of(rank) == plan.receives_of(rank) == ()


def test_an_edge_between_branches_that_share_ranks_is_refused() -> None:
    edge = Edge(student="a", teacher="b", prompts="b", beta=1.0, num_prompts=1, num_generations=1)
    with pytest.raises(ValueError, match=r"edge a<-b: ranks \[0, 1\] and \[1, 2\] must be disjoint"):
        plan_exchange([edge], {"a": (0, 1), "b": (1, 2)})
    with pytest.raises(ValueError, match="not empty"):
        plan_exchange([edge], {"a": (0, 1), "b": ()})


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 5000), max_size=60), num_lanes=st.integers(1, 9))
def test_rows_are_split_once_each_and_balanced_by_tokens(lengths: list[int], num_lanes: int) -> None:
    lanes = split_rows(lengths, num_lanes)
    assert lanes == split_rows(lengths, num_lanes)
    assert len(lanes) == num_lanes
    assert sorted(i for lane in lanes for i in lane) == list(range(len(lengths)))
    assert all(list(lane) == sorted(lane) for lane in lanes)
    loads = [sum(lengths[i] for i in lane) for lane in lanes]
    assert max(loads) <= sum(lengths) / num_lanes + max(lengths, default=0)


def test_no_lanes_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_lanes is 0"):
        split_rows([1], 0)


def test_router_bytes_is_four_a_token_out_and_four_a_logprob_back() -> None:
    graph = _graph(3, Topology.hub_and_spoke)
    rows = 4 * 8 // 4
    assert router_bytes(graph.edges, sequence_tokens=100, response_tokens=60) == 4 * rows * (4 * 100 + 4 * 60)
    with_states = router_bytes(
        graph.edges, sequence_tokens=100, response_tokens=60, num_states=5, vocab_size=1000
    )
    assert with_states == 4 * (rows * 640 + 5 * (4 + 4000))


def test_hub_and_spoke_costs_a_kth_of_all_to_all_for_many_branches() -> None:
    for k in range(2, 7):
        cost = {
            t: router_bytes(_graph(k, t).edges, sequence_tokens=10, response_tokens=5) for t in TOPOLOGIES
        }
        assert cost[Topology.hub_and_spoke] * k == cost[Topology.all_to_all] * 2
        assert edge_count(Topology.hub_and_spoke, k) == 2 * (k - 1)
        assert edge_count(Topology.all_to_all, k) == k * (k - 1)
    with pytest.raises(ValueError, match="custom"):
        edge_count(Topology.custom, 3)
