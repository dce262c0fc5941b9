"""The arms that are compared: what is trained, and which models come of it.

Arms share what they have in common (the experts, for instance): tasks of one name are one task. A unit of the
budget is a step's batch of one branch; ``Arm.units`` says how many an arm spends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.config import Config
from copd_megatron.config.schema import BranchConfig, EdgeConfig, TeacherMode, Topology
from copd_megatron.recipes.experiments.base import Merge, Task, export_of, learn_alone, run_of
from copd_megatron.recipes.experiments.mixed import mixed as mixed_experiment

BASE = "base"
INDEPENDENT = "independent"
START = "start"
"""Frozen branch that holds the base, from which the drift of the experts is measured."""
SAVE_PERIOD = 10
"""Steps between the checkpoints of the independent experts, which are the teachers and students of other
arms."""

Models = Mapping[str, str]
"""Label to model folder."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an arm consists of for one seed."""

    tasks: tuple[Task, ...]
    models: Models
    """The arm's model under the arm's name; more under names of their own, such as ``copd.alpha``."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One recipe at its budget."""

    name: str
    title: str
    make: Callable[[Config, Path], Made]
    """(CoPD's configuration, the seed's folder of runs) to what it consists of."""
    num_branches: int = 2
    main: bool = False
    """All seeds; the others have the few."""


def total_steps(config: Config) -> int:
    """Steps of both phases: the budget of a branch."""
    schedule = config.schedule
    return schedule.cycles * (schedule.rlvr_steps + schedule.opd_steps)


def rl_steps(config: Config) -> int:
    """Steps of Phase I: how long the experts of a static distillation learn."""
    return config.schedule.cycles * config.schedule.rlvr_steps


def opd_steps(config: Config) -> int:
    """Steps of Phase II: how long a static distillation takes."""
    return config.schedule.cycles * config.schedule.opd_steps


def base(config: Config, out: Path) -> Made:
    """The model that all arms start from."""
    return Made(tasks=(), models={BASE: config.model.path})


def experts(config: Config, out: Path) -> Made:
    """Experts that never meet, by as many steps as both phases have, and their mean.

    They run side by side so that overlap and divergence between them, and from the frozen base, are measured
    as in CoPD. Nothing is exchanged that teaches.
    """
    run = _run(config, out, INDEPENDENT)
    names = list(config.branches)
    learn_alone(run, total_steps(config))
    run.branches[START] = _frozen(config, names[0], config.model.path)
    run.opd.topology = Topology.custom
    pairs = [(a, b) for a in names for b in [*names, START] if a != b]
    run.opd.edges = [EdgeConfig(student=a, teacher=b, prompts=a, weight=0.0) for a, b in pairs]
    run.end.merge = False
    run.checkpoint.save_period, run.checkpoint.keep_last = SAVE_PERIOD, 1000
    exports = {name: export_of(out, INDEPENDENT, name) for name in names}
    mean = _mean(config, out, f"mean_of_{len(names)}_experts", (INDEPENDENT,), tuple(exports.values()))
    models = {f"expert.{name}": folder for name, folder in exports.items()}
    return Made(
        tasks=(Task(name=INDEPENDENT, config=run), mean), models={"experts_mean": _out_of(mean), **models}
    )


def mixed_longer(config: Config, out: Path) -> Made:
    """One model on all data, with the branches' steps together."""
    task = mixed_experiment(config, out)[0]
    _quiet(task.config)
    return Made(tasks=(task,), models={"mixed_longer": export_of(out, task.name, "mixed")})


def mixed_wider(config: Config, out: Path) -> Made:
    """One model on all data, with a branch's steps and the branches' batches together."""
    run = copy.deepcopy(mixed_experiment(config, out)[0].config)
    name = "mixed_wider"
    run.run.name, run.run.dir = name, str(out / name)
    run.branches["mixed"].num_prompts_per_step *= len(config.branches)
    learn_alone(run, total_steps(config))
    _quiet(run)
    return Made(tasks=(Task(name=name, config=run),), models={name: export_of(out, name, "mixed")})


def static(config: Config, out: Path, *, prefix: str = "static", change: Change | None = None) -> Made:
    """Experts by the steps of Phase I; then each learns from the frozen others by the steps of Phase II; also
    the mean of the students."""
    names = list(config.branches)
    teachers = {name: expert_at(config, out, name, rl_steps(config)) for name in names}
    tasks, models = list(teachers.values()), {}
    for student in names:
        run = _run(config, out, f"{prefix}_{student}")
        _distil_only(run, opd_steps(config))
        for name, branch in run.branches.items():
            branch.model_path, branch.frozen = _out_of(teachers[name]), name != student
        run.opd.topology, run.opd.hub = Topology.hub_and_spoke, student
        if change is not None:
            change(run)
        tasks.append(Task(name=run.run.name, config=run, after=tuple(t.name for t in teachers.values())))
        models[f"{prefix}.{student}"] = export_of(out, run.run.name, student)
    mean = _mean(config, out, f"{prefix}_mean", tuple(f"{prefix}_{n}" for n in names), tuple(models.values()))
    return Made(tasks=(*tasks, mean), models={prefix: _out_of(mean), **models})


def uni_opd(config: Config, out: Path) -> Made:
    """Static distillation with Uni-OPD's margin shift and balance of right and wrong responses."""

    def change(run: Config) -> None:
        calibration = run.opd.calibration
        calibration.margin, calibration.margin_target = type(calibration.margin)("shift"), 0.4
        calibration.balance, calibration.max_gap = 1.0, 10.0

    return static(config, out, prefix="uni_opd", change=change)


def mopd(config: Config, out: Path) -> Made:
    """The experts of Phase I, frozen, distil into one student that starts from the base; each prompt goes to
    its domain's teacher. The student has the steps that are left of the branches' together."""
    names = list(config.branches)
    teachers = {name: expert_at(config, out, name, rl_steps(config)) for name in names}
    run = _run(config, out, "mopd")
    _distil_only(run, opd_steps(config))
    for name, branch in run.branches.items():
        branch.model_path, branch.frozen = _out_of(teachers[name]), True
    student = copy.deepcopy(config.branches[names[0]])
    student.data.train, student.data.validation = [], []
    run.branches["student"] = student
    run.opd.topology = Topology.custom
    run.opd.edges = [EdgeConfig(student="student", teacher=name) for name in names]
    task = Task(name="mopd", config=run, after=tuple(t.name for t in teachers.values()))
    return Made(tasks=(*teachers.values(), task), models={"mopd": export_of(out, "mopd", "student")})


Change = Callable[[Config], None]
"""What an arm changes of the configuration."""


def copd(name: str, change: Change | None = None) -> Callable[[Config, Path], Made]:
    """CoPD under a name, with its settings changed: the mean of the branches, and each branch alone."""

    def make(config: Config, out: Path) -> Made:
        run = _run(config, out, name)
        if change is not None:
            change(run)
        models = {f"{name}.{branch}": export_of(out, name, branch) for branch in config.branches}
        return Made(
            tasks=(Task(name=name, config=run),), models={name: export_of(out, name, "merged"), **models}
        )

    return make


def opcod(run: Config) -> None:
    """OPCoD: each branch is its own teacher, which reads a correct response of the branch and the other's
    feedback. Rewards teach in the steps of Phase I."""
    first, second = run.branches
    run.model.max_sequence_tokens = 256
    run.opd.topology = Topology.custom
    context = type(EdgeConfig(student="", teacher="").context)("own_correct")
    run.opd.edges = [
        EdgeConfig(student=a, teacher=a, context=context, peer=b)
        for a, b in ((first, second), (second, first))
    ]
    run.opd.feedback.max_new_tokens = 20


def one_way(student: int) -> Change:
    """Only this branch learns from the other."""

    def change(run: Config) -> None:
        names = list(run.branches)
        run.opd.topology = Topology.custom
        run.opd.edges = [EdgeConfig(student=names[student], teacher=names[1 - student])]

    return change


def ratio(rl: int, opd: int) -> Change:
    """Other lengths of the phases, in a cycle of as many steps."""

    def change(run: Config) -> None:
        run.schedule.rlvr_steps, run.schedule.opd_steps = rl, opd

    return change


def strength(beta: float, clip: float | None) -> Change:
    """Another weight of distillation, with or without a clip of the log-ratio."""

    def change(run: Config) -> None:
        run.opd.beta, run.opd.delta_clip = beta, clip

    return change


def teacher(mode: TeacherMode, every: int = 1) -> Change:
    """Teachers that lag."""

    def change(run: Config) -> None:
        run.opd.teacher_mode, run.opd.snapshot_every_steps = mode, every

    return change


def fewer_steps(run: Config) -> None:
    """As many sampled responses in all as the experts have: cross rows count."""
    schedule = run.schedule
    native, cross = schedule.rlvr_steps + schedule.opd_steps, schedule.opd_steps
    scale = native / (native + cross)
    schedule.rlvr_steps, schedule.opd_steps = round(scale * schedule.rlvr_steps), round(scale * cross)


def all_to_all(run: Config) -> None:
    """Spokes exchange, too."""
    run.opd.topology = Topology.all_to_all


def controlled_distance(config: Config, out: Path) -> Made:
    """Fig. 2: the first branch's expert, at several distances from the frozen second one, learns from it for
    a short time. What it gains on the teacher's domain, against their overlap at the start."""
    first, second = list(config.branches)[:2]
    last = total_steps(config)
    final = expert_at(config, out, second, last)
    tasks, models = [final], {}
    for age in (0, SAVE_PERIOD, 2 * SAVE_PERIOD, 3 * SAVE_PERIOD, last):
        before = config.model.path
        after: tuple[str, ...] = (final.name,)
        if age:
            start = expert_at(config, out, first, age)
            tasks.append(start)
            before, after = _out_of(start), (*after, start.name)
        run = _run(config, out, f"distance_{age}")
        run.branches = {name: run.branches[name] for name in (first, second)}
        _distil_only(run, 2 * SAVE_PERIOD)
        run.branches[first].model_path = before
        run.branches[second].model_path, run.branches[second].frozen = _out_of(final), True
        run.opd.topology, run.opd.hub = Topology.hub_and_spoke, first
        tasks.append(Task(name=run.run.name, config=run, after=after))
        models[f"distance.before.{age}"] = before
        models[f"distance.after.{age}"] = export_of(out, run.run.name, first)
    return Made(tasks=tuple(tasks), models=models)


def expert_at(config: Config, out: Path, branch: str, steps: int) -> Task:
    """An independent expert as it was after so many steps, as a model folder: a merge of one model.

    The arm ``experts`` has to be among the arms."""
    saved = out / INDEPENDENT / "checkpoints" / f"step_{steps:06d}" / branch
    name = f"expert_{branch}_{steps}"
    return Task(
        name=name,
        config=config,
        after=(INDEPENDENT,),
        merge=Merge(models=(str(saved),), out=str(out / name / "model")),
    )


def _run(config: Config, out: Path, name: str) -> Config:
    run = run_of(config, out, name)
    _quiet(run)
    return run


def _quiet(run: Config) -> None:
    """Runs are measured together at the end, on the same prompts: none measures itself."""
    for branch in run.branches.values():
        branch.data.validation = []
        for pool in branch.data.pools.values():
            pool.validation = []


def _distil_only(run: Config, steps: int) -> None:
    run.schedule.cycles, run.schedule.rlvr_steps, run.schedule.opd_steps = 1, 0, steps
    run.native.weight = 0.0
    run.end.merge = False


def _frozen(config: Config, like: str, path: str) -> BranchConfig:
    branch = copy.deepcopy(config.branches[like])
    branch.data.train, branch.data.validation = [], []
    branch.frozen, branch.model_path = True, path
    return branch


def _mean(config: Config, out: Path, name: str, after: tuple[str, ...], models: tuple[str, ...]) -> Task:
    return Task(
        name=name, config=config, after=after, merge=Merge(models=models, out=str(out / name / "model"))
    )


def _out_of(task: Task) -> str:
    assert task.merge is not None
    return task.merge.out


ARMS = (
    Arm(name=BASE, title="base", make=base, main=True),
    Arm(name="experts_mean", title="mean of independent experts", make=experts, main=True),
    Arm(name="mixed_longer", title="mixed RLVR, twice the steps", make=mixed_longer, main=True),
    Arm(name="mixed_wider", title="mixed RLVR, twice the batch", make=mixed_wider, main=True),
    Arm(name="static", title="static OPD both ways, mean", make=static, main=True),
    Arm(name="mopd", title="MOPD", make=mopd, main=True),
    Arm(name="copd", title="CoPD", make=copd("copd"), main=True),
    Arm(
        name="copd_short",
        title="CoPD, as many samples as the experts",
        make=copd("copd_short", fewer_steps),
        main=True,
    ),
    Arm(
        name="copd_snapshot",
        title="CoPD, teachers of the phase's start",
        make=copd("copd_snapshot", teacher(TeacherMode.phase_snapshot)),
    ),
    Arm(
        name="copd_every_4",
        title="CoPD, teachers renewed every 4 steps",
        make=copd("copd_every_4", teacher(TeacherMode.every_n_steps, 4)),
    ),
    Arm(name="copd_to_alpha", title="CoPD, only alpha is taught", make=copd("copd_to_alpha", one_way(0))),
    Arm(name="copd_to_beta", title="CoPD, only beta is taught", make=copd("copd_to_beta", one_way(1))),
    Arm(name="uni_opd", title="Uni-OPD both ways, mean", make=uni_opd),
    Arm(name="opcod", title="OPCoD", make=copd("opcod", opcod)),
    *(
        Arm(
            name=f"copd_ratio_{name}",
            title=f"CoPD, S_RL : S_OPD {rl} : {opd}",
            make=copd(f"copd_ratio_{name}", ratio(rl, opd)),
        )
        for name, rl, opd in (("0_5", 8, 17), ("1", 13, 12), ("2", 17, 8), ("3", 19, 6))
    ),
    *(
        Arm(
            name=f"copd_beta_{name}",
            title=f"CoPD, beta {beta:g}, {'no clip' if clip is None else f'clip {clip:g}'}",
            make=copd(f"copd_beta_{name}", strength(beta, clip)),
        )
        for name, beta, clip in (
            ("0_3", 0.3, None),
            ("3", 3.0, None),
            ("0_3_clip", 0.3, 1.0),
            ("1_clip", 1.0, 1.0),
            ("3_clip", 3.0, 1.0),
        )
    ),
    Arm(name="distance", title="students at controlled distance", make=controlled_distance),
)
"""Arms of the two-branch comparison, in the order in which they are worth having."""


THREE = (
    Arm(name=BASE, title="base", make=base, num_branches=3),
    Arm(name="experts_mean", title="mean of independent experts", make=experts, num_branches=3),
    Arm(name="mixed_longer", title="mixed RLVR, three times the steps", make=mixed_longer, num_branches=3),
    Arm(name="mixed_wider", title="mixed RLVR, three times the batch", make=mixed_wider, num_branches=3),
    Arm(name="mopd", title="MOPD", make=mopd, num_branches=3),
    Arm(name="copd", title="CoPD, hub and spokes", make=copd("copd"), num_branches=3),
    Arm(
        name="copd_all_to_all",
        title="CoPD, all to all",
        make=copd("copd_all_to_all", all_to_all),
        num_branches=3,
    ),
)
FOUR = (
    Arm(name=BASE, title="base", make=base, num_branches=4),
    Arm(name="experts_mean", title="mean of independent experts", make=experts, num_branches=4),
    Arm(name="copd", title="CoPD, hub and spokes", make=copd("copd"), num_branches=4),
)
COMPARISONS: Mapping[str, tuple[Arm, ...]] = {"two": ARMS, "three": THREE, "four": FOUR}
"""By number of branches."""
