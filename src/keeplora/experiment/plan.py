"""`--dry-run`: what a run would do, what it would train, and what it would cost, before it costs anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from keeplora.errors import KeepLoraError
from keeplora.experiment import footprint
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.device import Precision
from keeplora.experiment.footprint import BASES, Linear, Memory, ModelShape, Settings
from keeplora.experiment.pictures import DrawnPictures
from keeplora.experiment.results import peak_memory
from keeplora.experiment.setup import Setup, load_tasks
from keeplora.methods import get_method
from keeplora.tuner import KeepLoraConfig
from keeplora.tuner.adapter import TaskAdapter, random_factor
from keeplora.tuner.sketching import gradient_mode
from keeplora.tuner.targets import Target

if TYPE_CHECKING:
    from keeplora.experiment.blueprint import Blueprint


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        tasks: per task: name, classes (the scorer where answers are generated), train, validation, test, epochs, steps.
        trained_parameters: per task, all towers (a rank may shrink later, which trains fewer).
        memory_bytes: what this process held after one trained batch, an estimate of the run's peak.
        seconds: per phase, from one timed batch of each kind; linear algebra is left out.
    """

    tasks: list[dict[str, Any]]
    targets: list[Target]
    trained_parameters: int
    memory_bytes: int
    seconds: dict[str, float]
    tokens: int | None = None
    """Of one sample of the timed batch, padding included, where the model reads conversations."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def plan_rows(config: ExperimentConfig, tasks: Sequence[Any]) -> list[dict[str, Any]]:
    """Per task: name, classes or scorer, sizes, epochs and optimiser steps."""
    rows = []
    for task in tasks:
        training = config.training.for_task(task.name)
        epochs = int(training.epochs)  # type: ignore[arg-type]
        what = {"scorer": task.scorer} if task.kind == "generation" else {"classes": len(task.classes)}
        rows.append(
            {
                "name": task.name, **what, "train": len(task.train),
                "validation": len(task.validation) if task.validation is not None else 0, "test": len(task.test),
                "epochs": epochs, "steps": epochs * -(-len(task.train) // training.batch_size),
            }
        )  # fmt: skip
    return rows


def statistics_samples(tuners: Sequence[KeepLoraConfig], sizes: Sequence[int]) -> tuple[int, int]:
    """Samples of all tasks that go forward and backward for G, and forward alone for C; at most, with ``statistics_tolerance``.

    M2 takes G before every task; after it M8 takes C, and M8g takes G again. With ``energy_general``
    drawn pictures go forward too.

    Args:
        tuners: the learner's settings of each task. sizes: training samples of each.

    >>> features = KeepLoraConfig(target_modules=["q_proj"], gradient_samples=20)
    >>> statistics_samples([features], [30]), statistics_samples([replace(features, memory="gradients")], [30])
    ((20, 30), (40, 0))
    >>> statistics_samples([replace(features, energy_general=0.99)], [30])
    (20, 286)
    """
    gradients = features = 0
    for tuner, size in zip(tuners, sizes, strict=True):
        again = tuner.memory == "gradients"
        gradients += (1 + again) * min(size, tuner.gradient_samples or size)
        features += 0 if again else min(size, tuner.feature_samples or size)
        features += DrawnPictures.COUNT if any(tuner.values_of("energy_general")) else 0
    return gradients, features


def make_plan(setup: Setup) -> Plan:
    """Time one forward and one training batch of the first task and scale them up to the whole run."""
    config = setup.config
    learner = setup.method.learner(setup.family.model, setup.tuner_config())
    targets = learner.targets
    rows = plan_rows(config, setup.tasks)
    trained = sum(row["epochs"] * row["train"] for row in rows)
    forward, train, tokens = _time_one_batch(setup, targets)
    evaluations = (len(setup.tasks) + 1) * sum(len(t.test) for t in [*setup.tasks, *setup.probes])
    pictures = sum(len(t.train) for t in setup.tasks)
    seconds = {"evaluation": evaluations * forward}
    if setup.method.trains:
        seconds["training"] = trained * train if learner.planned_parameters() else pictures * forward
        if setup.method.learner.protects:
            tuners = [setup.tuner_config(task) for task in setup.tasks]
            gradients, features = statistics_samples(tuners, [row["train"] for row in rows])
            seconds["statistics"] = gradients * train + features * forward
    else:
        seconds["evaluation"] = sum(len(t.test) for t in [*setup.tasks, *setup.probes]) * forward
    parameters = learner.planned_parameters() if setup.method.trains else 0
    return Plan(rows, targets, parameters, peak_memory(), seconds, tokens)


def _time_one_batch(setup: Setup, targets: list[Target]) -> tuple[float, float, int | None]:
    """(seconds per sample forward, seconds per sample of a training step, its tokens), on the first task's own samples."""
    task = setup.tasks[0]
    data = setup.sets[task.name].train
    objective = setup.kind.objective(task)
    batch, n = setup.kind.first_batch(objective, data, setup.config.training.for_task(task.name))
    tokens = batch["input_ids"].shape[1] if setup.kind.name == "generation" else None
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
        return forward, (time.perf_counter() - started) / n, tokens
    finally:
        adapter.remove()


@dataclass(frozen=True)
class Footprint:
    """A generative model's run by arithmetic alone (`keeplora.experiment.footprint` has the formulas).

    Attributes:
        tasks: as `Plan.tasks`; sizes are assumed where ``missing`` says why the data could not be read.
        targets, linears: what is adapted. shape: the model. settings, assume: what the numbers rest on.
        base: the way in which this run would hold the base; ``memory`` and ``seconds`` have all four.
        keeps: what the method carries beside the model, in words.
    """

    tasks: list[dict[str, Any]]
    missing: str | None
    targets: list[Target]
    linears: list[Linear]
    shape: ModelShape
    settings: Settings
    assume: Assumptions
    base: str
    memory: dict[str, Memory]
    seconds: dict[str, dict[str, float]]
    keeps: str

    @property
    def ledger_bytes(self) -> int:
        """A and B of one task on disk and what it changed of the free modules, in float32; beside them the new directions of U
        (all tasks together at most U at 100 %)."""
        return footprint.factor_bytes(self.linears) + 4 * self.settings.free


def make_footprint(config: ExperimentConfig, assume: Assumptions, setup: Setup | None = None) -> Footprint:
    """Plan a generative model's run from its config.json: weights, processor and data may all be missing.

    Args:
        setup: of a run whose model is open; its data and device are taken from there.

    Raises:
        KeepLoraError: no model can be built from the config, or a target is not there.
    """
    from keeplora.experiment.blueprint import Blueprint

    drawn = Blueprint.draw(config, setup.family.model.config if setup is not None else None)
    method = get_method(config.method)
    missing = None
    if setup is not None:
        tasks, probes = setup.tasks, setup.probes
    else:
        try:
            tasks, probes = load_tasks(config)
        except KeepLoraError as error:
            missing = str(error)
            tasks, probes = [_assumed(spec, assume) for spec in config.ordered_tasks], []
    outline = Setup(config, method, drawn, Precision("fp32", torch.device("cpu")), tasks, probes, {})  # type: ignore[arg-type]
    learner = method.learner(drawn.model, outline.tuner_config())
    rows = plan_rows(config, tasks)
    shape = drawn.shape(assume)
    linears = drawn.linears(learner.targets, shape)
    training, tuners = config.training, [outline.tuner_config(task) for task in tasks]
    trained = learner.planned_parameters() if method.trains else 0
    free = learner.free.numel() if method.trains else 0
    low_rank = sum(t.rank * t.n_out for t in linears) + free
    counts = [row["train"] for row in rows]
    settings = Settings(
        trained=trained, frozen=sum(t.rank * t.n_in for t in linears) if trained == low_rank else 0,
        protects=method.trains and learner.protects, gradients=learner.config.memory == "gradients",
        checkpointing=training.gradient_checkpointing, micro_batch=training.micro_batch or training.batch_size,
        eval_batch=training.eval_batch_size, epochs=tuple(row["epochs"] for row in rows), samples=tuple(counts),
        gradient_samples=tuple(min(n, c.gradient_samples or n) for n, c in zip(counts, tuners, strict=True)),
        feature_samples=tuple(min(n, c.feature_samples or n) for n, c in zip(counts, tuners, strict=True)),
        tests=tuple(row["test"] for row in rows), probes=sum(len(probe.test) for probe in probes), free=free,
        sketch=gradient_mode(learner.config, [(t.n_in, t.n_out) for t in learner.targets]) == "sketch",
        oversampling=learner.config.sketch_oversampling,
    )  # fmt: skip
    return Footprint(
        rows, missing, learner.targets, linears, shape, settings, assume, _base(config, drawn, setup),
        {base: footprint.memory(shape, linears, settings, assume, base) for base in BASES},
        {base: footprint.seconds(shape, linears, settings, assume, base) for base in BASES}, method.state,
    )  # fmt: skip


@dataclass
class _Assumed:
    """A task whose data is not there: sizes alone."""

    name: str
    scorer: str
    train: range
    test: range
    validation: None = None
    kind: str = "generation"


def _assumed(spec: dict[str, Any], assume: Assumptions) -> _Assumed:
    return _Assumed(spec["name"], str(spec.get("scorer", "?")), range(assume.samples), range(assume.test_samples))


def _base(config: ExperimentConfig, drawn: Blueprint, setup: Setup | None) -> str:
    if config.model.quantize is not None:
        return config.model.quantize
    if config.model.dtype != "auto":
        return config.model.dtype
    if setup is not None:
        return "bf16" if setup.family.dtype == torch.bfloat16 else "fp32"
    return drawn.stored


def needs_footprint(config: ExperimentConfig) -> bool:
    """Whether arithmetic is all there is: a generative model whose weights are not here."""
    from keeplora.experiment.blueprint import lacks_weights

    return lacks_weights(config)


def assume_measured(assume: Assumptions, plan: Plan, given: set[str]) -> Assumptions:
    """The timed batch's tokens where none were ``given``."""
    return assume if plan.tokens is None or "tokens" in given else replace(assume, tokens=plan.tokens)
