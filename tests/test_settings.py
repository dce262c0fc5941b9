"""Single settings: each has a text, limits beside its field, and takes exactly what was written."""

from __future__ import annotations

import contextlib
import re
import tempfile
import typing
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from copd_megatron.cli.main import main
from copd_megatron.config import Config, ConfigError, load_config, save_resolved, validate
from copd_megatron.config.bounds import Bounds, violations
from copd_megatron.config.checks.switches import SWITCHES, Switch
from copd_megatron.config.reference import find_settings, markdown, shown_value, values_of
from copd_megatron.config.texts import NAME, Setting, describe_settings
from tests.test_config import load, write

TINY = Path(__file__).parents[1] / "configs" / "two_branch_tiny.yaml"
SETTINGS = list(describe_settings())


def _load(*overrides: str) -> Config:
    return load_config(TINY, overrides)


# --- texts -------------------------------------------------------------------------------------------------


def test_there_are_settings() -> None:
    keys = {setting.key for setting in SETTINGS}
    assert len(keys) == len(SETTINGS) > 190
    assert {"optimizer.lr", f"branches.{NAME}.rollout.top_p", "opd.edges[0].beta"} <= keys


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_has_a_text_of_one_sentence_or_more(setting: Setting) -> None:
    assert len(setting.text) >= 4, f"{setting.key} has no text below its field in config/schema/"
    assert setting.text.rstrip("`")[-1] in ".)", f"{setting.key}: the text is no sentence: {setting.text!r}"


def test_a_description_holds_type_limits_and_default() -> None:
    by_key = {setting.key: setting for setting in SETTINGS}
    lr = by_key["optimizer.lr"]
    assert (lr.expected, lr.default, lr.is_section) == ("a number: above 0", 1e-6, False)
    assert by_key["loss.mismatch_bounds"].default == [0.5, 5.0]
    assert by_key["model.path"].default is MISSING
    assert by_key["opd.behaviour"].is_section
    assert by_key["run.device"].expected == "one of auto, cpu, cuda"


# --- limits ------------------------------------------------------------------------------------------------


def _number_keys(section: Any, prefix: str = "") -> list[str]:
    """Keys of all settings that hold a float, with an example for branches and edges."""
    keys = []
    hints = typing.get_type_hints(type(section))
    for field in fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            keys += _number_keys(value, f"{key}.")
        elif isinstance(value, dict):
            keys += [k for name, item in value.items() for k in _number_keys(item, f"{key}.{name}.")]
        elif float in (hints[field.name], *typing.get_args(hints[field.name])):
            keys.append(f"{key}[0]" if isinstance(value, list) else key)
    return keys


NUMBERS = _number_keys(_load())


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_no_number_may_be_infinite_or_nan(tmp_path: Path, value: str) -> None:
    assert {"loss.entropy_coefficient", "opd.beta", "branches.addition.rollout.top_p"} <= set(NUMBERS)
    config = _load()
    for key in NUMBERS:
        *path, leaf = key.removesuffix("[0]").split(".")
        place: Any = config
        for part in path:
            place = place[part] if isinstance(place, dict) else getattr(place, part)
        number = float(value.replace(".inf", "inf").replace(".nan", "nan"))
        setattr(place, leaf, [number, 5.0] if key.endswith("[0]") else number)
    problems = list(violations(config))
    assert [problem.split(":")[0] for problem in problems] == NUMBERS
    assert all("must be a finite number" in problem for problem in problems)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("opd.beta=0", r"opd\.beta: 0\.0 must be above 0 \(default 1\.0\)"),
        ("opd.num_prompts_per_step=0", r"opd\.num_prompts_per_step: 0 must be at least 1"),
        ("opd.num_generations_per_prompt=-1", r"opd\.num_generations_per_prompt: -1 must be at least 1"),
        (
            "opd.edges=[{student: text, teacher: image, beta: -2}]",
            r"opd\.edges\[0\]\.beta: -2\.0 must be above",
        ),
        (
            "branches.text.parallel.context_parallel_size=-3",
            r"branches\.text\.parallel\.context_parallel_size",
        ),
        ("branches.image.rollout.top_k=-2", r"top_k: -2 must be at least 1, or -1 \(default -1\)"),
        ("loss.mismatch_bounds=[-1, 5]", r"loss\.mismatch_bounds\[0\]: -1\.0 must be at least 0"),
        ("run.seed=-1", r"run\.seed: -1 must be at least 0 \(default 1\)"),
        (f"run.seed={10**30}", r"run\.seed: a number of 31 digits must be at most 9223372036854775807"),
        ("optimizer.adam_beta1=1", r"adam_beta1: 1\.0 must be at least 0 and below 1 \(default 0\.9\)"),
        ("logging.level=loud", r"logging\.level: 'loud' must be one of DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_a_value_out_of_bounds_says_which_bound_and_the_default(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load(tmp_path, override), None, None)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "a\\b", "x\0", "a\nb", " a", "n" * 201])
def test_a_run_name_names_one_folder(name: str) -> None:
    config = Config()
    config.run.name = name
    (problem,) = [problem for problem in violations(config) if problem.startswith("run.name: ")]
    assert "must be the name of one folder" in problem


@pytest.mark.parametrize("name", ["copd", "a b", "v1.2", "...", "x-y_z", "übung", "07", "~x", "n" * 200])
def test_ordinary_run_names_are_taken(name: str) -> None:
    config = Config()
    config.run.name = name
    assert not [problem for problem in violations(config) if problem.startswith("run.name")]


def test_bounds_say_their_range() -> None:
    assert str(Bounds(at_least=0, at_most=1)) == "between 0 and 1"
    assert str(Bounds(above=0, at_most=1)) == "above 0 and at most 1"
    assert str(Bounds(at_least=1, also=-1)) == "at least 1, or -1"


def test_every_whole_and_decimal_number_but_a_few_has_limits() -> None:
    """Those that may be anything finite are listed here, so that a new setting is thought about."""
    unlimited = set()
    for setting in SETTINGS:
        if setting.expected in ("a number", "a whole number", "a number or null", "a whole number or null"):
            unlimited.add(setting.key)
    assert unlimited == {
        *("loss.entropy_coefficient", "loss.balance_exponent", "profiling.step_start", "profiling.step_end"),
        *("opd.calibration.margin_target", "opd.calibration.correct_reward"),
        *("opd.feedback.correct_reward", "opd.gate.correct_reward"),
    }


# --- what is written is what the run gets -------------------------------------------------------------------

TEXTS = [
    *("695e0514", "07", "1_000", "1e5", "0x10", "12:30:00", ".5", "+7", ".inf", "nan", "1.", "0b1"),
    *("true", "yes", "no", "on", "off", "y", "2026-01-01", "=", "<<", "a b", "a#b", "a: b", "x # y", "[a]"),
    *("{a: 1}", "- a", "*a", "&a b", "!x", "%", "@x", "it's"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_the_text_that_was_typed(text: str) -> None:
    config = _load(f"model.system_prompt={text}", f"logging.wandb.group={text}")
    assert config.model.system_prompt == config.logging.wandb.group == text


@pytest.mark.parametrize("text", TEXTS[:21])
def test_text_in_a_file_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    yaml = f"model: {{path: base, system_prompt: {text}}}\nbranches: {{a: {{rollout: {{stop: [{text}]}}}}}}\n"
    config = load_config(write(tmp_path, yaml))
    assert config.model.system_prompt == text
    assert config.branches["a"].rollout.stop == [text]


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1))
@hypothesis_settings(deadline=None, max_examples=50)
def test_any_text_survives_the_file_that_a_run_writes(text: str) -> None:
    config = Config()
    config.model.path, config.model.system_prompt = "base", text
    config.logging.wandb.tags = [text, text]
    if text == "???":  # OmegaConf's mark for a value that is missing
        return
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(save_resolved(config, Path(folder) / "config.yaml")) == config


@pytest.mark.parametrize("text", ["${run.seed}", "\\${x}", "a ${", "${", "$", "\\", "null", "~", ""])
def test_text_that_means_something_to_omegaconf_survives_too(text: str, tmp_path: Path) -> None:
    config = Config()
    config.model.path, config.model.system_prompt = "base", text
    assert load_config(save_resolved(config, tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("typed", "number"),
    [
        *(("012", 12), ("007", 7), ("0_12", 12), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("+3", 3)),
        *(("0", 0), ("'5'", 5), ("00", 0)),
    ],
)
def test_a_whole_number_is_the_one_that_was_typed(typed: str, number: int, tmp_path: Path) -> None:
    assert _load(f"run.seed={typed}").run.seed == number
    yaml = f"model: {{path: base}}\nrun: {{seed: {typed}}}\nbranches: {{}}\n"
    assert load_config(write(tmp_path, yaml)).run.seed == number


@pytest.mark.parametrize(
    "typed", ["1:30", "1.0", "1e3", "0x", "1__", "५", "--1", "1 2", "true", "9" * 101, "0b2"]
)
def test_what_is_no_whole_number_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.seed: .* is not a whole number"):
        _load(f"run.seed={typed}")


@pytest.mark.parametrize(
    ("typed", "number"),
    [("1e-6", 1e-6), ("010", 10.0), ("1_0.5", 10.5), (".5", 0.5), ("1.", 1.0), ("3", 3.0)],
)
def test_a_number_is_the_one_that_was_typed(typed: str, number: float) -> None:
    assert _load(f"opd.beta={typed}").opd.beta == number


@pytest.mark.parametrize("typed", ["1:30", "1,5", "1e", "e5", "٣", "yes", "0x1p3"])
def test_what_is_no_number_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"opd\.beta: .* is not a number"):
        _load(f"opd.beta={typed}")


@pytest.mark.parametrize("value", ["${run.name}", "${model.system_prompt}", "${nothing}", "${", "${a:b}"])
def test_an_interpolation_that_cannot_be_resolved_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"two_branch_tiny\.yaml: "):
        _load(f"run.name={value}", "model.system_prompt=${run.name}")


def test_names_of_branches_are_text(tmp_path: Path) -> None:
    yaml = "model: {path: base}\nbranches: {07: {frozen: yes}, on: {}, 1e5: {}}\n"
    config = load_config(write(tmp_path, yaml), ["branches.07.num_prompts_per_step=3"])
    assert list(config.branches) == ["07", "on", "1e5"]
    assert config.branches["07"].num_prompts_per_step == 3
    assert config.branches["07"].frozen


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.name: .* UTF-8"):
        _load("run.name=caf\udce9")
    with pytest.raises(ConfigError, match=r"run\.name: .* UTF-8"):
        _load('run.name="\\ud800"')


def test_the_home_folder_can_be_written_as_in_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = _load(
        "model.path=~/models/base",
        "run.dir=~/runs/a",
        "branches.addition.model_path=~/models/expert",
        "branches.addition.data.train=['~/data/a-*.tar', plain.tar]",
        "logging.prometheus.textfile=~/metrics.prom",
        "model.system_prompt=~/ stays",
    )
    assert config.model.path == "/home/somebody/models/base"
    assert config.run.dir == "/home/somebody/runs/a"
    assert config.branches["addition"].model_path == "/home/somebody/models/expert"
    assert config.branches["addition"].data.train == ["/home/somebody/data/a-*.tar", "plain.tar"]
    assert config.logging.prometheus.textfile == "/home/somebody/metrics.prom"
    assert config.model.system_prompt == "~/ stays"
    with pytest.raises(ConfigError, match=r"run\.dir: '~nobody-here/x' begins with ~nobody-here"):
        validate(_load("run.dir=~nobody-here/x"), None, None)


# --- files that are no configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "a: " + "{b: " * 5000, "branches: &b {x: *b}", "run: &r [*r]", "run: {name: &n [*n]}"],
)
def test_a_file_nested_without_end_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deep\.yaml"):
        load_config(write(tmp_path, text, "deep.yaml"))


def test_an_override_nested_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        _load("opd.edges=" + "[" * 5000)


@pytest.mark.parametrize(
    ("content", "position"),
    [(b"run: {name: \xff\xfe}", "0xff at position 12"), ("run: {}".encode("utf-16"), "0xff at position 0")],
)
def test_a_file_that_is_not_utf8_is_named(content: bytes, position: str, tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bytes\.yaml cannot be read: byte {position} is not UTF-8"):
        load_config(path)


@given(st.text(max_size=60))
@hypothesis_settings(deadline=None, max_examples=300)
def test_no_file_ends_in_a_traceback(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_text(text, encoding="utf-8", errors="replace")
        with pytest.raises(ConfigError, match=r"any\.yaml"):
            load_config(path)


@given(st.sampled_from([setting.key for setting in SETTINGS]), st.text(max_size=20))
@hypothesis_settings(deadline=None, max_examples=300)
def test_no_override_ends_in_a_traceback(key: str, text: str) -> None:
    with contextlib.suppress(ConfigError):
        _load(f"{key.replace(NAME, 'addition')}={text}")


# --- settings that would silently do something else ---------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.name=.."], "run.name: '..' must be the name of one folder"),
        (["run.name='.'"], "run.name: '.' must be the name of one folder"),
        (["loss.entropy_coefficient=.inf"], "loss.entropy_coefficient: inf must be a finite number"),
        (["optimizer.lr_warmup_steps=40"], "is as long as the whole run or longer (40 updates)"),
        (
            ["branches.addition.rollout.temperature=0.5"],
            "would compare two differently sharpened distributions",
        ),
        (["branches.addition.rollout.top_p=0.8"], "log-probabilities off by -ln 0.8 = 0.22"),
        (["branches.addition.rollout.top_k=50"], "rollout.top_k: 50 samples from a part of the vocabulary"),
        (["opd.topology=all_to_all", "opd.hub=addition"], "opd.hub: 'addition' has no effect with"),
        (
            ["branch_defaults.num_generations_per_prompt=1", "advantage.normalize_std=false"],
            "minus its group's mean, always 0",
        ),
    ],
)
def test_settings_that_would_silently_do_something_else_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(_load(*overrides), None, None)
    assert message in str(caught.value)


OFF = {
    "opd.behaviour.top_k": ["opd.behaviour.num_states=0"],
    "opd.behaviour.every_steps": ["opd.behaviour.num_states=0"],
    "loss.dual_clip": ["loss.surrogate=sapo"],
    "loss.mismatch_cap": ["loss.mismatch_correction=none"],
    "advantage.std_epsilon": ["advantage.normalize_std=false"],
}
"""What switches off what the file, or a default, has on."""
SWITCHED = [(switch, key) for switch in SWITCHES for key in switch.keys]


@pytest.mark.parametrize(("switch", "key"), SWITCHED, ids=[key for _, key in SWITCHED])
def test_settings_whose_switch_is_off_are_refused(switch: Switch, key: str) -> None:
    config = _load(*OFF.get(key, ()))
    validate(config, None, None)
    section, _, name = key.rpartition(".")
    owner, default = attrgetter(section)(config), attrgetter(key)(config)
    assert default == attrgetter(key)(Config()), "the default says nothing"
    setattr(owner, name, _another(default))
    with pytest.raises(ConfigError, match=re.escape(f"{key}: ")) as caught:
        validate(config, None, None)
    assert f"has no effect without {switch.needs}; set that, or leave {key} at" in str(caught.value)


def _another(value: Any) -> Any:
    """A value of the same kind that is another one."""
    if isinstance(value, Enum):
        return next(other for other in type(value) if other is not value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return value[:-1]
    return f"{value}1" if isinstance(value, str) else 3 if value is None else value + 0.25


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluation.merged=true", "evaluation.every_steps=3"],
        ["evaluation.num_generations_per_prompt=4", "evaluation.temperature=1"],
        ["checkpoint.async_save=true", "checkpoint.save_period=3"],
        ["opd.ema_rate=0.5", "opd.teacher_mode=ema"],
        ["opd.snapshot_every_steps=3", "opd.teacher_mode=every_n_steps"],
        ["loss.mismatch_cap=3", "loss.mismatch_correction=tis_sequence"],
        ["loss.kl_placement=reward", "loss.kl_coefficient=0.1"],
        ["loss.sapo_temperature_negative=2", "loss.surrogate=sapo"],
        ["loss.balance_exponent=-2", "loss.balance=drift"],
        ["advantage.dynamic_sampling_max_rounds=5", "advantage.dynamic_sampling=true"],
        ["advantage.overlong_penalty=0.5", "advantage.overlong_buffer_tokens=8"],
        ["evaluation.every_steps=40"],
    ],
)
def test_settings_whose_switch_is_on_are_taken(overrides: list[str]) -> None:
    validate(_load(*overrides), None, None)
    with pytest.raises(ConfigError, match=r"every_steps: 41 is beyond the run's 40 steps"):
        validate(_load("evaluation.every_steps=41"), None, None)


def test_copd_eval_samples_no_prompt_greedily_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(TINY), "base", "evaluation.num_generations_per_prompt=4"]) == 2
    said = capsys.readouterr().err
    assert "4 has no effect without an evaluation.temperature above 0: greedy responses" in said


# --- the reference ------------------------------------------------------------------------------------------


def test_the_reference_page_is_what_the_settings_say() -> None:
    page = Path(__file__).parents[1] / "copd_megatron/config/REFERENCE.md"
    remedy = "copd config --markdown > copd_megatron/config/REFERENCE.md writes it anew"
    assert page.read_text(encoding="utf-8") == markdown(), remedy
    rows = [line.split("|")[1].strip() for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(not setting.is_section for setting in SETTINGS)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("opd.beta", ["opd.beta"]),
        ("opd.edges[3].beta", ["opd.edges[0].beta"]),
        ("branches.text.rollout.top_p", [f"branches.{NAME}.rollout.top_p"]),
        ("native", ["native", "native.weight", "native.objective"]),
    ],
)
def test_settings_are_found_by_key(key: str, found: list[str]) -> None:
    assert sorted(setting.key for setting in find_settings(key)) == sorted(found)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("opd.bata", "did you mean 'opd.beta'"),
        ("branches.text.rolout", "did you mean 'branches.text.rollout'"),
        ("opd.beta.x", "opd.beta is a number, it has no key 'x'"),
        ("nothing", "unknown key 'nothing'"),
    ],
)
def test_a_key_that_is_none_has_a_nearest(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_settings(key)


def test_settings_are_found_by_word() -> None:
    keys = [setting.key for setting in find_settings(word="TRUNCATED")]
    assert "advantage.overlong_filtering" in keys and f"branches.{NAME}.rollout.max_new_tokens" in keys
    assert all("truncated" in (s.key + s.text).lower() for s in find_settings(word="truncated"))


def test_a_setting_has_the_values_of_a_configuration() -> None:
    config = _load("optimizer.lr=1e-4", "run.device=cpu")
    by_key = {setting.key: setting for setting in SETTINGS}

    def values(key: str) -> list[tuple[str, str, bool]]:
        return [(v.key, shown_value(v.value), v.is_default) for v in values_of(by_key[key], config)]

    assert values("optimizer.lr") == [("optimizer.lr", "0.0001", False)]
    assert values("run.device") == [("run.device", "cpu", False)]
    assert values("opd.edges[0].beta") == []
    assert values(f"branches.{NAME}.rollout.top_p") == [
        (f"branches.{name}.rollout.top_p", "1", True) for name in config.branches
    ]
    assert values(f"branches.{NAME}.data.train")[0][1].startswith("[.cache/tiny_text_data/addition-train-")
    for setting in SETTINGS:
        if not setting.is_section:
            values_of(setting, config)


def test_the_config_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "opd.beta", "--file", str(TINY), "--set", "opd.beta=0.7"]) == 0
    shown = capsys.readouterr().out
    assert "opd.beta: a number: above 0; default 1" in shown and "opd.beta=0.7  (changed)" in shown
    assert main(["config", "--search", "no setting says this"]) == 2
    assert main(["config", "opd.beta", "--set", "opd.beta=0.7"]) == 2
    assert "--set needs --file" in capsys.readouterr().err
    assert main(["config", "opd.bata"]) == 2
    assert main(["config"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 2 * len(SETTINGS)
