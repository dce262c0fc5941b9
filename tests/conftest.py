"""Fixtures and rules of all tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.data.processing import MultimodalProcessor
from tests.support.models import make_model
from tests.support.models_vl import MEDIA, make_processor


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` skip themselves on a machine without one."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)])
    if mounted.returncode:
        pytest.skip("this container may not mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
