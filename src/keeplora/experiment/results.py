"""results.json: everything that a report or a comparison reads, rebuilt after every task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.evaluation.metrics import summary
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.kinds.base import Kind
from keeplora.methods import Method
from keeplora.report.run_files import check_shape
from keeplora.tuner import ContinualLearner, TaskRecord
from keeplora.tuner.audit import layer_rows

FORMAT = "keeplora-results"
VERSION = 0


@dataclass
class Scores:
    """Accuracies so far: row 0 before the first task, row i after task i; percent."""

    tasks: list[list[float | None]] = field(default_factory=list)
    probes: list[list[float | None]] = field(default_factory=list)

    @classmethod
    def from_results(cls, results: Mapping[str, Any] | None) -> Scores:
        return cls(results["accuracy"], results["probe_accuracy"]) if results else cls()

    def add(self, tasks: list[float | None], probes: list[float | None]) -> None:
        self.tasks.append(tasks)
        self.probes.append(probes)


def comparison_key(
    config: ExperimentConfig, tasks: Sequence[Any], probes: Sequence[Any], more: Sequence[Any] = ()
) -> str:
    """Equal for runs whose numbers may stand in one table: same model and precision, pictures, order, held-out share."""
    value = [
        config.model.name, config.model.revision, config.model.image_size,
        [[t.name, t.fingerprint] for t in tasks], [[p.name, p.fingerprint] for p in probes],
    ]  # fmt: skip
    model = {"dtype": config.model.dtype, "quantize": config.model.quantize, "max_length": config.model.max_length}
    # Only what is said: keys of runs that leave them all to the defaults stay what they were.
    value += [[key, said] for key, said in model.items() if said not in (None, "auto")]
    value += more
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def data_entries(tasks: Sequence[Any], probes: Sequence[Any]) -> list[dict[str, Any]]:
    """The entries of data.json."""
    return [
        {
            "name": t.name, "kind": kind, **_described(t), "train": len(t.train),
            "validation": len(t.validation) if t.validation is not None else 0, "test": len(t.test),
            "fingerprint": t.fingerprint, "licence": t.licence, "warnings": t.warnings,
        }
        for kind, group in (("task", tasks), ("probe", probes)) for t in group
    ]  # fmt: skip


def _described(task: Any) -> dict[str, Any]:
    if task.kind == "generation":
        told = {"scorer": task.scorer, "max_new_tokens": task.max_new_tokens, "prompt": task.prompt}
        return {"classes": [], "templates": [], **told}
    return {"classes": task.classes, "templates": task.templates}


def build_results(
    config: ExperimentConfig, method: Method, learner: ContinualLearner, tasks: Sequence[Any], probes: Sequence[Any],
    scores: Scores, warnings: Sequence[str], memory: int, seconds: float, key: str, kind: Kind,
) -> dict[str, Any]:  # fmt: skip
    """The whole of results.json, from the records and the scores."""
    settled = settled_records(learner, [t.name for t in tasks])
    infos = [record.info for record in settled]
    costs = {
        k: round(sum(i.get("seconds", {}).get(k, 0.0) for i in infos), 3)
        for k in ("statistics", "training", "evaluation")
    }
    # What exports leak is told once, at the end: a product of each whole weight per precision.
    detail = "exports" if len(settled) == len(tasks) else "quick"
    audit = learner.audit(detail) if learner.protects and learner.records else None
    sets = [*tasks, *probes]
    return {
        "format": FORMAT, "version": VERSION, "kind": kind.name, "name": config.label,
        "method": method.name, "method_title": method.title,
        "variant": "cls" if method.classifier else "text", "order": config.order_name, "candidates": config.candidates,
        "evaluate_on": config.evaluate_on, "model": config.model.name, "suite": config.suite,
        "seed": config.seed, **({"auto": config.auto} if config.auto else {}),
        "comparison_key": key, "tasks": [t.name for t in tasks], "probes": [p.name for p in probes],
        "accuracy": scores.tasks, "probe_accuracy": scores.probes, "test_counts": {t.name: len(t.test) for t in sets},
        **kind.results(),
        "metrics": summary(scores.tasks, scores.probes),
        "layers": layer_rows(learner, [record.name for record in settled]) if learner.protects else [],
        "capacity": learner.capacity().to_dict() if learner.protects else None,
        "tasks_info": [task_info(record.name, record.info) for record in settled],
        "removed": [record.name for record in learner.removed],
        "cost": {
            "seconds": round(seconds, 3), "statistics_seconds": costs["statistics"],
            "training_seconds": costs["training"], "evaluation_seconds": costs["evaluation"],
            "peak_memory_bytes": memory, "state_bytes": learner.state_bytes(),
            "trained_parameters": max((i.get("trained_parameters", 0) for i in infos), default=0),
        },
        "audit": audit.to_dict() if audit is not None else None, "warnings": list(dict.fromkeys(warnings)),
    }  # fmt: skip


def check_infos(records: Sequence[Any], path: Any, kind: str) -> None:
    """Refuse a ledger whose records do not hold what every run puts into them: it was made, or changed, by something else."""
    needed = ("seconds", "classes", "templates") if kind == "classification" else ("seconds",)
    for record in records:
        where = f"{path}: the ledger's record of task {record.name!r}"
        check_shape(record.info, "info", where)
        if missing := [key for key in needed if record.info.get(key) is None]:
            raise KeepLoraError(f"{where} has no {missing[0]!r}, so it is not of a run; restore it from a copy")


def settled_records(learner: ContinualLearner, order: Sequence[str]) -> list[TaskRecord]:
    """The run's tasks that need not be learned any more, in its order: active ones, and those that were removed."""
    found = {record.name: record for record in (*learner.removed, *learner.records)}
    return [found[name] for name in order if name in found]


def task_info(name: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json tells of a task, from its record."""
    return {
        "name": name, "seconds": info.get("seconds", {}), "epochs": info.get("epochs", []),
        "best_epoch": info.get("best_epoch"), "data_wait": info.get("data_wait"), "accepted": not info.get("undone", False),
        "trained_parameters": info.get("trained_parameters", 0),
        "rank_shrunk": info.get("rank_shrunk", []), "not_adapted": info.get("not_adapted", []),
        "frozen": info.get("frozen", []), "not_learned": info.get("not_learned"),
    }  # fmt: skip


def settled_count(known: Iterable[str], order: Sequence[str], where: str | Path) -> int:
    """How many of a run's tasks are behind it, given those that are learned or were removed.

    Raises:
        KeepLoraError: a task is there and one before it is not, as after restoring one that was rolled back.
    """
    known = set(known)
    done = next((i for i, name in enumerate(order) if name not in known), len(order))
    if late := [name for name in order[done:] if name in known]:
        raise KeepLoraError(
            f"{where}: the ledger holds task {late[0]!r}, but not {order[done]!r}, which comes before it in this run; "
            "restore that one, or roll back, before the run goes on"
        )
    return done


def peak_memory() -> int:
    """Largest memory of this process in bytes: on the GPU where there is one, else resident on the host."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
