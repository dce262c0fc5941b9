"""Everything that determines the tiny vision-language base model and its three domains. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.tiny.recipe import (
    PACKAGES_THAT_MATTER,
    SOURCES_THAT_MATTER,
    Domain,
    ModelSize,
    WarmUpSettings,
    digest_of_parts,
    package_versions,
)
from copd_megatron.tiny.tasks.text import Family

VISUAL_SOURCES = ("vl.py", "vl_demonstrations.py")
VISUAL_PACKAGES = ("av", "numpy", "pillow")
"""In addition to those of the text base."""


@dataclass(frozen=True, kw_only=True)
class VisualDomain:
    """One capability: tasks of a visual family (``tiny.tasks``), and the steps that demonstrations of it
    show."""

    name: str
    """Name of the branch and its shards."""
    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that replace the family's defaults."""
    working: str
    """Key of ``vl_demonstrations.VISUAL_WORKINGS``."""
    weight: float = 1.0
    """Share of the warm-up's demonstrations, relative to the other domains' weights."""


@dataclass(frozen=True, kw_only=True)
class VisionSize:
    """Qwen3-VL vision tower and processor. A decoder token covers a square of ``patch_size *
    spatial_merge_size`` pixels."""

    depth: int = 3
    hidden_size: int = 64
    intermediate_size: int = 128
    num_heads: int = 2
    patch_size: int = 8
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    num_position_embeddings: int = 64
    deepstack_visual_indexes: tuple[int, ...] = (0, 1)
    image_pixels: tuple[int, int] = (32 * 32, 128 * 128)
    """Fewest and most pixels of an image; others are resized."""
    video_pixels: tuple[int, int] = (2 * 32 * 32, 32 * 64 * 64)
    """Fewest and most pixels of a video, over all frames."""


@dataclass(frozen=True, kw_only=True)
class VisualBase:
    text: Domain
    visual: tuple[VisualDomain, ...]
    model: ModelSize = field(default_factory=ModelSize)
    vision: VisionSize = field(default_factory=VisionSize)
    warm_up: WarmUpSettings = field(default_factory=WarmUpSettings)
    pool_size: int = 2000
    """Distinct tasks per visual domain in the warm-up. Each is shown several times, since drawing and
    encoding a task costs more than learning from it."""
    data_seed: int = 1
    """Seed of the shards. The warm-up does not see their validation tasks."""
    num_train: int = 1500
    """Training tasks per domain."""
    num_validation: int = 200
    num_threads: int = 1
    """Sums of floats depend on it, and so do the weights. A second thread gains little on matrices this small
    and costs much when the machine is busy."""
    num_processes: int = 2
    """Each makes the gradient of its share of a batch. Sums of floats depend on it as well."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all domains, the text domain first."""
        return (self.text.name, *(domain.name for domain in self.visual))


VL_BASE = VisualBase(
    text=Domain(
        name="text",  # "Calculate 4 + 1 + 7 + 9."
        family=Family(
            name="basic_arithmetic",
            settings={
                "min_terms": 3,
                "max_terms": 5,
                "min_digits": 1,
                "max_digits": 1,
                "operators": ["+"],
                "allow_parentheses": False,
            },
        ),
        working="running_total",
    ),
    visual=(
        VisualDomain(
            name="image",  # "Sum of the digits?", written side by side
            family="read_digits",
            settings={"image_size": 96, "min_digits": 3, "max_digits": 5, "ask_sum": True},
            working="written_digits",
            weight=1.2,
        ),
        VisualDomain(
            name="video",  # "Sum of the digits?", shown one after the other
            family="digit_sequence",
            settings={"min_digits": 3, "max_digits": 5, "ask_sum": True},
            working="shown_digits",
        ),
    ),
    model=ModelSize(intermediate_size=384),
    warm_up=WarmUpSettings(num_steps=450, batch_size=36, early_fraction=0.65, worked_share=0.3),
)
"""The base model and the three domains of the quickstart."""


def visual_data_digest(recipe: VisualBase) -> str:
    """A digest of everything that determines the shards."""
    domains = [(domain.name, domain.family, dict(domain.settings)) for domain in recipe.visual]
    parts = [recipe.data_seed, recipe.num_train, recipe.num_validation]
    text = [recipe.text.name, asdict(recipe.text.family)]
    packages = package_versions(["reasoning-gym", *VISUAL_PACKAGES])
    return digest_of_parts([parts, text, domains, task_sources(), packages])


def task_sources() -> dict[str, str]:
    """The code that draws the tasks, by file name."""
    folder = Path(__file__).parent / "tasks"
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def visual_base_digest(recipe: VisualBase, seed: int) -> str:
    """A digest of everything that determines the model: recipe, seed, code, package versions."""
    here = Path(__file__).parent
    names = (*SOURCES_THAT_MATTER, *VISUAL_SOURCES)
    sources = {name: (here / name).read_text(encoding="utf-8") for name in names}
    packages = package_versions([*PACKAGES_THAT_MATTER, *VISUAL_PACKAGES])
    return digest_of_parts([visual_data_digest(recipe), asdict(recipe), seed, sources, packages])
