"""Whether the data are still those in which a checkpoint holds positions. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from copd_megatron.checkpoint.manifest import LOOP_STATE, complete_checkpoints, step_folder
from copd_megatron.config import Config
from copd_megatron.config.domains import Domain, domains_of
from copd_megatron.config.graph import build_graph
from copd_megatron.data import check_shards
from copd_megatron.data.difficulty import load_difficulty
from copd_megatron.errors import DataError
from copd_megatron.launch.run_dir import starts_anew
from copd_megatron.untrusted.json_text import load
from copd_megatron.untrusted.regular_file import read_regular


def check_positions(config: Config, folder: Path) -> None:
    """Before the ranks find out: a run that would continue in a run directory reads the data that it began
    with. Reads all training data, as every rank does when it starts.

    Raises:
        DataError: the shards, the pools or the order by pass rates are others.
    """
    found = {} if starts_anew(config) else complete_checkpoints(folder)
    if not found:
        return
    step, manifest = next(iter(found.items()))
    where = step_folder(folder, step)
    now: dict[str, tuple[Domain, dict[str, Any]]] = {}
    for branch, entry in manifest.branches.items():
        name = f"{branch}/{LOOP_STATE}"
        num_bytes = next((file.num_bytes for file in entry.files if file.path == name), 0)
        try:
            streams = load(read_regular(where / name, num_bytes), max_bytes=num_bytes)["streams"]
            saved = list(_positions(config, branch, streams))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # the ranks go on from an older checkpoint, or say what is wrong with this one
        for domain, position in saved:
            if domain is None:
                raise _others(f"branches.{branch}.data.pools: the pools", where)
            if domain.name not in now:
                now[domain.name] = (domain, _fingerprints(config, domain))
            _compare(domain, position, now[domain.name][1], where)


def _positions(
    config: Config, branch: str, streams: Mapping[str, Any]
) -> Iterator[tuple[Domain | None, Mapping[str, Any]]]:
    """What a branch would read on, and where it was in it; None in place of pools that are others now."""
    settings = config.branches[branch]
    read = {edge.name: edge.prompts for edge in build_graph(config).into(branch)}
    if not settings.frozen and config.native.weight > 0:
        read["native"] = branch
    for purpose, source in read.items():
        if purpose not in streams:
            continue
        position, domains = streams[purpose], domains_of(config, source)
        pools = position.get("pools", {})
        if {domain.name for domain in domains if domain.is_pool} != set(pools):
            yield None, position
        else:
            yield from ((domain, dict(pools.get(domain.name, position))) for domain in domains)


def _fingerprints(config: Config, domain: Domain) -> dict[str, Any]:
    branch = config.branches[domain.branch]
    shards = check_shards(domain.train, branch.reward.verifiers)
    difficulty = load_difficulty(domain, branch.data.difficulty, shards)
    return {
        "fingerprint": (shards.fingerprint, shards.outline),
        "difficulty": (None if difficulty is None else difficulty.fingerprint,),
    }


def _compare(domain: Domain, position: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    if position.get("fingerprint") not in now["fingerprint"]:
        raise _others(f"{domain.key}.train: the shards", where)
    if position.get("difficulty") not in now["difficulty"]:
        raise _others(f"{domain.key}: pass_rates or difficulty", where)


def _others(what: str, where: Path) -> DataError:
    return DataError(
        f"{what} are not those that {where} was saved with: put them back, choose another run.name or "
        "run.dir, or set run.overwrite=true to start anew"
    )
