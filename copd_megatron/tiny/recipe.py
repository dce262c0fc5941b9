"""Everything that determines the tiny base model and its domains. Imports no torch.

The digest of the recipe is stored beside the weights, so after a change here ``tools/make_tiny_base.py``
makes a new model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from copd_megatron.tiny.tasks.text import Family

SOURCES_THAT_MATTER = ("demonstrations.py", "muon.py", "shares.py", "tokenizer.py", "warm_up.py")
PACKAGES_THAT_MATTER = ("reasoning-gym", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One capability: tasks of a reasoning-gym family, and the steps that demonstrations of it show."""

    name: str
    """Name of the branch and its shards."""
    family: Family
    working: str
    """Key of ``demonstrations.WORKINGS``."""
    weight: float = 1.0
    """Share of the warm-up's demonstrations, relative to the other domains' weights."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Qwen3 dimensions. Layers, heads, key-value heads and vocabulary are even, for TP 2 and PP 2."""

    vocab_size: int = 320
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    """The smallest that vLLM's CPU attention supports."""
    rope_theta: float = 10000.0
    max_position_embeddings: int = 512


@dataclass(frozen=True, kw_only=True)
class WarmUpSettings:
    """Settings of the supervised stage."""

    num_steps: int = 800
    batch_size: int = 32
    """Demonstrations per step."""
    worked_share: float = 0.35
    """Fraction of demonstrations that work step by step; the others answer immediately. Below a half, so that
    the most likely response is an immediate answer."""
    early_fraction: float = 0.0
    """Fraction of the steps that count as early."""
    early_worked_share: float = 0.9
    """``worked_share`` of early demonstrations. Steps are shown first, because answers alone teach little."""
    matrix_lr: float = 6e-3
    """Peak learning rate of Muon, which updates the matrices of the layers."""
    vector_lr: float = 3e-3
    """Peak learning rate of Adam, which updates embeddings and norms."""
    lr_warmup_steps: int = 40
    final_lr_fraction: float = 0.03
    """The rate falls linearly to this fraction of its peak."""
    clip_grad: float = 1.0
    length_window: int = 16
    """Number of batches that are formed together by length, to reduce padding."""

    def worked_share_at(self, progress: float) -> float:
        """Fraction of demonstrations that work step by step, after ``progress`` (0 .. 1) of them."""
        return self.early_worked_share if progress < self.early_fraction else self.worked_share


@dataclass(frozen=True, kw_only=True)
class TextBase:
    domains: tuple[Domain, ...]
    model: ModelSize = field(default_factory=ModelSize)
    warm_up: WarmUpSettings = field(default_factory=WarmUpSettings)
    data_seed: int = 1
    """Seed of the shards. The warm-up does not see their validation tasks."""
    num_train: int = 4000
    """Training tasks per domain."""
    num_validation: int = 300
    num_threads: int = 1
    """Sums of floats depend on it, and so do the weights. A second thread gains little on matrices this small
    and costs much when the machine is busy."""
    num_processes: int = 2
    """Each makes the gradient of its share of a batch. Sums of floats depend on it as well."""


TEXT_BASE = TextBase(
    domains=(
        Domain(
            name="addition",  # "Calculate 261 + 120."
            family=Family(
                name="basic_arithmetic",
                settings={
                    "min_terms": 2,
                    "max_terms": 2,
                    "min_digits": 1,
                    "max_digits": 3,
                    "operators": ["+"],
                    "allow_parentheses": False,
                },
            ),
            working="columns",
        ),
        Domain(
            name="running_sums",  # "Calculate 4 + 1 + 7 + 9."
            family=Family(
                name="basic_arithmetic",
                settings={
                    "min_terms": 3,
                    "max_terms": 6,
                    "min_digits": 1,
                    "max_digits": 1,
                    "operators": ["+"],
                    "allow_parentheses": False,
                },
            ),
            working="running_total",
        ),
    ),
    warm_up=WarmUpSettings(num_steps=800, early_fraction=0.65, worked_share=0.3),
)
"""The base model and the two domains of ``launchers/quickstart.sh --text``."""


PROGRAMS = Domain(
    name="programs",  # "Write f: add 3, times 2."
    family=Family(name="programs", settings={"min_steps": 1, "max_steps": 3}),
    working="build_up",
)
CODE_BASE = TextBase(
    domains=(*TEXT_BASE.domains, PROGRAMS),
    warm_up=WarmUpSettings(num_steps=1200, early_fraction=0.65, worked_share=0.3),
)
"""The base model and the three domains of ``configs/three_branch_code_tiny.yaml``."""


def data_digest(recipe: TextBase) -> str:
    """A digest of everything that determines the shards."""
    parts = [recipe.data_seed, recipe.num_train, recipe.num_validation]
    families = [(domain.name, asdict(domain.family)) for domain in recipe.domains]
    return digest_of_parts([parts, families, package_versions(["reasoning-gym"])])


def base_digest(recipe: TextBase, seed: int) -> str:
    """A digest of everything that determines the model: recipe, seed, code, package versions."""
    here = Path(__file__).parent
    sources = {name: (here / name).read_text(encoding="utf-8") for name in SOURCES_THAT_MATTER}
    return digest_of_parts([asdict(recipe), seed, sources, package_versions(PACKAGES_THAT_MATTER)])


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}


def digest_of_parts(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()
