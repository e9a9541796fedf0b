"""Run directories of a whole study without a run: methods × orders × seeds, the tasks permuted, the numbers as asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_runs import PROBES, TASKS, make_run

from keeplora.experiment.run_directory import FORMAT
from keeplora.files import atomic_write_json

ORDERS = {"1": TASKS, "2": TASKS[::-1]}
METRICS = ("transfer", "average", "last", "forgetting", "bwt", "probe")


def change(path: Path, file: str, values: Mapping[str, Any]) -> None:
    """Lay values over a JSON file of a run."""
    atomic_write_json(path / file, {**json.loads((path / file).read_text()), **values})


def fake_cell(
    root: Path, method: str, *, order: str | None = "1", seed: int = 0, tasks: Sequence[str] | None = None,
    metrics: Mapping[str, float | None] | None = None, cost: Mapping[str, Any] | None = None, name: str | None = None,
    settings: str = "", **more: Any,
) -> Path:  # fmt: skip
    """A run as `make_run` makes it, of a named order; ``metrics`` replaces its metrics, ``settings`` is added to config.yaml."""
    tasks = list(tasks or ORDERS.get(order or "", TASKS))
    key = f"key of {' '.join(tasks)}"
    path = make_run(
        root, name or f"{method}-{order}-{seed}", method, seed=seed, tasks=tasks, key=more.pop("key", key), **more
    )
    results = json.loads((path / "results.json").read_text())
    if metrics is not None:
        results["metrics"] = {**dict.fromkeys(METRICS), **metrics}
    results["cost"] |= dict(cost or {})
    results["order"] = order
    atomic_write_json(path / "results.json", results)
    change(path, "status.json", {"format": FORMAT, "version": 0})
    # The pictures of a task are the same wherever it comes in the order.
    sets = json.loads((path / "data.json").read_text())["tasks"]
    for entry in sets:
        entry["fingerprint"] = entry["name"].encode().hex()
    atomic_write_json(path / "data.json", {"tasks": sets})
    (path / "config.yaml").write_text(
        f"model: {{name: embedded, image_size: 112}}\nmethod: {method}\nseed: {seed}\n"
        f"training: {{epochs: 3, learning_rate: 1e-3}}\n{settings}"
    )
    return path


def fake_study(
    root: Path, methods: Sequence[str] = ("lora", "keeplora++"), seeds: Sequence[int] = (0, 1, 2),
    orders: Sequence[str] = ("1", "2"), **more: Any,
) -> list[Path]:  # fmt: skip
    """Every cell, finished."""
    return [
        fake_cell(root, method, order=order, seed=seed, **more)
        for seed in seeds
        for order in orders
        for method in methods
    ]


__all__ = ["METRICS", "ORDERS", "PROBES", "TASKS", "change", "fake_cell", "fake_study"]
