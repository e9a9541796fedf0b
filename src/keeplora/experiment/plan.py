"""`--dry-run`: what a run would do, what it would train, and what it would cost, before it costs anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.pictures import Collate
from keeplora.experiment.results import peak_memory
from keeplora.experiment.setup import Setup
from keeplora.tuner.adapter import TaskAdapter, random_factor
from keeplora.tuner.targets import Target


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        tasks: per task: name, classes, train, validation, test, epochs, steps.
        trained_parameters: per task, all towers (a rank may shrink later, which trains fewer).
        memory_bytes: what this process held after one trained batch, an estimate of the run's peak.
        seconds: per phase, from one timed batch of each kind.
    """

    tasks: list[dict[str, Any]]
    targets: list[Target]
    trained_parameters: int
    memory_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def make_plan(setup: Setup) -> Plan:
    """Time one forward and one training batch of the first task and scale them up to the whole run."""
    config = setup.config
    learner = setup.method.learner(setup.family.model, setup.tuner_config())
    targets = learner.targets
    rows, steps, trained, statistics = [], 0, 0, 0
    for task in setup.tasks:
        training = config.training.for_task(task.name)
        epochs = int(training.epochs)  # type: ignore[arg-type]
        per_epoch = -(-len(task.train) // training.batch_size)
        rows.append(
            {
                "name": task.name, "classes": len(task.classes), "train": len(task.train), "test": len(task.test),
                "validation": len(task.validation) if task.validation is not None else 0, "epochs": epochs,
                "steps": epochs * per_epoch,
            }
        )  # fmt: skip
        steps += epochs * per_epoch
        trained += epochs * len(task.train)
        tuner = setup.tuner_config(task)
        statistics += min(len(task.train), tuner.gradient_samples or len(task.train))
    forward, train = _time_one_batch(setup, targets)
    evaluations = (len(setup.tasks) + 1) * sum(len(t.test) for t in [*setup.tasks, *setup.probes])
    pictures = sum(len(t.train) for t in setup.tasks)
    features = sum(
        min(len(t.train), config.tuner.samples("feature_samples", len(t.train)) or len(t.train)) for t in setup.tasks
    )
    seconds = {"evaluation": evaluations * forward}
    if setup.method.trains:
        seconds["training"] = trained * train if learner.planned_parameters() else pictures * forward
        if setup.method.learner.protects:
            seconds["statistics"] = statistics * train + features * forward
    else:
        seconds["evaluation"] = sum(len(t.test) for t in [*setup.tasks, *setup.probes]) * forward
    return Plan(rows, targets, learner.planned_parameters() if setup.method.trains else 0, peak_memory(), seconds)


def _time_one_batch(setup: Setup, targets: list[Target]) -> tuple[float, float]:
    """(seconds per picture forward, seconds per picture of a training step), on the first task's own pictures."""
    task = setup.tasks[0]
    data = setup.sets[task.name].train
    n = min(len(data), setup.config.training.batch_size)
    objective = TaskObjective(setup.family, task, setup.precision)
    batch = Collate(objective.text_batch)([data[i] for i in range(n)])
    with torch.no_grad():
        objective.loss(setup.family.model, batch)  # the first call pays for warming up
        started = time.perf_counter()
        objective.loss(setup.family.model, batch)
        forward = (time.perf_counter() - started) / n
    A = {t.name: random_factor(t, torch.Generator().manual_seed(0)) for t in targets}
    adapter = TaskAdapter(setup.family.model, targets, A, trainable_A=setup.method.learner.trains_A)
    try:
        objective.loss(setup.family.model, batch).mean().backward()
        started = time.perf_counter()
        objective.loss(setup.family.model, batch).mean().backward()
        return forward, (time.perf_counter() - started) / n
    finally:
        adapter.remove()
