"""Fixtures and rules of all tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from copd_megatron.data.processing import MultimodalProcessor
from tests.support import vision_streams
from tests.support.disks import small_disk
from tests.support.models import make_model
from tests.support.models_vl import MEDIA, make_processor
from tests.support.slurm_cluster import Cluster, running_cluster

# on a busy machine, a first call that imports something takes seconds; what must end has a limit of its own
settings.register_profile("any machine", settings(), deadline=None)
settings.load_profile("any machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` skip themselves on a machine without one."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What hostile input made a test print has characters that no encoding has; a report travels without."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_encodable(inner) for inner in value)
    return value


@pytest.fixture(scope="session")
def layout_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a ``dense`` model with tied embeddings and of a ``mixture`` of four experts."""
    root = tmp_path_factory.mktemp("layout_models")
    return {
        "dense": make_model(root / "dense", seed=1, tie_word_embeddings=True),
        "mixture": make_model(root / "mixture", seed=2, num_experts=4, num_experts_per_tok=2),
    }


@pytest.fixture(scope="session")
def hf_processor() -> Any:
    """transformers' Qwen3VLProcessor, small."""
    return make_processor()


@pytest.fixture(scope="session")
def processor(hf_processor: Any) -> MultimodalProcessor:
    """Ours over ``hf_processor``, with the settings ``models_vl.MEDIA``."""
    return MultimodalProcessor(hf_processor, MEDIA)


@pytest.fixture(scope="session")
def strict_processor(hf_processor: Any) -> MultimodalProcessor:
    """Ours over ``hf_processor``, which refuses more than a million pixels."""
    return MultimodalProcessor(hf_processor, vision_streams.CONFIG)


@pytest.fixture
def vision_stream(tmp_path: Path, strict_processor: MultimodalProcessor) -> Iterator[Any]:
    """Makes streams of prompts with media: ``vision_streams.vision_streams``."""
    with vision_streams.vision_streams(tmp_path, strict_processor) as make:
        yield make


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of some bytes, or skips the test where this process may not mount one."""
    with contextlib.ExitStack() as disks:

        def make(num_bytes: int) -> Path:
            folder = disks.enter_context(small_disk(tmp_path / "disk", num_bytes))
            if folder is None:
                pytest.skip("this process may not mount a file system")
            return folder

        yield make


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM of three virtual nodes; for tests that ``needs_slurm`` marks."""
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
