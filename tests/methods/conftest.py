from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP on disk."""
    return tiny.make_tiny("clip", tmp_path_factory.mktemp("tiny") / "clip")
