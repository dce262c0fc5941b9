"""What a machine can do, per rank: read from ``machines.yaml`` or a file of the user's. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import yaml

from copd_megatron.errors import ConfigError
from copd_megatron.untrusted.regular_file import read_regular
from copd_megatron.untrusted.whole_file import write_whole
from copd_megatron.untrusted.yaml_text import load_yaml

MACHINES: Final = Path(__file__).with_name("machines.yaml")
GIGA: Final = 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Figures of one rank; ``machines.yaml`` says what each is."""

    name: str
    ranks_per_node: int
    memory_gib: float
    tflops: float
    tflops_fp8: float
    memory_gb: float
    node_gb: float
    cluster_gb: float
    host_gb: float
    update_share: float
    score_share: float
    prefill_share: float
    decode_share: float
    memory_share: float
    link_share: float
    decode_seconds: float
    token_seconds: float
    layer_seconds: float
    row_layer_seconds: float
    row_seconds: float
    grade_seconds: float
    step_seconds: float
    sync_seconds: float
    collective_seconds: float
    process_gib: float

    @property
    def on_gpu(self) -> bool:
        """Whether ranks hold GPUs: every machine but ``cpu``."""
        return self.name != "cpu"

    @property
    def memory_bytes_per_second(self) -> float:
        """Reached when memory is read or written once."""
        return self.memory_gb * GIGA * self.memory_share

    def flops(self, share: float, *, fp8: bool = False) -> float:
        """Floating-point operations per second at a share of the peak."""
        return (self.tflops_fp8 if fp8 else self.tflops) * 1e12 * share

    def link_bytes_per_second(self, *, inside_node: bool) -> float:
        """Reached by one rank, in each direction."""
        return (self.node_gb if inside_node else self.cluster_gb) * GIGA * self.link_share


_MAX_BYTES: Final = 1 << 20
_NUMBERS: Final = tuple(field.name for field in fields(Machine) if field.name != "name")
_MAY_BE_ZERO: Final = ("row_layer_seconds", "token_seconds", "process_gib", "step_seconds")


def read_machine(name: str, path: Path | None = None) -> Machine:
    """One machine of a file; of the shipped one by default.

    Raises:
        ConfigError: no such file or machine, or a figure that is missing, unknown or no positive number.
    """
    source = path or MACHINES
    try:
        content = load_yaml(read_regular(source, _MAX_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    if not isinstance(content, dict) or name not in content:
        known = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
        raise ConfigError(f"{source} has no machine {name!r}; it has {known}")
    return _machine(name, content, source)


def _machine(name: str, content: Mapping[str, Any], source: Path) -> Machine:
    if not isinstance(content[name], dict):
        raise ConfigError(f"{source}: {name} has no figures; {MACHINES.name} shows them")
    given = dict(content[name])
    parent = given.pop("like", None)
    if parent is not None and not (isinstance(parent, str) and isinstance(content.get(parent), dict)):
        raise ConfigError(f"{source}: {name}: like: {parent}: there is no such machine")
    values = {**(dict(content[parent]) if parent is not None else {}), **given}
    unknown, missing = sorted(set(values) - set(_NUMBERS)), sorted(set(_NUMBERS) - set(values))
    if unknown or missing:
        raise ConfigError(
            f"{source}: {name}: unknown figures {unknown}, missing ones {missing}; {MACHINES.name} has "
            "them all"
        )
    for key, value in values.items():
        lowest_is_zero = key in _MAY_BE_ZERO or key.endswith("_seconds")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"{source}: {name}: {key} is {value!r}, expected a number")
        if value < 0 or (value == 0 and not lowest_is_zero):
            raise ConfigError(f"{source}: {name}: {key} is {value!r}, expected a positive number")
    return Machine(name=name, **values)


def write_machine(machine: Machine, path: Path) -> None:
    """Writes a file that ``read_machine`` reads back, with this machine alone.

    Raises:
        ConfigError: there is a file that holds something else.
    """
    if path.exists():
        try:
            read_machine(machine.name, path)
        except ConfigError as error:
            raise ConfigError(
                f"{path} is there already and is left alone ({error}); give another name"
            ) from error
    record = {machine.name: {key: getattr(machine, key) for key in _NUMBERS}}
    write_whole(path, yaml.safe_dump(record, sort_keys=False))


def with_figures(machine: Machine, figures: Mapping[str, float]) -> Machine:
    """The machine with some figures replaced."""
    values: dict[str, Any] = dict(figures)
    return replace(machine, **values)
