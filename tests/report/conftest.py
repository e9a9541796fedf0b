"""The shared run directories of the report's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_runs import make_run


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Four comparable, finished runs side by side, by method."""
    return {
        method: make_run(tmp_path / "runs", f"demo-{method}", method)
        for method in ("keeplora++", "keeplora", "lora", "full-ft")
    }
