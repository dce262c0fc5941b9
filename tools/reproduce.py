#!/usr/bin/env python3
"""The paper's comparison at laptop scale: trains the arms, measures them, writes the page.

    python tools/reproduce.py quick                      two seeds of four arms at half the budget
    python tools/reproduce.py run                        all arms and seeds; goes on where it was stopped
    python tools/reproduce.py run --comparison three
    python tools/reproduce.py run --arms copd mixed_longer --seeds 1 2
    python tools/reproduce.py select                     the criteria for a setting, on seeds of its own
    python tools/reproduce.py page                       results.json, figures and page from what was measured
    python tools/reproduce.py show copd --seeds 1        the configurations behind an arm

What is asked and what came out: copd_megatron/reproduction/README.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _numbers import count, count_or_none

from copd_megatron.config import to_yaml
from copd_megatron.errors import ConfigError, DataError
from copd_megatron.reproduction import setting as settings
from copd_megatron.reproduction.arms import COMPARISONS
from copd_megatron.reproduction.compare import (
    SeedFolder,
    arms_of,
    material_job,
    measuring_jobs,
    training_jobs,
)
from copd_megatron.reproduction.forked import warm_up
from copd_megatron.reproduction.kept import read_results, with_kept, write_results
from copd_megatron.reproduction.runner import Job, TaskFailed, run_jobs
from copd_megatron.tiny.tasks.tables import response_length
from copd_megatron.untrusted.json_text import dumped, load_file

ROOM = Path(__file__).resolve().parents[1] / "copd_megatron" / "reproduction"
SELECTING = ("base", "experts_mean", "mixed_longer")
"""Arms that a setting is chosen by: CoPD and distillation are not among them."""


def _say(text: str) -> None:
    print(text, flush=True)


def run(folders: Sequence[SeedFolder], comparison: str, names: Sequence[str], cores: int) -> None:
    """Trains and measures the arms.

    Raises:
        ConfigError: an arm's configuration is not valid, or a task was run with other settings.
        TaskFailed: a task failed.
    """
    jobs: list[Job] = [material_job(folder) for folder in folders]
    run_jobs(jobs, cores=cores, say=_say, prepare=warm_up)
    jobs = []
    for folder in folders:
        arms = arms_of(comparison, folder.seed, names)
        training = training_jobs(folder, comparison, arms)
        jobs += [*training, *measuring_jobs(folder, comparison, arms, after=[job.name for job in training])]
    run_jobs(jobs, cores=cores, say=_say, prepare=warm_up)


def criteria_of(folders: Sequence[SeedFolder]) -> list[dict[str, Any]]:
    """The criteria's figures on the seeds of which all needed models were measured."""
    from copd_megatron.reproduction.criteria import criteria
    from copd_megatron.reproduction.scores import read_scores

    first = folders[0]
    domains = list(first.config("two").branches)
    lengths = {d.name: response_length(d) for d in first.setting.material(first.seed).world.domains}
    labels = ["base", "mixed_longer", *(f"expert.{d}" for d in domains)]
    places = [folder.scores("two", "greedy") for folder in folders]
    whole = [place for place in places if all((place / f"{label}.json").is_file() for label in labels)]
    seeds = [{label: read_scores(place, label) for label in labels} for place in whole]
    return [asdict(criterion) for criterion in criteria(domains, seeds, lengths)] if seeds else []


def select(folders: Sequence[SeedFolder]) -> dict[str, Any]:
    """The criteria's figures on what was measured of the tuning seeds."""
    found = criteria_of(folders)
    for each in found:
        met = "met" if each["met"] else "NOT MET" if each["required"] else "not met (no condition)"
        _say(f"{each['text']}: {each['figures']}: {met}")
    return {
        "why": folders[0].setting.why,
        "seeds": [folder.seed for folder in folders],
        "criteria": found,
    }


def write_page(root: Path, setting: settings.Setting, room: Path) -> None:
    """Writes results.json, figures and README.md into ``room`` from all that is below ``root``, and from what
    results.json says of comparisons that were run elsewhere."""
    from copd_megatron.reproduction.collect import collect
    from copd_megatron.reproduction.figures import draw_all
    from copd_megatron.reproduction.page import page

    folders = [SeedFolder(setting=setting, seed=seed, root=root) for seed in settings.SEEDS]
    results: dict[str, Any] = {
        "setting": asdict(setting),
        "selection": _read(root / "selection.json"),
        "criteria": criteria_of(folders),
        "machine": f"{os.cpu_count()} cores of {platform.machine()}",
        "comparisons": {},
    }
    for name in COMPARISONS:
        measured = [folder for folder in folders if folder.scores(name, "greedy").is_dir()]
        if measured:
            results["comparisons"][name] = collect(name, measured)
    room.mkdir(parents=True, exist_ok=True)
    results = with_kept(results, read_results(room / "results.json"))
    write_results(room / "results.json", results)
    drawn = draw_all(results, room / "figures")
    introduction = (ROOM / "introduction.md").read_text(encoding="utf-8")
    words = room / "findings.md"  # of the results that were there when somebody read them
    findings = words.read_text(encoding="utf-8") if words.is_file() else ""
    text = page(results, introduction, drawn, findings=findings)
    (room / "README.md").write_text(text, encoding="utf-8")
    _say(f"written: {room / 'README.md'}, results.json, {len(drawn)} figures")


def show(folders: Sequence[SeedFolder], comparison: str, names: Sequence[str]) -> None:
    """Prints the configurations of the arms' tasks."""
    for folder in folders:
        for arm in arms_of(comparison, folder.seed, names):
            for task in folder.made(comparison, arm).tasks:
                what = to_yaml(task.config) if task.trains else f"merge: {task.merge}\n"
                _say(f"# {arm.name}, seed {folder.seed}, task {task.name}\n{what}")


def _read(path: Path) -> dict[str, Any]:
    return dict(load_file(path)) if path.is_file() else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("quick", "run", "select", "page", "show"))
    parser.add_argument("arm", nargs="?", help="for show: an arm")
    parser.add_argument("--comparison", choices=COMPARISONS, default="two", help="number of branches")
    parser.add_argument("--arms", nargs="+", default=[], help="only these")
    parser.add_argument("--seeds", nargs="+", type=count_or_none, default=[], help="only these")
    parser.add_argument("--cores", type=count, default=os.cpu_count() or 1, help="ranks that run at once")
    parser.add_argument("--setting", choices=settings.SETTINGS, help=f"default: {settings.CHOSEN}")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"), help="folder of all runs")
    parser.add_argument("--room", type=Path, default=ROOM, help="folder of the page")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    root = arguments.out.absolute()
    quick = arguments.command == "quick"
    setting = settings.SETTINGS[arguments.setting or (settings.QUICK if quick else settings.CHOSEN)]

    def folders(seeds: Sequence[int]) -> list[SeedFolder]:
        return [SeedFolder(setting=setting, seed=n, root=root) for n in arguments.seeds or seeds]

    if quick:
        run(folders(settings.QUICK_SEEDS), "two", settings.QUICK_ARMS, arguments.cores)
        write_page(root, setting, root / "page")
    elif arguments.command == "run":
        run(folders(settings.SEEDS), arguments.comparison, arguments.arms, arguments.cores)
    elif arguments.command == "select":
        tuning = folders(settings.TUNING_SEEDS)
        run(tuning, "two", SELECTING, arguments.cores)
        found = _read(root / "selection.json") | {setting.name: select(tuning)}
        (root / "selection.json").write_text(dumped(found, indent=1) + "\n", encoding="utf-8")
    elif arguments.command == "page":
        write_page(root, setting, arguments.room)
    else:
        show(folders((1,)), arguments.comparison, [arguments.arm] if arguments.arm else arguments.arms)


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    try:
        _main(_parser().parse_args(argv))
    except (ConfigError, DataError, TaskFailed) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
