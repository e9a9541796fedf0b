"""results.json: everything that a report or a comparison reads, rebuilt after every task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keeplora.evaluation.metrics import summary
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.kinds.base import Kind
from keeplora.methods import Method
from keeplora.tuner import ContinualLearner
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
    """Equal for runs whose numbers may stand in one table: same model, pictures, order, held-out share."""
    value = [
        config.model.name, config.model.revision, config.model.image_size,
        [[t.name, t.fingerprint] for t in tasks], [[p.name, p.fingerprint] for p in probes],
    ]  # fmt: skip
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
    infos = [record.info for record in learner.records]
    costs = {
        k: round(sum(i["seconds"].get(k, 0.0) for i in infos), 3) for k in ("statistics", "training", "evaluation")
    }
    audit = learner.audit() if learner.protects and learner.records else None
    sets = [*tasks, *probes]
    return {
        "format": FORMAT, "version": VERSION, "kind": kind.name, "name": config.label,
        "method": method.name, "method_title": method.title,
        "variant": "cls" if method.classifier else "text", "order": config.order_name, "candidates": config.candidates,
        "evaluate_on": config.evaluate_on, "model": config.model.name, "suite": config.suite,
        "seed": config.seed, "comparison_key": key, "tasks": [t.name for t in tasks], "probes": [p.name for p in probes],
        "accuracy": scores.tasks, "probe_accuracy": scores.probes, "test_counts": {t.name: len(t.test) for t in sets},
        **kind.results(),
        "metrics": summary(scores.tasks, scores.probes),
        "layers": layer_rows(learner) if learner.protects else [],
        "capacity": learner.capacity().to_dict() if learner.protects else None,
        "tasks_info": [
            {
                "name": record.name, "seconds": record.info["seconds"], "epochs": record.info.get("epochs", []),
                "best_epoch": record.info.get("best_epoch"), "accepted": not record.info.get("undone", False),
                "trained_parameters": record.info.get("trained_parameters", 0),
                "rank_shrunk": record.info.get("rank_shrunk", []), "not_adapted": record.info.get("not_adapted", []),
                "frozen": record.info.get("frozen", []),
            }
            for record in learner.records
        ],
        "cost": {
            "seconds": round(seconds, 3), "statistics_seconds": costs["statistics"],
            "training_seconds": costs["training"], "evaluation_seconds": costs["evaluation"],
            "peak_memory_bytes": memory, "state_bytes": learner.state_bytes(),
            "trained_parameters": max((i.get("trained_parameters", 0) for i in infos), default=0),
        },
        "audit": audit.to_dict() if audit is not None else None, "warnings": list(dict.fromkeys(warnings)),
    }  # fmt: skip


def peak_memory() -> int:
    """Largest memory of this process in bytes: on the GPU where there is one, else resident on the host."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
