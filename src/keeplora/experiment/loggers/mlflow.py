"""MLflow: to the server or store that MLFLOW_TRACKING_URI names, else a database of the run's own.

That database is RUN/loggers/mlflow/mlflow.db; look at it with
`mlflow ui --backend-store-uri sqlite:///RUN/loggers/mlflow/mlflow.db`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keeplora.files import atomic_write_text

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED"}
_LONGEST = 6000  # characters of a parameter that every store takes


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _plain(f"{prefix}{key}"), str(value)[:_LONGEST]


def _plain(name: str) -> str:
    """A name that MLflow takes: task names may hold a "+", which it refuses."""
    return re.sub(r"[^\w.\- :/]", "_", name)


class Logger:
    """`RunLogger` over ``MlflowClient``; a resumed run keeps its id."""

    def start(self, config: Mapping[str, Any], folder: Path, name: str, project: str, resumed_at: int | None) -> None:
        # A server that does not answer may delay a run by seconds, not by their default of many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow.entities import Metric, Param, RunTag  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._metric = Metric
        own = folder.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{(own / 'mlflow.db').as_posix()}")
        known = folder / "run_id.txt"
        if resumed_at is not None and known.is_file():
            self._id = known.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        # Where artifacts would go; without a place of ours they would go into the current folder.
        place = None if uri else (own / "artifacts").as_uri()
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project, place)
        self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
        atomic_write_text(known, self._id)
        params = [Param(key, value) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # more at once are refused
            self._client.log_batch(self._id, params=params[first : first + 100])
        self._client.log_batch(self._id, tags=[RunTag("keeplora.method", str(config.get("method")))])

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(_plain(key), value, now, step) for key, value in values.items()])

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, status=_STATUS.get(status, "FAILED"))
