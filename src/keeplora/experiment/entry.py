"""The way in: a configuration becomes a run, new or gone on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.experiment.environment import collect_environment
from keeplora.experiment.looking_back import LookingBack, late_tasks
from keeplora.experiment.more_tasks import Tasks, check_ready, told, with_tasks
from keeplora.experiment.results import check_infos, data_entries
from keeplora.experiment.resuming import check_changes
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.runner import Run
from keeplora.experiment.setup import Setup, prepare
from keeplora.experiment.several import joined, open_directory
from keeplora.methods import method_names
from keeplora.tuner import ContinualLearner, ranks
from keeplora.tuner.protect import check_budget

_MORE = "not all tasks are learned; go on with `keeplora resume`"


class Experiment:
    """An experiment from a YAML file, a mapping or an `ExperimentConfig`: the same thing as ``keeplora run``.

    >>> experiment = Experiment({"suite": "demo-small", "method": "keeplora++"})   # doctest: +SKIP
    >>> experiment.run()["metrics"]["last"]                                         # doctest: +SKIP
    """

    def __init__(
        self, config: str | os.PathLike[str] | Mapping[str, Any] | ExperimentConfig,
        overrides: Mapping[str, Any] | None = None, *, quiet: bool | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(config, ExperimentConfig):
            config = load_config(config, overrides, known_methods=method_names())
        elif overrides:
            config = load_config(config.resolved(), overrides, known_methods=method_names())
        self.config = config
        self.quiet = quiet
        self._setup: Setup | None = None

    @property
    def setup(self) -> Setup:
        """Model and data, loaded at the first use."""
        if self._setup is None:
            self._setup = prepare(self.config)
        return self._setup

    def run(self) -> dict[str, Any]:
        """Run from the start in a new run directory; returns what results.json holds.

        Under a launcher (``torchrun``, ``accelerate launch``) every process calls this, and together they are one run.
        """
        with joined(self.config.device):
            return self._run()

    def _run(self) -> dict[str, Any]:
        path = self.config.output_path
        ranks.first("looking at the run directory", lambda: RunDirectory.check_new(path))  # before minutes of loading
        with ranks.together("loading model and data"):
            setup = self.setup
        learner = _new_learner(setup)  # what the learner refuses leaves no folder behind
        with open_directory(RunDirectory.create, path) as directory:
            directory.write_config(self.config.resolved())  # first: from here on the run can be resumed
            return _begin(setup, learner, directory, self.quiet).go()

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, *, quiet: bool | None = None,
        add_tasks: Tasks | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Go on with an interrupted run, from the ledger and the last checkpoint; or give a finished one further tasks.

        With further tasks it ends as a run ends that had them from the start: the same weights, and the same scores, those on
        the new tasks before they were learned included, for which the ledger brings each earlier state back.

        Args:
            overrides: settings to change from here on, those of `keeplora.experiment.resuming.CHANGEABLE`; of a task that is
                added, its own: "training.epochs.TASK", "training.learning_rate.TASK", "validation.TASK".
            add_tasks: a YAML file with ``tasks:`` (or a mapping that holds them), of which those that the run does not have
                are learned after its own. A run keeps its settings: of the file's others those alone are read that it gives
                the new tasks by name, under `training.epochs`, `training.learning_rate` and `validation`.

        >>> Experiment.resume("runs/shop", add_tasks={"tasks": [{"name": "toys", "source": "folder", "path": "toys"}]})
        ... # doctest: +SKIP
        """
        if add_tasks is None:
            check_changes(overrides or {})
        with joined():
            return cls._resume(path, overrides, quiet, add_tasks)

    @classmethod
    def _resume(
        cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None, quiet: bool | None,
        add_tasks: Tasks | None,
    ) -> dict[str, Any]:  # fmt: skip
        with open_directory(RunDirectory.open_existing, path) as directory:
            changes = {**(overrides or {}), "output": str(path)}
            with ranks.together("loading model and data"):
                if add_tasks is not None:
                    check_ready(directory)
                    config = with_tasks(load_config(directory.read_config()), add_tasks, changes)
                else:
                    config = load_config(directory.read_config(), changes, known_methods=method_names())
                experiment = cls(config, quiet=quiet)
                setup = experiment.setup
                _check_data(directory, setup)
            if add_tasks is not None:
                directory.set_status(state="interrupted", error=_MORE)
            if overrides or add_tasks is not None:
                directory.write_config(config.resolved())
            if not directory.ledger_path.is_dir():  # killed before anything was learned
                return _begin(setup, _new_learner(setup), directory, quiet, resumed=True).go()
            _look_back(setup, directory, quiet)
            learner = setup.method.learner.from_pretrained(path, setup.family.model, append=True)
            check_infos([*learner.records, *learner.removed], path, setup.kind.name)
            return Run(setup, directory, learner, quiet, resumed=add_tasks is None).go()


def _check_data(directory: RunDirectory, setup: Setup) -> None:
    """What was there when the run began must be there, and the same; beside it may stand tasks that were added."""
    was = {e.get("name"): e.get("fingerprint") for e in directory.read_data()}
    now = {e["name"]: e["fingerprint"] for e in data_entries(setup.tasks, setup.probes)}
    if not was and directory.ledger_path.is_dir():  # it is written before the ledger
        raise KeepLoraError(f"{directory.data_path} is missing or empty, so there is no telling whether the data has "
                            "changed since the run began; restore it from a copy")  # fmt: skip
    # A suite's tasks are not added to; those of a run that was given further ones stand in its own configuration.
    more = [probe.name for probe in setup.probes] if setup.config.suite is None else list(now)
    names = dict.fromkeys([*was, *more]) if was else {}
    if changed := [name for name in names if was.get(name) != now.get(name)]:
        raise KeepLoraError(
            f"{directory.path}: the pictures or classes of {', '.join(map(str, changed))} have changed since the run began, so "
            "its numbers would not belong together; restore them, or start a new run"
        )


def _look_back(setup: Setup, directory: RunDirectory, quiet: bool | None) -> None:
    """Before tasks that were added are learned: what the states so far score on them."""
    if {task.name for task in setup.tasks} - {entry.get("name") for entry in directory.read_data()}:
        directory.write_data(data_entries(setup.tasks, setup.probes))
    results = ranks.agreed("the results so far", directory.read_results(whole=True))
    if results is None or not (late := late_tasks(setup, results)):
        return
    before = len(results["tasks"])
    noted = told(setup.config, setup.method, before, before + len(late))
    with directory.learning():
        LookingBack(setup, directory, {**results, "warnings": [*results["warnings"], *noted]}, quiet).go()
    directory.set_status(state="interrupted", error=_MORE)  # until they are


def _new_learner(setup: Setup) -> ContinualLearner:
    """The method's learner, which has learned nothing and has no ledger yet.

    Raises:
        KeepLoraError: the settings do not fit the model: a tower, a target, a bound that the weights alone exceed.
    """
    learner = setup.method.learner(
        setup.family.model, setup.tuner_config(), base_name=setup.config.model.name,
        base_revision=setup.config.model.revision,
    )  # fmt: skip
    check_budget(learner)
    return learner


def _begin(
    setup: Setup, learner: ContinualLearner, directory: RunDirectory, quiet: bool | None, *, resumed: bool = False
) -> Run:
    """A run from its very start: what it runs on, its data, an empty ledger."""
    directory.write_environment(collect_environment())
    directory.write_data(data_entries(setup.tasks, setup.probes))
    learner.keep_in(directory.ledger_path)
    return Run(setup, directory, learner, quiet, resumed=resumed)
