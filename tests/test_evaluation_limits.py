"""``copd eval`` answers each domain as the domain's own branch would: length, stop strings, engine."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from copd_megatron.config import Config
from copd_megatron.config.schema import BranchConfig, RolloutConfig, RolloutQuantization
from copd_megatron.errors import ConfigError
from tests.support.rollouts import rollout

OTHER: dict[str, Any] = {
    "quantization": RolloutQuantization.fp8,
    "tensor_parallel_size": 2,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "stop": ["x"],
}
"""Values other than the defaults; 1 for the other settings."""
PER_REQUEST = {"max_new_tokens", "stop"}
OF_TRAINING = {"temperature", "top_p", "top_k", "over_sampling", "partial_rollouts"}
"""``evaluation`` has a temperature of its own, and samples from all tokens."""


def two_branches(short: int, long: int) -> Config:
    config = Config(branches={"text": BranchConfig(), "image": BranchConfig()})
    for name, limit in (("text", short), ("image", long)):
        config.branches[name].rollout.max_new_tokens = limit
        config.branches[name].rollout.stop = [f"</{name}>"]
        config.branches[name].data.validation = [f"{name}.tar"]
    return config


class Engine:
    """Notes how it is asked to sample."""

    num_replicas, tp_rank = 1, 0

    def __init__(self) -> None:
        self.config = SimpleNamespace(max_num_seqs=8)
        self.llm = SimpleNamespace(reset_prefix_cache=lambda: None)
        self.asked: dict[str, tuple[int | None, tuple[str, ...] | None]] = {}

    def sample_share(self, part: Any, settings: Any, *, step: int, branch: str, listener: Any) -> Any:
        self.asked[branch] = settings.max_new_tokens, settings.stop
        return [rollout("4") for _ in part]

    def gather(self, mine: Any, part: Any, settings: Any) -> Any:
        return mine


def test_each_domain_has_its_own_limit_and_stop_strings() -> None:
    from copd_megatron.evaluation import models

    config, engine = two_branches(16, 512), Engine()
    prompt = rollout("4").prompt
    grading = SimpleNamespace(finish=lambda rollouts: rollouts)
    grader: Any = SimpleNamespace(begin=lambda: contextlib.nullcontext(grading))
    missing = {"text": [prompt], "image": [prompt]}
    measured = models._measure(config, engine, dict.fromkeys(missing, grader), missing, "m")  # type: ignore[arg-type]
    assert len(list(measured)) == 2
    assert engine.asked == {
        "validation/text": (16, ("</text>",)),
        "validation/image": (512, ("</image>",)),
    }


@pytest.mark.parametrize("field", fields(RolloutConfig), ids=lambda field: field.name)
def test_domains_share_an_engine_only_where_their_branches_want_the_same(field: Any) -> None:
    from copd_megatron.evaluation import models

    config = two_branches(16, 512)
    domains = ["text", "image"]
    assert [names for _, names in models.engines(config, domains)] == [domains]
    value = OTHER.get(field.name, 1)
    setattr(config.branches["image"].rollout, field.name, value)
    groups = models.engines(config, domains)
    asked_for, _ = groups[-1]
    if field.name in models._ENGINE_SETTINGS:
        assert [names for _, names in groups] == [["text"], ["image"]]
        assert getattr(asked_for, field.name) == value
    else:
        assert len(groups) == 1
        assert field.name in PER_REQUEST | OF_TRAINING, "a new setting: where does an evaluation use it?"


def test_ranks_that_cannot_make_an_engine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from copd_megatron.evaluation import engine

    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 2 does not divide the 3 ranks of this"):
        engine.start_engine(
            Config(), RolloutConfig(tensor_parallel_size=2), "m", name="eval", run_id="x", media=None
        )


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
    config = two_branches(16, 512)
    for branch in config.branches.values():
        branch.data.validation = []
    before = models._settings(config, model)
    for change in ({"stop": ["x"]}, {"quantization": RolloutQuantization.fp8}):
        other = copy.deepcopy(config)
        for name, value in change.items():
            setattr(other.branches["image"].rollout, name, value)
        assert models._settings(other, model) != before
