"""The finished runs of studies as numbers: read from a study's folder, or from a file that was written of them before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from keeplora.evaluation.stats import Interval
from keeplora.files import atomic_write_json
from keeplora.report.study_data import StudyCell
from keeplora.study.collect import study_cells
from keeplora.study.store import StudyStore

METRICS = {"last": "Last", "transfer": "Transfer", "probe": "Probe"}
Label = TypeVar("Label", bound=tuple[Any, ...])
Seeds = dict[str, Mapping[str, float]]
"""Seed and order → metrics."""


def read(paths: Sequence[Path], names: Sequence[str], label: Callable[[StudyCell], Label]) -> dict[Label, Seeds]:
    """What is compared → its runs, in the order of the studies' plans, laid together where several hold the same.

    Args:
        names: of the parts of a label, under which a file has them. label: of a cell of a study that has finished.
    """
    found: dict[Label, Seeds] = {}
    for path in paths:
        if path.is_file():
            for row in json.loads(path.read_text(encoding="utf-8")):
                found.setdefault(tuple(row[name] for name in names), {}).update(row["seeds"])  # type: ignore[arg-type]
            continue
        store = StudyStore(path).load()
        methods = list(store.plan_values()["methods"])
        for cell in sorted(study_cells(store), key=lambda cell: methods.index(cell.method)):
            if cell.metrics:
                values = {name: value for name in METRICS if (value := cell.metrics[name]) is not None}
                found.setdefault(label(cell), {})[f"{cell.seed} {cell.order}"] = values
    return {key: dict(sorted(seeds.items())) for key, seeds in found.items()}


def write(path: Path, names: Sequence[str], cells: Mapping[tuple[Any, ...], Seeds]) -> None:
    """A file that `read` takes in place of the studies."""
    rows = [{**dict(zip(names, key, strict=True)), "seeds": seeds} for key, seeds in cells.items()]
    atomic_write_json(path, rows)


def told(found: Interval) -> str:
    """``mean [low, high]``, 95 % t interval.

    >>> from keeplora.evaluation.stats import mean_interval
    >>> told(mean_interval([1.0, 3.0]))
    '2.0 [-10.7, 14.7]'
    """
    return f"{found['mean']:.1f}" + ("" if found["low"] is None else f" [{found['low']:.1f}, {found['high']:.1f}]")
