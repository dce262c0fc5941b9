"""The distillation graph: topologies, overrides, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from copd_megatron.config.graph import build_graph
from copd_megatron.config.schema import BranchConfig, Config, EdgeConfig, OPDConfig, Topology
from copd_megatron.errors import ConfigError
from copd_megatron.planner.traffic import edge_count


def _config(*branches: str, frozen: tuple[str, ...] = (), **opd: Any) -> Config:
    return Config(
        branches={name: BranchConfig(frozen=name in frozen, num_prompts_per_step=16) for name in branches},
        opd=OPDConfig(**opd),
    )


def _names(config: Config) -> list[str]:
    return [edge.name for edge in build_graph(config).edges]


def test_hub_and_spoke_exchanges_between_the_first_branch_and_every_other() -> None:
    assert _names(_config("text", "image", "video")) == [
        "text<-image", "text<-video", "image<-text", "video<-text",
    ]  # fmt: skip
    assert _names(_config("text", "image", "video", hub="image")) == [
        "text<-image", "image<-text", "image<-video", "video<-image",
    ]  # fmt: skip


def test_all_to_all_and_none() -> None:
    assert _names(_config("a", "b", "c", topology=Topology.all_to_all)) == [
        "a<-b", "a<-c", "b<-a", "b<-c", "c<-a", "c<-b",
    ]  # fmt: skip
    lonely = build_graph(_config("a", "b", topology=Topology.none))
    assert lonely.edges == ()
    assert lonely.describe() == "no distillation: every branch learns alone"
    assert build_graph(_config("only")).edges == ()


@pytest.mark.parametrize("num_branches", range(1, 7))
@pytest.mark.parametrize("topology", [Topology.none, Topology.hub_and_spoke, Topology.all_to_all])
def test_number_of_edges(num_branches: int, topology: Topology) -> None:
    names = [f"b{i}" for i in range(num_branches)]
    graph = build_graph(_config(*names, topology=topology))
    assert len(graph.edges) == edge_count(topology, num_branches)
    assert len({edge.name for edge in graph.edges}) == len(graph.edges)
    if num_branches == 2 and topology is Topology.all_to_all:
        assert graph == build_graph(_config(*names)), "both topologies coincide at two branches"


def test_into_and_out_of_are_the_two_views_of_the_edges() -> None:
    graph = build_graph(_config("text", "image", "video"))
    assert [e.teacher for e in graph.into("text")] == ["image", "video"]
    assert [e.student for e in graph.out_of("text")] == ["image", "video"]
    assert [e.name for e in graph.into("video")] == ["video<-text"]
    with pytest.raises(KeyError, match="no branch 'audio'"):
        graph.into("audio")


def test_settings_come_from_the_edge_then_opd_then_the_student() -> None:
    config = _config(
        "text", "image",
        beta=0.5,
        num_generations_per_prompt=4,
        edges=[
            EdgeConfig(student="image", teacher="text", beta=2.0, num_prompts_per_step=3, prompts="image"),
        ],
    )  # fmt: skip
    config.branches["text"].num_prompts_per_step = 11
    text_edge, image_edge = build_graph(config).edges
    assert (text_edge.beta, text_edge.num_prompts, text_edge.num_generations) == (0.5, 11, 4)
    assert text_edge.prompts == "image", "by default the teacher's prompts"
    assert (image_edge.beta, image_edge.num_prompts, image_edge.prompts) == (2.0, 3, "image")
    assert image_edge.num_rows == 12
    config.opd.num_prompts_per_step = 7
    config.opd.num_generations_per_prompt = None
    text_edge, image_edge = build_graph(config).edges
    assert (text_edge.num_prompts, text_edge.num_generations) == (7, 8)
    assert image_edge.num_prompts == 3


def test_frozen_branches_teach_but_never_learn() -> None:
    assert _names(_config("text", "expert", frozen=("expert",))) == ["text<-expert"]
    config = _config("text", "expert", frozen=("expert",), topology=Topology.custom)
    config.opd.edges = [EdgeConfig(student="expert", teacher="text")]
    with pytest.raises(ConfigError, match=r"opd\.edges\[0\]\.student: branch 'expert' is frozen .* swap"):
        build_graph(config)


def test_custom_keeps_the_given_order() -> None:
    edges = [EdgeConfig(student="c", teacher="a"), EdgeConfig(student="a", teacher="b")]
    graph = build_graph(_config("a", "b", "c", topology=Topology.custom, edges=edges))
    assert [edge.name for edge in graph.edges] == ["c<-a", "a<-b"]
    assert "c<-a  sampled_token, weight 1, beta 1, 16 prompts of a x 8 samples" in graph.describe()


@pytest.mark.parametrize(
    ("opd", "message"),
    [
        ({"hub": "txt"}, r"opd\.hub: no branch 'txt'; did you mean 'text'\? Branches: text, image, video"),
        (
            {"edges": [EdgeConfig(student="text", teacher="imag")]},
            r"opd\.edges\[0\]\.teacher: no branch 'imag'; did you mean 'image'",
        ),
        ({"edges": [EdgeConfig(student="text", teacher="image", prompts="x")]}, r"opd\.edges\[0\]\.prompts"),
        (
            {"edges": [EdgeConfig(student="text", teacher="text")], "topology": Topology.custom},
            r"opd\.edges\[0\]: student and teacher are both 'text'",
        ),
        (
            {
                "edges": [EdgeConfig(student="text", teacher="image") for _ in range(2)],
                "topology": Topology.custom,
            },
            r"opd\.edges\[1\] repeats text<-image of opd\.edges\[0\]",
        ),
        (
            {"edges": [EdgeConfig(student="image", teacher="video")]},
            r"opd\.edges\[0\] overrides image<-video, which opd\.topology=hub_and_spoke does not make "
            r"\(edges: text<-image, .*opd\.topology=custom",
        ),
        (
            {"edges": [EdgeConfig(student="text", teacher="image")], "topology": Topology.none},
            r"opd\.topology=none does not make \(edges: none\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_a_graph_is_refused_with_the_remedy(opd: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_graph(_config("text", "image", "video", **opd))
