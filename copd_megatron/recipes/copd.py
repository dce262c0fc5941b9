"""Co-evolving policy distillation, and everything that is a choice of its graph and schedule.

With other edges, frozen branches and phases the same stages are static on-policy distillation (edges from a
frozen expert), distillation from several teachers into one student, and one-way variants. They are lines 5 to
12 of Algorithm 1.
"""

from copd_megatron.branch.cross import answer, cross
from copd_megatron.branch.native import native
from copd_megatron.branch.update import sync, update
from copd_megatron.recipes.base import Recipe

RECIPE = Recipe(stages=(answer, native, cross, update, sync))
