"""trackio: into its own local database, where `trackio show --project NAME` finds every run of a project.

That place is trackio's (TRACKIO_DIR, else its folder in the Hugging Face cache) and not the run directory: trackio
decides it once per process, when it is imported. TRACKIO_SPACE_ID or TRACKIO_SERVER_URL send the numbers elsewhere.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from keeplora.files import atomic_write_text


class Logger:
    """`RunLogger` over ``trackio.init``. A run is found again by its name, which therefore has the time in it."""

    def start(self, config: Mapping[str, Any], folder: Path, name: str, project: str, resumed_at: int | None) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        known = folder / "name.txt"
        resumed = resumed_at is not None and known.is_file()
        name = known.read_text(encoding="utf-8").strip() if resumed else f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        with contextlib.redirect_stdout(io.StringIO()):  # its greeting would stand among our tables
            self._run = trackio.init(
                project=project, name=name, config=dict(config), resume="allow" if resumed else "never", embed=False,
            )  # fmt: skip
        atomic_write_text(known, name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        ours = trackio.context_vars.current_run.get() is self._run
        with contextlib.redirect_stdout(io.StringIO()):
            # Its own function also forgets the run, which would be finished once more, aloud, when the process ends.
            (trackio.finish if ours else self._run.finish)()
