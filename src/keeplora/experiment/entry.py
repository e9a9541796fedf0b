"""The way in: a configuration becomes a run, new or gone on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.experiment.environment import collect_environment
from keeplora.experiment.results import check_infos, data_entries
from keeplora.experiment.resuming import check_changes
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.runner import Run
from keeplora.experiment.setup import Setup, prepare
from keeplora.experiment.several import joined, open_directory
from keeplora.methods import method_names
from keeplora.tuner import ContinualLearner, ranks
from keeplora.tuner.protect import check_budget


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
        cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, *, quiet: bool | None = None
    ) -> dict[str, Any]:
        """Go on with an interrupted run: finished tasks are read from the ledger, the one under way from its checkpoint.

        Args:
            overrides: settings to change from here on, those of `keeplora.experiment.resuming.CHANGEABLE`.
        """
        check_changes(overrides or {})
        with joined():
            return cls._resume(path, overrides, quiet)

    @classmethod
    def _resume(
        cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None, quiet: bool | None
    ) -> dict[str, Any]:
        with open_directory(RunDirectory.open_existing, path) as directory:
            changes = {**(overrides or {}), "output": str(path)}
            with ranks.together("loading model and data"):
                config = load_config(directory.read_config(), changes, known_methods=method_names())
                experiment = cls(config, quiet=quiet)
                setup = experiment.setup
            was = {e.get("name"): e.get("fingerprint") for e in directory.read_data()}
            now = {e["name"]: e["fingerprint"] for e in data_entries(setup.tasks, setup.probes)}
            if not was and directory.ledger_path.is_dir():  # it is written before the ledger
                raise KeepLoraError(f"{directory.data_path} is missing or empty, so there is no telling whether the data has "
                                    "changed since the run began; restore it from a copy")  # fmt: skip
            if was and (changed := [name for name in {**now, **was} if was.get(name) != now.get(name)]):
                raise KeepLoraError(
                    f"{path}: the pictures or classes of {', '.join(map(str, changed))} have changed since the run began, so "
                    "its numbers would not belong together; restore them, or start a new run"
                )
            if overrides:
                directory.write_config(config.resolved())
            if not directory.ledger_path.is_dir():  # killed before anything was learned
                return _begin(setup, _new_learner(setup), directory, quiet, resumed=True).go()
            learner = setup.method.learner.from_pretrained(path, setup.family.model, append=True)
            check_infos([*learner.records, *learner.removed], path, setup.kind.name)
            return Run(setup, directory, learner, quiet, resumed=True).go()


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
