"""Fixtures and rules of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import make_model


@pytest.fixture(scope="session")
def layout_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a ``dense`` model with tied embeddings and of a ``mixture`` of four experts."""
    root = tmp_path_factory.mktemp("layout_models")
    return {
        "dense": make_model(root / "dense", seed=1, tie_word_embeddings=True),
        "mixture": make_model(root / "mixture", seed=2, num_experts=4, num_experts_per_tok=2),
    }
