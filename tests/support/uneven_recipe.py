"""CoPD whose branches stall in turn: the first one in even steps, the others in odd ones."""

import os
import time

from copd_megatron.branch.schedule import Step
from copd_megatron.branch.state import Batch, Branch
from copd_megatron.recipes.base import Recipe
from copd_megatron.recipes.copd import RECIPE as COPD

SECONDS = "COPD_TEST_STALL_SECONDS"
"""Environment variable: how long a stall takes."""


def stall(me: Branch, step: Step, batch: Batch) -> Batch:
    """Stage of a step: sleeps in every second step."""
    first = me.name == me.world.branches[0]
    with me.world.watch.operation("rollout.generate stalls", ranks=(me.world.rank,)):
        time.sleep(float(os.environ.get(SECONDS, "1")) * ((step.index % 2 == 0) == first))
    return batch


RECIPE = Recipe(stages=(*COPD.stages[:1], stall, *COPD.stages[1:]))
