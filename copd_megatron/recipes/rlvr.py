"""Reinforcement learning with verifiable rewards alone: single-domain experts, or one model on mixed data.

Branches neither teach nor compare themselves with each other, so nothing crosses between them.
"""

from copd_megatron.branch.native import native
from copd_megatron.branch.update import sync, update
from copd_megatron.recipes.base import Recipe

RECIPE = Recipe(stages=(native, update, sync), distils=False)
