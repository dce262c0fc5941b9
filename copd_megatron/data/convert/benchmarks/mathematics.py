"""Text mathematics: a problem and its answer."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.data.convert.benchmarks.layout import Layout, kept, text
from copd_megatron.data.convert.public_sets import PublicTask
from copd_megatron.data.convert.rows import Row


def problem_and_answer(
    question: tuple[str, ...] = ("problem",),
    answer: tuple[str, ...] = ("answer",),
    keep: tuple[str, ...] = (),
) -> Layout:
    """The layout of a set whose problem is in one of the fields ``question``, its answer in one of
    ``answer``."""

    def layout(row: Row, source: Path, where: str) -> PublicTask:
        return PublicTask(
            question=text(row, question, where),
            answer=text(row, answer, where),
            verifier="math",
            metadata=kept(row, keep),
        )

    return layout
