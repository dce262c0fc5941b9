"""Every part of ``tools/gpu_check.py`` on a real GPU: ``python -m pytest -m gpu``, about half an hour.

Correctness and agreement have to meet the aims of the script. Speeds and memory are measured: they have to
run, and the table that the script prints says what was aimed at.
"""

from __future__ import annotations

from pathlib import Path

import gpu_check
import pytest

from tests.support.gpu import run_gpu_check

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(2400)]

HELD_TO_AIMS = (*gpu_check.GROUPS["correctness"], *gpu_check.GROUPS["agreement"])
MEASURED = tuple(part for part in gpu_check.PARTS if part not in HELD_TO_AIMS)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and results of all parts."""
    return tmp_path_factory.mktemp("gpu_check")


def measure(part: str, work: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs a part and shows its figures; the aims that it missed."""
    results, output = run_gpu_check(work, "--part", part, "--total-minutes", "35")
    mine = {name: result for name, result in results.items() if name.split()[0] == part}
    with capsys.disabled():
        print("\n" + gpu_check.table(mine))
    assert mine and not [name for name, result in mine.items() if "error" in result], output
    return gpu_check.missed(mine)


@pytest.mark.parametrize("part", HELD_TO_AIMS)
def test_numbers_agree(part: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(part, work, capsys) == []


@pytest.mark.parametrize("part", MEASURED)
def test_speed_and_memory_are_measured(part: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(part, work, capsys)
