"""Settings of distillation that make no sense together are refused, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from copd_megatron.config import load_config, validate
from copd_megatron.config.graph import build_graph
from copd_megatron.errors import ConfigError
from tests.support.shapes import SHAPE

ROOT = Path(__file__).resolve().parents[1]
OWN = "{student: addition, teacher: addition, context: own_correct}"
FED = "{student: addition, teacher: addition, context: own_correct, peer: running_sums}"


def _problem(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(ROOT / "configs/two_branch_tiny.yaml", settings), None, SHAPE)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["opd.topology=custom", "opd.edges=[{student: addition, teacher: addition}]"],
            "learns nothing (delta is 0); name another teacher, or let it read more as a teacher",
        ),
        (
            ["opd.edges=[{student: addition, teacher: running_sums, peer: running_sums}]"],
            "gives feedback that nobody reads without a context",
        ),
        (
            ["opd.topology=custom", f"opd.edges=[{FED.replace('peer: running_sums', 'peer: addition')}]"],
            "'addition' is the student itself",
        ),
        (
            ["opd.topology=custom", f"opd.edges=[{FED}]", "branches.running_sums.frozen=true"],
            "its peer 'running_sums' is frozen and cannot write feedback",
        ),
        (["opd.gate.scope=prompt", "branches.running_sums.frozen=true"], "teacher 'running_sums' is frozen"),
        (["opd.objective=topk", "opd.calibration.margin=shift"], "opd.calibration.margin=shift changes"),
        (["opd.objective=full", "opd.extrapolation=1.25"], "opd.extrapolation=1.25 changes the advantages"),
        (["opd.objective=topk", "opd.outcome_weight=1"], "use objective sampled_token there"),
        (["opd.objective=topk", "opd.distribution.top_k=1000"], "1000 is more than the 260 tokens"),
        (["native.objective=topk"], "native.objective: 'topk' needs a teacher"),
        (["opd.objective=grpo"], "objective 'grpo' learns from rewards and asks its teacher nothing"),
        (
            ["opd.grade_responses=false", "opd.calibration.balance=1"],
            "opd.grade_responses: false, but opd.calibration depends on the responses' rewards",
        ),
        (["opd.grade_responses=false", "opd.gate.scope=pool"], "opd.gate depends on the responses' rewards"),
        (["opd.distribution.jsd_alpha=1"], "opd.distribution.jsd_alpha: 1.0 must be above 0 and below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], message: str) -> None:
    assert message in _problem(*settings)


@pytest.mark.parametrize("name", ["base", "merged"])
def test_a_branch_has_no_name_of_the_tables(name: str) -> None:
    config = load_config(ROOT / "configs/two_branch_tiny.yaml", [])
    config.branches[name] = config.branches.pop("addition")
    with pytest.raises(ConfigError, match=f"branches.{name}: '{name}' is what tables and exports call"):
        validate(config, None, SHAPE)


def test_one_branch_may_teach_itself_with_a_context() -> None:
    """SDPO: no second branch."""
    settings = ["opd.topology=custom", f"opd.edges=[{OWN}]"]
    config = load_config(ROOT / "configs/two_branch_tiny.yaml", settings)
    del config.branches["running_sums"]
    validate(config, None, SHAPE)
    graph = build_graph(config)
    assert [edge.name for edge in graph.edges] == ["addition<-addition"]
    assert graph.links.edges == (), "nothing crosses"
    assert "context own_correct" in graph.describe()


def test_a_peer_is_a_link_without_rows() -> None:
    settings = ["opd.topology=custom", f"opd.edges=[{FED}]"]
    config = load_config(ROOT / "configs/two_branch_tiny.yaml", settings)
    graph = build_graph(config)
    assert [edge.name for edge in graph.into("addition")] == ["addition<-addition"]
    assert [edge.name for edge in graph.links.edges] == ["addition<-running_sums"]
    assert graph.link("addition", "running_sums").weight == 0
    assert "feedback from running_sums" in graph.describe()
    both = f"{FED}, {{student: addition, teacher: running_sums}}"
    config = load_config(ROOT / "configs/two_branch_tiny.yaml", [*settings[:1], f"opd.edges=[{both}]"])
    links = build_graph(config).links.edges
    assert [(edge.name, edge.weight) for edge in links] == [("addition<-running_sums", 1.0)], (
        "one serves both"
    )
