"""The parts of ``tools/gpu_check.py`` by name: what the process of a part runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import gpu_correctness
import gpu_speed
from gpu_measure import Figures

PARTS: dict[str, Callable[[argparse.Namespace, Figures], None]] = {
    "environment": gpu_correctness.environment,
    "scores": gpu_correctness.scores,
    "packing": gpu_correctness.packing,
    "sync": gpu_correctness.sync,
    "cycle": gpu_correctness.cycle,
    "training": gpu_speed.training,
    "rollout": gpu_speed.rollout,
    "steps": gpu_speed.steps,
}
