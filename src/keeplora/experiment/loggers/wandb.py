"""Weights & Biases. Whether a run is online, offline or disabled is WANDB_MODE's and `wandb login`'s to say.

Files go below RUN/loggers/wandb; an offline run is sent later by `wandb sync RUN/loggers/wandb/wandb/offline-run-*`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.files import atomic_write_text

STEP = "epochs"  # their own counter refuses to go back, which a resume after a kill has to


class Logger:
    """`RunLogger` over ``wandb.init``. A resumed run keeps its id, so that wandb shows one run."""

    def start(self, config: Mapping[str, Any], folder: Path, name: str, project: str, resumed_at: int | None) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        known = folder / "id.txt"
        run_id = known.read_text(encoding="utf-8").strip() if resumed_at is not None and known.is_file() else None
        run_id = run_id or secrets.token_hex(4)
        # No console capture: our live progress would be torn. A run of its own, should others be open in this process.
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=project, name=name, id=run_id, dir=str(folder), config=dict(config), resume="allow",
            reinit="create_new", settings=settings,
        )  # fmt: skip
        atomic_write_text(known, run_id)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)
