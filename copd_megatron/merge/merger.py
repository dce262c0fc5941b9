"""One merge, opened: its inputs, the plan of the result, and the arithmetic from block to block."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from copd_megatron.errors import ConfigError
from copd_megatron.formats.open import Format, make_sink, open_source
from copd_megatron.formats.tensors import ShardWriter, TensorSink, TensorSource, identities
from copd_megatron.hf.dtypes import dtype_named
from copd_megatron.hf.model_config import read_sizes
from copd_megatron.hf.tensors import BLOCK_ELEMENTS, TensorSpec, block_range
from copd_megatron.merge.check import NotFiniteError, check_mergeable
from copd_megatron.merge.methods import Settings, start
from copd_megatron.merge.recipe import MergeRecipe, layer_depths
from copd_megatron.merge.scratch import scratch

SHARD_BYTES = 2 * 2**30
_Runner = Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]
Advance = Callable[[str, int], None]
"""Told of progress, from any thread: a tensor, and the bytes of it that are done beyond those told before."""


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """All that a worker process needs to do its part."""

    recipe: MergeRecipe
    folder: Path
    """The unfinished result."""
    shard_bytes: int = SHARD_BYTES
    allow: tuple[str, ...] = ()
    """Configuration keys that may differ between the models."""
    allow_nan: bool = False
    """NaN and infinities pass."""
    fsync: bool = False
    output_format: Format = "hf"
    keep_files: bool = False
    """Tensors lie in the result's files as in those of the first input's Hugging Face folder, where that is
    known; a result in Megatron's format keeps how they lie."""
    model_path: Path | None = None
    """Folder with configuration and tokenizer for inputs in Megatron's format; None: as they know it."""


@dataclass(frozen=True, kw_only=True)
class Team:
    """The threads that share a shard's work."""

    size: int
    pool: ThreadPoolExecutor | None = None
    """None: the calling thread alone."""


@dataclass(frozen=True, kw_only=True)
class ShardOutcome:
    """A shard that has been written."""

    digest: str
    equals: tuple[int, ...]
    """Inputs that hold the same, element for element."""


class Merger:
    """An opened job.

    Raises:
        FileNotFoundError: an input is not there, or the configuration that belongs to all of them.
        CheckpointError: an input is damaged.
        MismatchError: the inputs cannot be merged.
        ConfigError, ValueError: a parameter lacks a value for some tensor, or the format cannot hold the
            model.
    """

    def __init__(self, job: MergeJob) -> None:
        self.job = job
        single_experts = job.recipe.copies and job.output_format == "megatron"
        self.sources: list[TensorSource] = [
            open_source(path, model_path=job.model_path, single_experts=single_experts)
            for path in job.recipe.inputs
        ]
        check_mergeable(self.sources, allow=job.allow)
        names = self.sources[0].names()
        self.unused = job.recipe.unused_filters(names)
        """What the recipe says of tensors that are not there, in words."""
        if self.unused and job.recipe.origin == "merge":
            raise ConfigError(
                f"merge: {self.unused[0]}; the first entry that fits a tensor counts, so put patterns before "
                f"what is for all, and write them as in {names[len(names) // 2]}"
            )
        self._depths = layer_depths(names)
        self._settings = {name: self._resolve(name) for name in names}
        self.companions = self._find_companions()
        self.sink = self._make_sink([self._out_spec(name) for name in names])

    def _make_sink(self, specs: list[TensorSpec]) -> TensorSink:
        job, first = self.job, self.sources[0]
        dims = next((source.dims for source in self.sources if source.dims), None)
        if job.output_format == "megatron":
            dims = dims or read_sizes(self.companions, "model")
            if dims.stacks_experts and not job.recipe.copies:
                raise ValueError(
                    f"merge: a {dims.architecture} cannot be merged into Megatron's format straight away, "
                    "since its experts lie transposed there: write Hugging Face's (--format hf), and convert "
                    "that"
                )
        template = first.template if job.keep_files else None
        if template is not None and job.recipe.out_dtype is not None:
            template = template.in_type(dtype_named(job.recipe.out_dtype))
        return make_sink(
            job.output_format,
            job.folder,
            specs,
            job.shard_bytes,
            dims=dims,
            companions=self.companions,
            label=first.label if job.recipe.copies else "the merged model",
            template=template,
            fsync=job.fsync,
        )

    def _find_companions(self) -> Path:
        """Folder whose configuration and tokenizer the result gets: the one asked for, or any (a branch in
        Megatron's format knows its model's folder, which may be gone)."""
        chosen = self.sources[self.job.recipe.companion_index()]
        for source in (chosen, *self.sources):
            if source.companions is not None:
                return source.companions
        raise FileNotFoundError(
            f"the Hugging Face folder that {chosen.label} was trained from is gone, and no other input has "
            "configuration and tokenizer; put it back, or convert one input with --model FOLDER first "
            "(copd checkpoint to-hf)"
        )

    def _resolve(self, name: str) -> Settings:
        recipe = self.job.recipe
        found = recipe.resolve(name, self._depths[name])
        settings = Settings(
            weights=found.weights,
            densities=found.densities,
            normalize=bool(found.shared.get("normalize", False)),
            rescale=bool(found.shared.get("rescale", False)),
            scale=float(found.shared.get("lambda", 1.0)),
            t=float(found.shared.get("t", 0.0)),
            seed=recipe.seed,
            arithmetic=dtype_named(recipe.arithmetic) if recipe.arithmetic else None,
        )
        spec = self._working_spec(name)
        if spec.dtype.is_floating_point:
            start(recipe.method, TensorSpec(name, (0,), spec.dtype), settings)  # refuses what cannot be
        return settings

    def _working_spec(self, name: str) -> TensorSpec:
        """The tensor in the type that all inputs are brought to."""
        spec = self.sources[0].spec(name)
        dtype = spec.dtype
        if dtype.is_floating_point and self.job.recipe.dtype:
            dtype = dtype_named(self.job.recipe.dtype)
        elif dtype.is_floating_point:
            for source in self.sources[1:]:
                if source.spec(name).dtype != dtype:
                    dtype = torch.promote_types(dtype, source.spec(name).dtype)
        return TensorSpec(name, spec.shape, dtype)

    def _out_spec(self, name: str) -> TensorSpec:
        working, wanted = self._working_spec(name), self.job.recipe.out_dtype
        if wanted == "first":
            return self.sources[0].spec(name)
        if wanted is None or not working.dtype.is_floating_point:
            return working
        return TensorSpec(name, working.shape, dtype_named(wanted))

    def fingerprint(self) -> str:
        """What the result depends on: recipe, inputs, cut into shards."""
        recipe = {key: value for key, value in asdict(self.job.recipe).items() if key != "origin"}
        inputs = identities(self.sources)
        cut = [self.job.output_format, self.job.shard_bytes, self.job.keep_files, BLOCK_ELEMENTS]
        text = json.dumps([recipe, inputs, *cut], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def shard_bytes(self, index: int) -> int:
        """Size of a shard's tensors."""
        return sum(spec.num_bytes for spec in self.sink.shards[index])

    # ---- from block to block -----------------------------------------------------------------------------

    def merge_shard(self, index: int, team: Team, advance: Advance) -> ShardOutcome:
        """Writes one shard.

        Raises:
            NotFiniteError: an input holds NaN or infinities, or the result would.
            OSError: the disk is full, or an input changed.
        """
        runner: _Runner = map if team.pool is None else team.pool.map
        writer = self.sink.open(index)
        shard = self.sink.shards[index]
        alike = _Alike(len(self.sources))
        split = [spec for spec in shard if team.size > 1 and spec.num_blocks >= 8 * team.size]
        whole = [spec for spec in shard if spec not in split]
        try:
            for spec in split:
                self._merge_tensor(spec, writer, runner, alike, advance)
            one = partial(self._merge_tensor, writer=writer, runner=map, alike=alike, advance=advance)
            for _ in runner(one, whole):
                pass
            return ShardOutcome(digest=writer.close(), equals=alike.indices)
        except BaseException:
            if team.pool is not None:
                team.pool.shutdown(wait=True, cancel_futures=True)
            writer.abort()
            raise

    def _merge_tensor(
        self, spec: TensorSpec, writer: ShardWriter, runner: _Runner, alike: _Alike, advance: Advance
    ) -> None:
        working = self._working_spec(spec.name)
        if not working.dtype.is_floating_point:
            merge_block: Callable[[int, list[Tensor]], Tensor] = partial(self._agreed, spec.name)
        else:
            merge = start(self.job.recipe.method, working, self._settings[spec.name])
            merge_block = merge.combine

            def look(block: int) -> None:
                merge.measure(block, self._read(working, block))

            while merge.pending:
                for _ in runner(look, range(spec.num_blocks)):
                    pass
                merge.advance()

        def put(block: int) -> None:
            values = self._read(working, block)
            merged = scratch.cast("result", merge_block(block, values), spec.dtype)
            if not self.job.allow_nan and spec.dtype.is_floating_point and not _is_finite(merged):
                raise self._not_finite(spec, working, values)
            alike.compare(merged, values)
            writer.write(spec.name, block_range(spec, block)[0], merged)
            advance(spec.name, merged.numel() * merged.element_size())

        for _ in runner(put, range(spec.num_blocks)):
            pass

    def _read(self, working: TensorSpec, block: int) -> list[Tensor]:
        """The block of every input, in the working type."""
        begin, end = block_range(working, block)
        values = []
        for index, source in enumerate(self.sources):
            value = scratch.get(f"input{index}", end - begin, source.spec(working.name).dtype)
            source.read_into(working.name, begin, value)
            if value.dtype != working.dtype:
                value = scratch.cast(f"working{index}", value, working.dtype)
            values.append(value)
        return values

    def _agreed(self, name: str, block: int, values: list[Tensor]) -> Tensor:
        """Tensors of whole numbers (buffers, masks) are not merged; all models must agree on them."""
        for source, value in zip(self.sources[1:], values[1:], strict=True):
            if not torch.equal(value, values[0]):
                raise ValueError(
                    f"merge: {name} holds no floating-point numbers and differs between {source.label} and "
                    f"{self.sources[0].label}; make them equal first"
                )
        return values[0]

    def _not_finite(self, spec: TensorSpec, working: TensorSpec, values: list[Tensor]) -> NotFiniteError:
        """What to say of a block that came out with NaN or infinities in it."""
        for source, value in zip(self.sources, values, strict=True):
            if not _is_finite(value):
                kind = "NaN" if value.isnan().any() else "infinities"
                return NotFiniteError(
                    f"merge: {spec.name} of {source.label} holds {kind}, and so would the result: leave that "
                    "model out, or let them pass (--allow-nan)"
                )
        return NotFiniteError(
            f"merge: {spec.name} becomes too large for {spec.dtype} (the inputs are finite, as "
            f"{working.dtype}): choose a wider --out-dtype, or let infinities pass (--allow-nan)"
        )


class _Alike:
    """Which inputs hold, element for element, what comes out. Told of blocks by several threads."""

    def __init__(self, count: int) -> None:
        self._left = set(range(count))
        self._lock = threading.Lock()

    @property
    def indices(self) -> tuple[int, ...]:
        """Those that held the same in every block so far."""
        return tuple(sorted(self._left))

    def compare(self, merged: Tensor, values: list[Tensor]) -> None:
        """Compares a block of the result with that of the inputs, as long as there is one that equals it."""
        for index in self.indices:
            if not torch.equal(merged, values[index].to(merged.dtype)):
                with self._lock:
                    self._left.discard(index)


def _is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor an infinity among them (not none at all)."""
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())
