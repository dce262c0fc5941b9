"""The page that leads from a file of questions to a report: its commands, run as they stand there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import ROOT, environment
from tests.support.models_vl import make_vl_model
from tests.test_pages import PACKAGE, blocks

PAGE = PACKAGE / "data/convert/README.md"
SMALL = (
    *("schedule.cycles=1", "schedule.rlvr_steps=1", "schedule.opd_steps=1", "run.device=cpu"),
    *("opd.num_prompts_per_step=2", "logging.console=false", "media.num_workers=1"),
    *(
        f"branches.{b}.{s}"
        for b in ("sums", "shapes")
        for s in ("num_prompts_per_step=4", "num_generations_per_prompt=2")
    ),
    *(f"branches.{b}.rollout.max_new_tokens=4" for b in ("sums", "shapes")),
)


def questions(folder: Path) -> None:
    """As many as the page asks for, in the form of its own lines."""
    shape, sums = blocks(PAGE, "json")[0].splitlines()
    (folder / "shapes/pictures").mkdir(parents=True)
    (folder / "sums").mkdir()
    for number in range(40):
        picture = Image.new("RGB", (32, 32), (6 * number, 40, 90))
        picture.save(folder / f"shapes/pictures/{number:03d}.png")
    lines = [shape.replace("000.png", f"{number:03d}.png") for number in range(40)]
    (folder / "shapes/shapes.jsonl").write_text("\n".join(lines))
    lines = [sums.replace("4 + 5", f"{n} + 5").replace('"9"', f'"{n + 5}"') for n in range(40)]
    (folder / "sums/sums.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_the_pages_commands_lead_to_a_report(tmp_path: Path) -> None:
    questions(tmp_path)
    make_vl_model(tmp_path / "base", tied=True)
    (tmp_path / "my.yaml").write_text(blocks(PAGE, "yaml")[0])
    said = ""
    for command in "".join(blocks(PAGE, "bash")).splitlines():
        words = shlex.split(command)[1:]
        small = SMALL if words[0] in ("train", "eval") else ()
        done = subprocess.run(
            [sys.executable, "-m", "copd_megatron.cli", *words, *small],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(ROOT), PATH=os.environ["PATH"]),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
        said += done.stdout
    assert "32 training samples" in said and "merged - base" in said and "(numeric)" in said
    page = (tmp_path / "runs/mine/report.html").read_text()
    assert "What the models answered" in page and "data:image/jpeg" in page, "with the prompts' pictures"
