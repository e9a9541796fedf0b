from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("KEEPLORA_NO_CACHE", "1")  # no test writes into the cache of whoever runs it


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A stand-in of the Hugging Face hub (`tests.fake_hub.FakeHub`), which every client in this process talks to."""
    from tests.fake_hub import a_hub

    root: Path = tmp_path_factory.mktemp("hub")
    with a_hub(monkeypatch, root) as fake:
        yield fake


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the real towers are skipped, with the reason, where these have not been fetched."""
    wanting = [item for item in items if item.get_closest_marker("towers")]
    if not wanting:
        return
    from keeplora.errors import KeepLoraError
    from keeplora.models import assets

    try:
        assets.embedded_path()
    except KeepLoraError as error:
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=str(error)))
