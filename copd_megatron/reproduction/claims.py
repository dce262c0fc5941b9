"""The paper's claims, as differences between arms that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from copd_megatron.evaluation.statistics import Estimate

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "cannot be told at this scale"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A difference or another figure that the paper says is above a bound."""

    text: str
    figure: str
    """Name of what decides it: ``copd - mixed_longer``, or ``overlap``."""
    bound: float = 0.0
    above: bool = True
    """Whether the claim is that the figure is above the bound, rather than below."""
    source: str = "paper"


CLAIMS = (
    Claim(text="CoPD beats mixed RLVR with the branches' steps together", figure="copd - mixed_longer"),
    Claim(text="CoPD beats mixed RLVR with the branches' batches together", figure="copd - mixed_wider"),
    Claim(text="CoPD beats static distillation both ways", figure="copd - static"),
    Claim(text="CoPD beats distillation from several frozen experts (MOPD)", figure="copd - mopd"),
    Claim(text="CoPD beats the mean of independent experts", figure="copd - experts_mean", source="ours"),
    Claim(
        text="CoPD beats the mean of independent experts at equal sampling",
        figure="copd_short - experts_mean",
        source="ours",
    ),
    Claim(text="the merged model beats the experts at home", figure="copd - experts at home"),
    Claim(text="the merged model beats its branches", figure="copd - branches of copd"),
    Claim(
        text="live teachers beat teachers of the phase's start", figure="copd - copd_snapshot", source="ours"
    ),
    Claim(text="both directions beat one (only alpha taught)", figure="copd - copd_to_alpha"),
    Claim(text="both directions beat one (only beta taught)", figure="copd - copd_to_beta"),
    Claim(text="S_RL : S_OPD of 1.5 beats 0.5", figure="copd - copd_ratio_0_5"),
    Claim(text="S_RL : S_OPD of 1.5 beats 1", figure="copd - copd_ratio_1"),
    Claim(text="S_RL : S_OPD of 1.5 beats 2", figure="copd - copd_ratio_2"),
    Claim(text="S_RL : S_OPD of 1.5 beats 3", figure="copd - copd_ratio_3"),
    Claim(text="the overlap of CoPD's branches stays above 0.90", figure="least overlap of copd", bound=0.90),
    Claim(
        text="the branches' symmetric KL is a fraction (below half) of independent training's",
        figure="symmetric KL, copd : independent",
        bound=0.5,
        above=False,
    ),
    Claim(
        text="a student gains more where it overlaps more with its teacher", figure="r of gain and overlap"
    ),
)


def decide(claim: Claim, found: Estimate) -> str:
    """``HOLDS`` or ``FAILS`` where the whole interval lies on one side of the bound, else ``OPEN``."""
    above, below = found.low > claim.bound, found.high < claim.bound
    if above == below:
        return OPEN
    return HOLDS if above == claim.above else FAILS


def verdicts(figures: Mapping[str, Estimate]) -> list[tuple[Claim, Estimate, str]]:
    """The claims whose figures were measured, with what they say."""
    return [(c, figures[c.figure], decide(c, figures[c.figure])) for c in CLAIMS if c.figure in figures]
