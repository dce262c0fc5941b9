"""The benchmarks: what each is called, how many questions it has, and how its files are laid out.

A new benchmark is an entry here, and a function in the file of its family if its rows look like none of the
others'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from copd_megatron.data.convert.benchmarks.layout import Layout
from copd_megatron.data.convert.benchmarks.mathematics import problem_and_answer
from copd_megatron.data.convert.benchmarks.mmmu import mmmu, mmmu_pro, mmmu_pro_vision
from copd_megatron.data.convert.benchmarks.video import (
    MVBENCH_FOLDERS,
    mmvu,
    mvbench,
    video_holmes,
    videomathqa,
)
from copd_megatron.data.convert.benchmarks.visual_mathematics import (
    mathverse,
    mathvision,
    mathvista,
    wemath,
    zerobench,
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark and the layout in which it is published."""

    count: int
    """Questions that it has."""
    layout: Layout
    num_generations: int = 1
    """Responses per question for a stable figure: many where there are few questions."""
    identity: tuple[str, ...] = ()
    """Metadata that no two questions share: a part given twice in place of another is found out. Where there
    is none, no two questions have the same text and media."""
    max_repeats: int = 0
    """Questions of which text and media may occur before: as many as the benchmark has in its published form
    at the most."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Metadata key to the number of its values: tasks, subjects, versions. All have equally many
    questions."""


BENCHMARKS: dict[str, Benchmark] = {
    # text
    "aime24": Benchmark(
        count=30,
        num_generations=32,
        layout=problem_and_answer(("problem", "Problem"), ("answer", "Answer"), ("id", "ID")),
    ),
    "aime25": Benchmark(
        count=30, num_generations=32, layout=problem_and_answer(("problem", "question"), keep=("id",))
    ),
    "hmmt25": Benchmark(
        count=30, num_generations=32, layout=problem_and_answer(keep=("problem_idx", "problem_type"))
    ),
    "math500": Benchmark(count=500, layout=problem_and_answer(keep=("subject", "level", "unique_id"))),
    "minerva": Benchmark(count=272, layout=problem_and_answer(("question", "problem")), num_generations=4),
    # images
    "mmmu": Benchmark(count=900, layout=mmmu, identity=("id",), parts={"subject": 30}),
    "mmmu_pro": Benchmark(count=1730, layout=mmmu_pro, identity=("id",)),
    "mmmu_pro_vision": Benchmark(count=1730, layout=mmmu_pro_vision, identity=("id",)),
    "mathvista": Benchmark(count=1000, layout=mathvista, identity=("pid",)),
    "mathvision": Benchmark(count=3040, layout=mathvision, identity=("id",)),
    "mathvision_mini": Benchmark(count=304, layout=mathvision, identity=("id",)),
    "mathverse": Benchmark(
        count=3940, layout=mathverse, identity=("sample_index",), parts={"problem_version": 5}
    ),
    "wemath": Benchmark(count=1740, layout=wemath, identity=("ID", "key")),
    "zerobench": Benchmark(count=100, layout=zerobench, identity=("question_id",), num_generations=5),
    "zerobench_sub": Benchmark(count=334, layout=zerobench, identity=("question_id",), num_generations=5),
    # videos
    "video_holmes": Benchmark(count=1837, layout=video_holmes),
    "mvbench": Benchmark(count=4000, layout=mvbench, parts={"task": len(MVBENCH_FOLDERS)}, max_repeats=40),
    "mmvu": Benchmark(count=1000, layout=mmvu, identity=("id",)),
    "videomathqa": Benchmark(count=420, layout=videomathqa, identity=("question_id",)),
}
"""By the name that its shards get. Layouts are those of the usual Hugging Face repositories: AIME 2024 and
2025 (in one file or in two of fifteen), HMMT February 2025, MATH-500, Minerva; MMMU (validation, a file per
subject), MMMU-Pro (standard with ten options, and vision), MathVista (testmini), MathVision (test and
testmini), MathVerse (testmini), WeMath (testmini), ZeroBench (and its subquestions); Video-Holmes (test),
MVBench (a file per task), MMVU (validation), VideoMathQA (multiple choice)."""
