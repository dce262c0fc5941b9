"""A setting: the domains, the base model and the budgets with which all arms are compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from copd_megatron.config import Config, load_config
from copd_megatron.reproduction.material import Material
from copd_megatron.tiny.recipe import ModelSize, WarmUpSettings
from copd_megatron.tiny.tasks.tables import IMAGE, TEXT, VIDEO, TableDomain, TableWorld
from copd_megatron.tiny.vl_recipe import VisionSize

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "reproduction" / "tables.yaml"
_SMALL_TOWER = VisionSize(depth=2, hidden_size=32, intermediate_size=64, image_pixels=(32 * 32, 64 * 64))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is common to all arms and seeds."""

    name: str
    why: str
    """What it was tried for."""
    given_up: str = ""
    """What was seen on a tuning seed, if that was enough to go on to the next setting."""
    lengths: tuple[int, ...] = (3, 4, 3, 4)
    """Operations in a chain of alpha, beta, gamma and delta."""
    verbose: tuple[bool, ...] = (False, False, False, False)
    """Whether their workings name the operations, and answers are twice as long."""
    media: tuple[str, ...] = (TEXT, TEXT, TEXT, TEXT)
    """Where their prompts show the number to start from: in the text, or in an image or a video."""
    vision: VisionSize = _SMALL_TOWER
    """Of the model, where a domain has images or videos."""
    num_pictures: int = 40
    """Images or videos of every number that the warm-up shows."""
    shared: str = "s"
    conflicting: str = "c"
    num_symbols: int = 6
    wrong_share: float = 0.5
    sureness: float = 0.8
    error_sureness: float = 0.8
    doubt: float = 0.1
    model: ModelSize = field(
        default_factory=lambda: ModelSize(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    warm_up: WarmUpSettings = field(
        default_factory=lambda: WarmUpSettings(num_steps=1200, batch_size=64, vector_lr=3e-3)
    )
    num_train: int = 6000
    num_validation: int = 500
    overrides: tuple[str, ...] = ()
    """Settings of the configuration that differ from ``configs/reproduction/tables.yaml``."""

    def material(self, seed: int) -> Material:
        """The base model and shards of a seed: other tables, other beliefs, other weights."""
        names = zip(
            ("alpha", "beta", "gamma", "delta"),
            "ABCD",
            "wxyz",
            self.lengths,
            self.verbose,
            self.media,
            strict=True,
        )
        world = TableWorld(
            domains=tuple(
                TableDomain(
                    name=name,
                    tag=tag,
                    own=own,
                    length=length,
                    verbose=verbose,
                    medium=medium,
                    shared=self.shared,
                    conflicting=self.conflicting,
                )
                for name, tag, own, length, verbose, medium in names
            ),
            num_symbols=self.num_symbols,
            wrong_share=self.wrong_share,
            sureness=self.sureness,
            error_sureness=self.error_sureness,
            doubt=self.doubt,
            seed=seed,
        )
        return Material(
            world=world,
            model=self.model,
            warm_up=self.warm_up,
            num_train=self.num_train,
            num_validation=self.num_validation,
            vision=self.vision if set(self.media) != {TEXT} else None,
            num_pictures=self.num_pictures,
        )

    def config(self, seed: int, home: Path, num_branches: int = 2) -> Config:
        """The configuration of CoPD with the first branches.

        Args:
            home: folder of the seed, which holds ``base`` and ``data``.
        """
        config = load_config(
            str(CONFIG), [f"run.seed={seed}", f"model.path={home / 'base'}", *self.overrides]
        )
        config.branches = dict(list(config.branches.items())[:num_branches])
        for name, branch in config.branches.items():
            branch.data.train = [str(home / "data" / f"{name}-train-*.tar")]
            branch.data.validation = [str(home / "data" / f"{name}-validation-*.tar")]
        return config


_THREE_CYCLES = ("schedule.cycles=3", "schedule.rlvr_steps=24", "schedule.opd_steps=16")
_FOUR_CYCLES = ("schedule.cycles=4", "schedule.rlvr_steps=24", "schedule.opd_steps=16")
_SLOW = Setting(
    name="tables_44_slow",
    why="the same with a smaller learning rate, so that fifty steps do not suffice",
    lengths=(4, 4, 4, 4),
    verbose=(False, True, False, True),
    sureness=0.9,
    error_sureness=0.6,
    doubt=0.3,
    overrides=("optimizer.lr=2.5e-4",),
)
_MEDIA = replace(
    _SLOW,
    name="tables_media",
    why="the chosen setting with numbers in images (beta) and in videos (gamma) on a tiny Qwen3-VL; "
    "tried when the arms of the chosen one had begun to run",
    media=(TEXT, IMAGE, VIDEO, TEXT),
    overrides=(
        *_SLOW.overrides,
        "model.max_sequence_tokens=80",
        "branch_defaults.data.max_prompt_tokens=56",
        "media.frame_rate=4.0",
    ),
)
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="tables_8",
            why="one operation shared, one conflicting, one of its own in each domain; eight symbols",
            given_up="the base had not learned what it should believe (loss 0.66, where a "
            "base of two domains had come to 0.41); mean rewards of 0.13, after 49 steps 0.10",
            num_symbols=8,
            wrong_share=0.4,
            overrides=_FOUR_CYCLES,
        ),
        Setting(
            name="tables_6",
            why="the same with six symbols, fewer facts, of which the base believes half wrongly",
            given_up="in 160 steps the mean reward of alpha (chains of three) rose from 0.16 to 0.80, of "
            "beta (chains of four) from 0.16 to 0.21",
            overrides=_FOUR_CYCLES,
        ),
        Setting(
            name="tables_32",
            why="chains of three and of two steps, since four are hardly ever right by chance; six in ten "
            "beliefs wrong, a smaller learning rate, three cycles",
            given_up="after 120 steps the mean reward of alpha was 0.14, of beta 0.38",
            lengths=(3, 2, 3, 2),
            wrong_share=0.6,
            overrides=(*_THREE_CYCLES, "optimizer.lr=4e-4"),
        ),
        Setting(
            name="tables_33",
            why="all chains of three steps, half of the beliefs wrong, the first learning rate again; the "
            "answers of beta and delta are twice as long, since they name the operations",
            lengths=(3, 3, 3, 3),
            verbose=(False, True, False, True),
            given_up="after 110 steps the mean reward of alpha was 0.32, of beta 0.19",
            overrides=_THREE_CYCLES,
        ),
        Setting(
            name="tables_doubt",
            why="the same with a base that doubts what it believes wrongly: it says its error six times "
            "in ten and the truth three times, so that sampling finds it",
            lengths=(3, 3, 3, 3),
            verbose=(False, True, False, True),
            sureness=0.9,
            error_sureness=0.6,
            doubt=0.3,
            given_up="experts learn too fast for 120 steps: after 41 the mean rewards of alpha and beta had "
            "risen from 0.25 and 0.24 to 0.62 and 0.74",
            overrides=_THREE_CYCLES,
        ),
        Setting(
            name="tables_50",
            why="the same with 50 steps, two cycles of 15 and 10",
            given_up="by the criteria on seed 101: experts at 86.6 and 100.0 % on their own domains",
            lengths=(3, 3, 3, 3),
            verbose=(False, True, False, True),
            sureness=0.9,
            error_sureness=0.6,
            doubt=0.3,
        ),
        Setting(
            name="tables_34",
            why="experts were too good: chains of four for beta and delta again, and a smaller learning rate",
            given_up="by the criteria on seed 101: the expert in alpha at 99.4 % (beta: 79.4)",
            lengths=(3, 4, 3, 4),
            verbose=(False, True, False, True),
            sureness=0.9,
            error_sureness=0.6,
            doubt=0.3,
            overrides=("optimizer.lr=4e-4",),
        ),
        Setting(
            name="tables_44",
            why="chains of four for all",
            given_up="by the criteria on seed 101: experts at 94.6 and 96.2 %",
            lengths=(4, 4, 4, 4),
            verbose=(False, True, False, True),
            sureness=0.9,
            error_sureness=0.6,
            doubt=0.3,
            overrides=("optimizer.lr=4e-4",),
        ),
        _SLOW,
        _MEDIA,
        replace(
            _MEDIA,
            name="tables_pictures",
            why="the same with the vision tower of the quickstart's model, five times as many pictures in "
            "the warm-up, and twice the warm-up; tried when the arms of the chosen one had run",
            vision=VisionSize(image_pixels=(32 * 32, 64 * 64)),
            num_pictures=200,
            warm_up=replace(_SLOW.warm_up, num_steps=2400),
        ),
        replace(
            _SLOW,
            name="quick",
            why="the chosen setting with one cycle instead of two, to see the tool work",
            overrides=(*_SLOW.overrides, "schedule.cycles=1"),
        ),
        Setting(
            name="smoke",
            why="a few steps from a base that has learned nothing, to test the tool",
            warm_up=WarmUpSettings(num_steps=20, batch_size=16),
            num_train=300,
            num_validation=20,
            overrides=(
                *("schedule.cycles=1", "schedule.rlvr_steps=16", "schedule.opd_steps=2"),
                "branch_defaults.num_prompts_per_step=4",
            ),
        ),
    )
}
CHOSEN = _SLOW.name
"""The setting of the comparison, chosen by ``criteria.py`` on the tuning seeds alone."""

TUNING_SEEDS = (101, 102)
"""For the choice of a setting: their worlds are in no comparison."""
SEEDS = (1, 2, 3, 4, 5)
FEW_SEEDS = (1, 2, 3)
"""For the arms that are not the main ones."""
QUICK = "quick"
QUICK_SEEDS = (1, 2)
QUICK_ARMS = ("base", "experts_mean", "mixed_wider", "copd")
