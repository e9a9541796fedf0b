"""From a configuration to what a run works with: model, method, data, learner settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from keeplora.data import load_task, split_validation
from keeplora.data.streams import SampleStream
from keeplora.errors import ConfigError
from keeplora.experiment import sharded, zero
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.device import Precision, choose_device
from keeplora.experiment.kinds import Kind, Sets, make_kind
from keeplora.experiment.loggers import check_loggers
from keeplora.methods import Method, get_method
from keeplora.models import load_model
from keeplora.tuner import ContinualLearner, KeepLoraConfig
from keeplora.tuner.options import make_options


@dataclass
class Setup:
    """Everything a run needs, loaded and checked before anything is trained."""

    config: ExperimentConfig
    method: Method
    kind: Kind
    precision: Precision
    tasks: list[Any]
    probes: list[Any]
    sets: dict[str, Sets]
    guards: dict[str, Any] = field(default_factory=dict)
    """Held-out half of each probe, which `accept` may look at; empty without `accept`."""
    reference: tuple[Any, Any] | None = None
    """Texts and pictures beside the tasks', for a method that needs them."""

    @property
    def family(self) -> Any:
        """The model with its processors."""
        return self.kind.family

    def opened(self, run: Path) -> ContinualLearner:
        """The learner of a run's ledger, at the caps that the run's configuration has without a task: an older keeplora wrote one
        sample into the ledger where a share of them was asked for.
        """
        learner = self.method.learner.from_pretrained(run, self.family.model)
        caps = self.tuner_config()
        learner.config = replace(
            learner.config, gradient_samples=caps.gradient_samples, feature_samples=caps.feature_samples
        )
        return learner

    def tuner_config(self, task: Any = None) -> KeepLoraConfig:
        """The learner's settings; shares of the data become counts for ``task``, and without one no cap at all."""
        values: dict[str, Any] = self.config.tuner.model_dump(exclude={"parts", "token_weights"})
        if values["target_modules"] is None:
            values |= self.kind.default_targets()
        for name in ("gradient_samples", "feature_samples"):
            if task is not None:
                values[name] = self.config.tuner.samples(name, len(task.train))
            elif isinstance(values[name], float):
                values[name] = None
        # A schedule over the whole sequence (inflora's) needs its length, which the run knows.
        if "tasks" in {f.name for f in fields(self.method.learner.Options)}:
            values["options"] = {"tasks": len(self.tasks), **values["options"]}
        return self.method.make_config({**values, "seed": self.config.seed})


def open_model(config: ExperimentConfig, device: torch.device) -> Any:
    """The untouched model. A relative folder starts where the task specs' paths start, whatever the current folder."""
    model = config.model
    beside = Path(config.base_dir, model.name)
    return load_model(
        beside if beside.is_dir() else model.name, device=str(device), image_size=model.image_size,
        revision=model.revision, trust_remote_code=model.trust_remote_code, dtype=model.dtype, quantize=model.quantize,
        max_length=model.max_length, video_size=config.video.size,
    )  # fmt: skip


def data_folder(config: ExperimentConfig) -> Path:
    """Where relative paths of the task specs start: for benchmarks, where the user keeps their data."""
    if config.suite is None:
        return Path(config.base_dir)
    from keeplora import suites

    return suites.data_folder(config.suite, config.data_dir)


def load_tasks(config: ExperimentConfig) -> tuple[list[Any], list[Any]]:
    """Tasks in learning order, with validation split off where asked for, and probes."""
    base = data_folder(config)
    tasks = []
    for spec in config.ordered_tasks:
        wanted = config.validation_for(spec["name"])
        own: Mapping[str, Any] = {k: v for k, v in spec.items() if k != "validation"}
        if isinstance(wanted, str):
            own = {**own, "validation": wanted}
        task: Any = load_task(own, base)
        if isinstance(wanted, float):
            if isinstance(task.train, SampleStream):
                raise ConfigError(
                    f"task {task.name!r}: `validation: {wanted}` would cut a stream, which is read once and in order; name a "
                    f"split of its own, or give `validation: {{{task.name}: SPLIT}}`"
                )
            task.train, task.validation = split_validation(task.train, wanted, config.validation_seed)
        if config.evaluate_on == "validation":
            assert task.validation is not None  # checked with the configuration
            task.test = task.validation
        tasks.append(task)
    probes = config.probes if config.evaluate_on == "test" else []
    return tasks, [load_task(spec, base, probe=True) for spec in probes]


def prepare(config: ExperimentConfig) -> Setup:
    """Load model and data. Everything that can be refused is refused here, before a run directory exists."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_loggers(config.loggers)
    method = get_method(config.method)
    if method.task_identity and config.candidates != "own":
        raise ConfigError(f"method {method.name!r} must be told the task of a picture: use `candidates: own`")
    if method.learner.needs_reference and config.reference is None:
        raise ConfigError(
            f"method {method.name!r} needs a reference set, pictures and texts beside the tasks' own: name one under "
            "`reference:`, in the form of a task (name, source, path)"
        )
    make_options(method.learner.Options, config.tuner.options)  # refused now, not when the first task begins
    tasks, probes = load_tasks(config)
    device = choose_device(config.device)
    if zero.stage():
        zero.join(device)
    family = open_model(config, torch.device("cpu") if sharded.asked_for() else device)
    _check_kinds(config, method, family.kind, [*tasks, *probes])
    precision = Precision(config.training.precision, device)
    kind = make_kind(family.kind, config, family, precision, method, tasks, probes)
    setup = Setup(config, method, kind, precision, tasks, probes, {})
    if family.kind != "classification" and any(setup.tuner_config().values_of("energy_general")):
        raise ConfigError(
            "tuner.energy_general keeps tasks off the features of drawn pictures, in models that compare pictures with class "
            f"prompts; {config.model.name} writes answers: leave it out"
        )
    if sharded.asked_for():
        sharded.shard_base(family, setup.tuner_config(), device)
    sets = {task.name: kind.sets(task) for task in tasks}
    guards: dict[str, Any] = {}
    for probe in probes:
        if config.accept is not None:
            probe.test, guard = split_validation(probe.test, 0.5, config.validation_seed)
            guards[probe.name] = kind.data_set(guard)
        sets[probe.name] = kind.sets(probe)
    reference = None
    if method.learner.needs_reference and config.reference is not None:
        beside = load_task(config.reference, data_folder(config), probe=True)
        reference = (beside, kind.data_set(beside.test))
    return replace(setup, sets=sets, guards=guards, reference=reference)


def _check_kinds(config: ExperimentConfig, method: Method, kind: str, tasks: Sequence[Any]) -> None:
    """Model, data and method must be of one kind."""
    says = {"classification": "names pictures among classes", "generation": "answers questions in words"}
    for task in tasks:
        if task.kind != kind:
            raise ConfigError(
                f"task {task.name!r} {says[task.kind]}, but the model {config.model.name!r} {says[kind]}: choose a model or "
                "a source of the other kind (docs/data.md)"
            )
    if kind not in method.kinds:
        raise ConfigError(
            f"method {method.name!r} works on models that {says[method.kinds[0]].replace('names', 'name')}, and "
            f"{config.model.name!r} {says[kind]}; `keeplora methods` lists what each method works on"
        )
    if kind == "generation" and config.candidates != "own":
        raise ConfigError("candidates: a model that answers in words has no candidates; leave it out")
