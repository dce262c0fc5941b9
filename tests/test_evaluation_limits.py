"""``copd eval`` gives the answers to each domain the room that the domain's own branch has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from copd_megatron.config import Config
from copd_megatron.config.schema import BranchConfig
from tests.support.rollouts import rollout


def two_branches(short: int, long: int) -> Config:
    config = Config(branches={"text": BranchConfig(), "image": BranchConfig()})
    for name, limit in (("text", short), ("image", long)):
        config.branches[name].rollout.max_new_tokens = limit
        config.branches[name].data.validation = [f"{name}.tar"]
    return config


class Engine:
    """Notes how it is asked to sample."""

    num_replicas, tp_rank = 1, 0

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_num_seqs=8)
        self.llm = SimpleNamespace(reset_prefix_cache=lambda: None)
        self.asked: dict[str, int | None] = {}

    def sample_share(self, part: Any, settings: Any, *, step: int, branch: str) -> Any:
        self.asked[branch] = settings.max_new_tokens
        return [rollout("4") for _ in part]

    def gather(self, mine: Any, part: Any, settings: Any) -> Any:
        return mine


def test_each_domain_has_its_own_limit() -> None:
    from copd_megatron.evaluation import models

    config, engine = two_branches(16, 512), Engine()
    prompt = rollout("4").prompt
    grader: Any = SimpleNamespace(grade=lambda rollouts: rollouts)
    missing = {"text": [prompt], "image": [prompt]}
    measured = models._measure(config, engine, dict.fromkeys(missing, grader), missing, "m")  # type: ignore[arg-type]
    assert len(list(measured)) == 2
    assert engine.asked == {"validation/text": 16, "validation/image": 512}


def test_verdicts_under_other_limits_are_others(tmp_path: Path) -> None:
    from copd_megatron.evaluation import models

    model: Any = SimpleNamespace(
        path=tmp_path, companions=tmp_path, source=SimpleNamespace(identity=lambda: "")
    )

    def settings(short: int, long: int) -> Any:
        config = two_branches(short, long)
        for branch in config.branches.values():
            branch.data.validation = []
        return models._settings(config, model)

    assert settings(16, 512) == settings(16, 512)
    assert settings(16, 512) != settings(16, 64)
