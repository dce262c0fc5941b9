"""The files of samples: ``samples/<branch>/<what>-<step>.jsonl.gz`` in the run directory.

``what`` is ``train``, or the name of the model that an evaluation measured. A file is written at once and
replaces what an earlier attempt at the same step left, so that nothing is ever doubled or half written. Each
branch writes its own folder, by one rank.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.errors import DataError
from copd_megatron.samples.record import Kind, Sample, Verdict, from_line, to_line
from copd_megatron.untrusted.json_text import lines_of
from copd_megatron.untrusted.regular_file import open_regular
from copd_megatron.untrusted.whole_file import write_whole

FOLDER = "samples"
TRAIN = "train"
_MAX_FILE_BYTES = 1 << 30
"""Most that a file may expand to. What is written has a few megabytes."""
_NAME = re.compile(r"(?P<what>.+)-(?P<step>\d{6,})\.jsonl\.gz")


def write_samples(folder: Path, what: str, step: int, samples: Sequence[Sample]) -> int:
    """Writes one file of a branch's folder and returns its size in bytes. Equal samples give equal bytes.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    lines = "".join(to_line(sample) + "\n" for sample in samples)
    data = gzip.compress(lines.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}-{step:06d}.jsonl.gz"
    write_whole(path, data)
    return len(data)


def remove_after(folder: Path, step: int) -> None:
    """Removes the files of later steps, which a resumed run writes again."""
    for path, _, later in _files(folder):
        if later > step:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which samples are wanted. None stands for all."""

    steps: tuple[int, int] | None = None
    """First and last."""
    branch: str | None = None
    """Folder that holds them: the branch that sampled."""
    kind: Kind | None = None
    edge: str | None = None
    verdict: Verdict | None = None
    text: str | None = None
    """Part of the prompt's text or of its id, in any case."""

    def takes(self, sample: Sample) -> bool:
        """Whether a sample is wanted, the branch and the step apart."""
        text = (self.text or "").lower()
        return (
            (self.kind is None or sample.kind is self.kind)
            and (self.edge is None or sample.edge == self.edge)
            and (self.verdict is None or sample.verdict is self.verdict)
            and (text in sample.prompt.lower() or text in sample.prompt_id.lower())
        )


def read_samples(run_dir: str | Path, selection: Selection | None = None) -> Iterator[Sample]:
    """The samples of a run in order of steps, then of branches.

    Raises:
        FileNotFoundError: the run has none.
        DataError: a branch that has none is named, or a file is damaged.
    """
    wanted, folder = selection or Selection(), Path(run_dir) / FOLDER
    branches = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not branches:
        raise FileNotFoundError(
            f"{folder}: no samples; give a run directory, of a run with logging.samples.per_step above 0"
        )
    if wanted.branch is not None and wanted.branch not in branches:
        raise DataError(f"{folder} has no branch {wanted.branch!r}. It has {', '.join(branches)}.")
    found = [
        (step, branch, what, path)
        for branch in branches
        if wanted.branch in (None, branch)
        for path, what, step in _files(folder / branch)
        if wanted.steps is None or wanted.steps[0] <= step <= wanted.steps[1]
    ]
    for *_, path in sorted(found):
        yield from (sample for sample in _read(path, Path(run_dir)) if wanted.takes(sample))


def _read(path: Path, run_dir: Path) -> Iterator[Sample]:
    """A file's samples, decompressed line by line: what a small file expands to is never held as a whole."""
    try:
        with open_regular(path, inside=run_dir) as packed, gzip.open(packed) as file:
            for number, text, _ in lines_of(file, path):
                if file.tell() > _MAX_FILE_BYTES:
                    raise ValueError(f"it expands to more than {_MAX_FILE_BYTES} bytes")
                yield from_line(text, f"{path}, line {number}")
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Remove it; others stay readable.") from error


def _files(folder: Path) -> Iterator[tuple[Path, str, int]]:
    """Path, what and step of a branch's files."""
    for path in folder.glob("*.jsonl.gz"):
        if (match := _NAME.fullmatch(path.name)) is not None:
            yield path, match["what"], int(match["step"])
