"""Every setting has a text and sane bounds; what a person types is what the run gets."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config import Config, load_config, schema, validate
from copd_megatron.config.bounds import Bounds, number, out_of_bounds
from copd_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs/two_branch_tiny.yaml"


def _documented() -> dict[str, dict[str, str]]:
    """Class to setting to the string that stands beneath it."""
    texts: dict[str, dict[str, str]] = {}
    for path in Path(schema.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            found = texts.setdefault(node.name, {})
            for setting, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name):
                    constant = below.value if isinstance(below, ast.Expr) else None
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                        found[setting.target.id] = constant.value
    return texts


def _sections(section: type[Any] = Config) -> Iterator[type[Any]]:
    """The dataclasses that the settings are made of."""
    yield section
    for hint in typing.get_type_hints(section).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from _sections(part)


def test_every_setting_has_a_text() -> None:
    texts = _documented()
    sections = set(_sections())
    assert len(sections) > 20
    missing = [
        f"{section.__name__}.{setting.name}"
        for section in sections
        for setting in dataclasses.fields(section)
        if len(texts[section.__name__].get(setting.name, "")) < 4
    ]
    assert not missing, missing


@dataclasses.dataclass(kw_only=True)
class _Inner:
    share: float = number(0.5, above=0, at_most=1)
    count: int | None = number(None, at_least=1)


@dataclasses.dataclass(kw_only=True)
class _Outer:
    free: float = 1.0
    flag: bool = True
    inner: _Inner = dataclasses.field(default_factory=_Inner)
    named: dict[str, _Inner] = dataclasses.field(default_factory=dict)
    listed: list[_Inner] = dataclasses.field(default_factory=list)


def test_bounds_are_found_wherever_they_stand() -> None:
    assert list(out_of_bounds(_Outer())) == []
    outer = _Outer(
        free=float("inf"),
        inner=_Inner(share=0.0),
        named={"a": _Inner(count=0)},
        listed=[_Inner(), _Inner(share=float("nan"))],
    )
    assert list(out_of_bounds(outer, "run")) == [
        "run.free: inf must be a finite number",
        "run.inner.share: 0.0 must be above 0 and at most 1",
        "run.named.a.count: 0 must be at least 1",
        "run.listed[1].share: nan must be a finite number, above 0 and at most 1",
    ]


@settings(deadline=None)
@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5))
def test_a_number_passes_if_and_only_if_its_bounds_hold(value: float, low: float, high: float) -> None:
    bounds = Bounds(at_least=low, at_most=high)
    section = dataclasses.make_dataclass("Made", [("x", float, number(0.0, at_least=low, at_most=high))])(
        value
    )
    assert bool(list(out_of_bounds(section))) == (not low <= value <= high or value in (float("inf"),))
    assert bounds.describe() == f"between {low:g} and {high:g}"


def _load(*overrides: str) -> Config:
    return load_config(TINY, overrides)


@pytest.mark.parametrize("name", ["695e0514", "07", "1_000", "1e5", "0x10", "12:30:00", ".5", "+7"])
def test_text_stays_the_text_that_was_typed(name: str) -> None:
    assert _load(f"run.name={name}").run.name == name
    assert _load(f"logging.wandb.group={name}").logging.wandb.group == name


@pytest.mark.parametrize("typed", ["012", "007", "-010", "0_12"])
def test_a_leading_zero_is_no_octal_number(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"read as an octal number; write it without the leading 0"):
        _load(f"run.seed={typed}")
    assert _load("run.seed=0").run.seed == 0


def test_the_home_folder_can_be_written_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = _load(
        "model.path=~/models/base",
        "run.dir=~/runs/a",
        "branches.addition.model_path=~/models/expert",
        "branches.addition.data.train=['~/data/a-*.tar', plain.tar]",
    )
    assert config.model.path == "/home/somebody/models/base"
    assert config.run.dir == "/home/somebody/runs/a"
    assert config.branches["addition"].model_path == "/home/somebody/models/expert"
    assert config.branches["addition"].data.train == ["/home/somebody/data/a-*.tar", "plain.tar"]


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "{b: " * 5000])
def test_a_file_nested_without_end_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"deep\.yaml"):
        load_config(path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"run: {name: \xff\xfe}")
    with pytest.raises(ConfigError, match=r"bytes\.yaml cannot be read"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.name=.."], "run.name: '..' names a folder"),
        (["run.name='.'"], "run.name: '.' names a folder"),
        (["loss.entropy_coefficient=.inf"], "loss.entropy_coefficient: inf must be a finite number"),
        (["optimizer.lr_warmup_steps=40"], "is as long as the whole run or longer (40 optimizer steps)"),
        (
            ["branches.addition.rollout.temperature=0.5"],
            "Eq. 8 would compare distributions that are sharpened",
        ),
        (["branches.addition.rollout.top_p=0.8"], "too low by up to -log top_p = 0.223 nats"),
        (["branches.addition.rollout.top_k=50"], "sample from a part of the vocabulary"),
        (["opd.topology=all_to_all", "opd.hub=addition"], "opd.hub: 'addition' has no meaning with"),
        (
            ["branch_defaults.num_generations_per_prompt=1", "advantage.normalize_std=false"],
            "every GRPO advantage would be 0",
        ),
    ],
)
def test_settings_that_would_silently_do_something_else_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(_load(*overrides), None, None)
    assert message in str(caught.value)
