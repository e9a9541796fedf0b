"""What the points of an analysis are measured on: one model, its data, and a way to change weights and give them back."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from keeplora.analysis.spectrum import Spectrum
from keeplora.data import load_task
from keeplora.data.splits import spread
from keeplora.data.streams import SampleStream
from keeplora.errors import ConfigError, KeepLoraError
from keeplora.evaluation.scorers import JUDGED
from keeplora.experiment.config import load_config
from keeplora.experiment.gradients import limited_training
from keeplora.experiment.ledgers import LedgerPlace
from keeplora.experiment.setup import Setup, data_folder, prepare
from keeplora.methods import method_names
from keeplora.study.analyze.plan import HELD_OUT, AnalysisPlan
from keeplora.tuner import ContinualLearner, ranks
from keeplora.tuner.quantised import quantisation
from keeplora.tuner.similarity import TaskFeatures, ledger_features
from keeplora.tuner.targets import Target

SPECTRA_BYTES = 4 << 30
"""What decompositions may take in memory; beyond it they are made anew for every point."""
NOTES = {
    "probes": "general knowledge was measured on the probes themselves: a run with these settings shows its probes a little too "
    "well (the suite names no reference set)",
    "reference": "general knowledge was measured on the reference set; no picture of the probes was opened",
    "run": "measured on the run's own test samples and probes: to understand the run, not to choose settings by",
}


class World:
    """The model of a plan, untouched, or that of its run with all tasks learned.

    Attributes:
        general, specific: the evaluation sets by name, as (task, data): of the run, its probes and test sets; else general
            sets, and training data of the tasks: no test sample is looked at before a setting is chosen.
    """

    def __init__(self, plan: AnalysisPlan) -> None:
        if ranks.active():
            raise KeepLoraError("an analysis runs in one process, or in several by --jobs; start it without a launcher")
        self.plan = plan
        config = load_config(plan.source, {"seed": plan.seed} if plan.run is None else {}, known_methods=method_names())
        if plan.run is None:
            missing = [s["name"] for s in config.ordered_tasks if config.validation_for(s["name"]) is None]
            if missing:
                held = {name: config.validation_for(name) or HELD_OUT for name in config.task_names}
                config = load_config(plan.source, {"seed": plan.seed, "validation": held}, known_methods=method_names())
        self.setup: Setup = prepare(config)
        self.kind, self.family, self.config = self.setup.kind, self.setup.family, config
        self._refuse_judges()
        self.learner = self._learner()
        self.targets: list[Target] = self.learner.targets
        for target in self.targets:
            if quantisation(self.learner.store.module(target.name)) is not None:
                raise KeepLoraError(
                    f"{target.name} is quantised: an analysis takes whole weights apart; load the model with model.quantize: null"
                )
        self._spectra: dict[str, Spectrum] = {}
        self._held = 0
        self.general = self._general()
        self.specific = {t.name: (t, self._specific(t)) for t in self.setup.tasks}

    # ---- data ----------------------------------------------------------------------------------------------------

    def limited(self, samples: Any) -> Any:
        """At most ``limit`` samples, the classes in turn."""
        return spread(samples, self.plan.limit, self.plan.seed)

    def data_set(self, samples: Any) -> Any:
        return self.kind.data_set(self.limited(samples))

    def training_data(self, task: Any) -> Any:
        """The task's training set as the model reads it, no more of it than the limit."""
        return limited_training(self.setup, task, self.plan.limit, self.plan.seed)

    @property
    def configured_energies(self) -> dict[str, float]:
        """ε_w of every tower, where shares are of Σσ², as ε_w is."""
        if self.plan.by != "energy":
            return {}
        config = self.setup.tuner_config()
        return {t: float(config.for_tower("energy_weights", t)) for t in dict.fromkeys(t.tower for t in self.targets)}

    @cached_property
    def features(self) -> dict[str, TaskFeatures]:
        """What a run's ledger knows of its tasks' features; nothing where its method keeps no subspaces."""
        if self.plan.run is None or not self.learner.protects:
            return {}
        return ledger_features(LedgerPlace.open(self.plan.run).ledger)

    def _specific(self, task: Any) -> Any:
        if self.plan.run is not None:
            return self.data_set(task.test)
        # A stream has no sample of a given number; what is held out beside it has.
        return self.data_set(task.validation if isinstance(task.train, SampleStream) else task.train)

    def _general(self) -> dict[str, tuple[Any, Any]]:
        wanted, reference = self.plan.general, self.config.reference
        self.general_kind = "run"
        if self.plan.run is None:
            if wanted == "reference" and reference is None:
                raise ConfigError("--general reference: the experiment names no `reference:` set; use --general probes")
            use = reference is not None and wanted != "probes"
            self.general_kind = "reference" if use else "probes"
            if use and reference is not None:
                task: Any = load_task(reference, data_folder(self.config), probe=True)
                return {task.name: (task, self.data_set(task.test))}
        if not self.setup.probes:
            raise ConfigError(
                "nothing stands for general knowledge: the experiment has no `probes:` and no `reference:`; name at least one, "
                "pictures that no task is about"
            )
        return {p.name: (p, self.data_set(p.test)) for p in self.setup.probes}

    def _refuse_judges(self) -> None:
        for task in [*self.setup.tasks, *self.setup.probes]:
            if getattr(task, "scorer", None) in JUDGED:
                raise ConfigError(
                    f"{task.name} is scored by a judge, who would be asked for every answer at every point; choose a "
                    "scorer without one"
                )

    # ---- model ---------------------------------------------------------------------------------------------------

    def _learner(self) -> ContinualLearner:
        method, model = self.setup.method, self.family.model
        if self.plan.run is None:
            return method.learner(model, self.setup.tuner_config())
        learner = self.setup.opened(self.plan.run)
        if not learner.accumulates:
            raise KeepLoraError(
                f"{self.plan.run}: method {method.name!r} keeps a model per task, so there are no updates to add up or undo"
            )
        return learner

    @contextlib.contextmanager
    def weights(self, change: Callable[[Target, Tensor], Tensor | None]) -> Iterator[None]:
        """With ``change(target, W)`` in place of the weights it gives one for; the old ones are back, bit for bit, afterwards."""
        before: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for target in self.targets:
                    live = self.learner.store.module(target.name).weight
                    changed = change(target, live.detach())
                    if changed is not None:
                        before[target.name] = live.detach().cpu().clone()
                        live.copy_(changed)
            yield
        finally:
            with torch.no_grad():
                for name, W in before.items():
                    self.learner.store.module(name).weight.copy_(W)

    def spectrum(self, name: str, W: Tensor) -> Spectrum:
        """Of an untouched target, kept while there is room."""
        if (found := self._spectra.get(name)) is not None:
            return found
        made = Spectrum.of(W)
        size = made.V.numel() * 4
        if self._held + size <= SPECTRA_BYTES:
            self._spectra[name], self._held = made, self._held + size
        return made

    # ---- scores --------------------------------------------------------------------------------------------------

    def scores(
        self, sets: Mapping[str, tuple[Any, Any]], learner: ContinualLearner | None = None, **more: Any
    ) -> dict[str, list[float]]:
        """What every sample of each set earns with the model as it is now, 0 to 100."""
        who = learner or self.learner
        with self.kind.evaluation(who):
            return {
                name: [round(v, 4) for v in self.kind.per_sample(task, data, who, **more)]
                for name, (task, data) in sets.items()
            }

    def both(self) -> dict[str, Any]:
        """`scores` of the general and of the specific sets."""
        return {"general": self.scores(self.general), "specific": self.scores(self.specific)}

    # ---- what it is ----------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """JSON values that are equal where the numbers would be."""
        setup, config = self.setup, self.config
        sets = {name: data_digest(data) for name, (_, data) in (self.general | self.specific).items()}
        told = {
            "model": config.model.name, "weights": self.learner.store.base_hash(), "sets": sets,
            "tasks": {t.name: t.fingerprint for t in setup.tasks}, "candidates": config.candidates,
            "general_sets": {name: task.fingerprint for name, (task, _) in self.general.items()},
            "max_length": config.model.max_length, **self.plan.told,
        }  # fmt: skip
        if revised := self._revised():
            told["revised"] = revised
        if self.plan.run is not None:
            entries = [[r.name, r.time, r.entry] for r in self.learner.records]
            return told | {"run": hashlib.sha256(json.dumps(entries).encode()).hexdigest()}
        settings = {
            "tuner": config.tuner.model_dump(), "training": config.training.model_dump(), "method": config.method,
            "generation": config.generation.model_dump(), "video": config.video.model_dump(),
            "image_size": config.model.image_size,
        }  # fmt: skip
        return told | settings

    def _revised(self) -> list[str]:
        """Settings under which points of an earlier keeplora mean something else, so that they are not mixed with today's: a
        share of the samples was taken for one sample, ``memory: gradients`` was judged by features, and general sets were scored
        without the open task's classes before it was learned and with them after."""
        tuner = self.config.tuner
        return [
            *(n for n in ("gradient_samples", "feature_samples") if isinstance(getattr(tuner, n), float)),
            *(["memory"] if tuner.memory == "gradients" else []),
            *(["candidates"] if self.config.candidates == "seen" else []),
        ]  # fmt: skip


def data_digest(data: Any) -> str:
    """Of the samples of a set that is evaluated, whatever kind it is of."""
    samples = data.pictures if hasattr(data, "pictures") else data.conversations
    return str(samples.fingerprint)
