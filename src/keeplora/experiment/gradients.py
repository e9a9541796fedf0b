"""The gradients of a finished run's tasks at the weights that each of them found, taken again from the run's data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from keeplora.data.splits import spread
from keeplora.data.streams import SampleStream
from keeplora.errors import KeepLoraError
from keeplora.experiment.config import load_config
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import Setup, prepare
from keeplora.methods import method_names
from keeplora.tuner import ContinualLearner
from keeplora.tuner.passes import collect_gradients
from keeplora.tuner.persistence import all_updates
from keeplora.tuner.similarity import TaskFeatures, gradient_inside
from keeplora.tuner.statistics import gradient_batches
from keeplora.tuner.task import OpenTask


@contextlib.contextmanager
def weights_after(learner: ContinualLearner, tasks: int) -> Iterator[None]:
    """The model as it was after so many of its tasks; as it is now again, bit for bit, afterwards."""
    before = learner.store.snapshot()
    try:
        learner.store.restore(all_updates(learner.records[:tasks]))
        yield
    finally:
        learner.store.restore(before)


def limited_training(setup: Setup, task: Any, limit: int | None, seed: int) -> Any:
    """A task's training set as the model reads it, at most ``limit`` samples of it, the classes in turn; of a stream all."""
    if isinstance(task.train, SampleStream) or limit is None or len(task.train) <= limit:
        return setup.sets[task.name].train
    return setup.kind.sets(replace(task, train=spread(task.train, limit, seed))).train


def starting_gradient(
    setup: Setup, learner: ContinualLearner, number: int, task: Any, samples: Any
) -> dict[str, Tensor]:
    """G (M2) of the learner's task ``number`` (from 1) at the weights that it found: per target (out, in), on the model's device.

    Args:
        task: its data. samples: of it, `limited_training`'s. They are gone through whole, whatever ``statistics_tolerance`` says,
            or up to a ``gradient_samples`` that is a number.
    """
    training = setup.config.training.for_task(task.name)
    objective = setup.kind.objective(task)
    setup.kind.prepare_head(objective, samples, training)
    opened = OpenTask(
        task.name, **setup.kind.statistics(objective, samples, training, learner.config, setup.config.seed)
    )
    with weights_after(learner, number - 1):
        return collect_gradients(
            learner.model,
            learner.targets,
            learner.store,
            gradient_batches(learner, opened),
            opened.loss_fn,
            opened.mask_fn,
        )


def gradients_inside(
    path: Path, features: Mapping[str, TaskFeatures], energy: float = 0.99, *, limit: int | None = None, seed: int = 0,
    device: str = "cpu", on_task: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """[later][earlier] `gradient_inside`, of every task of a run and those that it had learned before.

    Args:
        path: a run directory; its model and its data are opened. features: the tasks' own subspaces. limit: most training
            samples of each task. on_task: called with a task's name before its gradient is taken.

    Raises:
        KeepLoraError: the run's method keeps a model per task, so that no task started from what was learned before.
    """
    config = load_config(RunDirectory(path).read_config(), {"device": device}, known_methods=method_names())
    setup = prepare(config)
    learner = setup.opened(path)
    if not learner.accumulates:
        raise KeepLoraError(
            f"{path}: method {setup.method.name!r} keeps a model per task, so no task started from the weights of the one before"
        )
    found: dict[str, dict[str, float | None]] = {}
    names = [record.name for record in learner.records]
    with setup.kind.running(learner):
        for j, later in enumerate(names[1:], start=1):
            on_task(later)
            task = next(t for t in setup.tasks if t.name == later)
            G = starting_gradient(setup, learner, j + 1, task, limited_training(setup, task, limit, seed))
            found[later] = {i: gradient_inside(G, features[i], energy) for i in names[:j] if i in features}
    return found
