"""The doctor as its tests call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keeplora.data import SOURCES, digests
from keeplora.data.doctor import TaskCheck, examine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KEEPLORA_NO_CACHE", raising=False)
    monkeypatch.setattr(digests, "SETTLED_NS", -(10**9))


def look_over(spec: dict[str, Any], root: Path, **options: Any) -> TaskCheck:
    return examine(spec, root, SOURCES, fetch="from the cellar", **options)


def text(check: TaskCheck) -> str:
    return "\n".join(check.problems)
