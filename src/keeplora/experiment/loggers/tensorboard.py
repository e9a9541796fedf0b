"""TensorBoard: event files below RUN/loggers/tensorboard; `tensorboard --logdir runs` shows every run side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.yaml_text import dump_yaml


class Logger:
    """`RunLogger` over torch's own writer."""

    def start(self, config: Mapping[str, Any], folder: Path, name: str, project: str, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process wrote from the purged step on is told again, so TensorBoard hides it. The step itself was
        # told whole: what is new begins after it.
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        text = "".join(f"    {line}\n" for line in dump_yaml(dict(config)).splitlines())  # Markdown's code block
        self._writer.add_text("config", f"{project}: {name}\n\n{text}", resumed_at or 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()  # a killed run's curves end where it was killed

    def finish(self, status: str) -> None:
        self._writer.close()
