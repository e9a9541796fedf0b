"""What a model card says, collected from a ledger, a run directory where there is one, and the base model's own card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.experiment.portable import history, portable_name, without_paths
from keeplora.hub import is_repo_id
from keeplora.math import factor_leak
from keeplora.report.card import Base, CardFacts, Contents, Leak, Opening, Room, TaskFacts
from keeplora.report.runs import Run, load_run
from keeplora.tuner import ContinualLearner, TaskRecord
from keeplora.tuner.basis import Bases
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.persistence import open_ledger
from keeplora.yaml_text import read_yaml

LEARNED_LAST = "learned with the last task, jointly"
MODEL_ARGUMENTS = ("image_size", "quantize", "max_length", "trust_remote_code")
"""Settings of a run's model that opening it again must be given."""


@dataclass(frozen=True)
class Told:
    """What the person who publishes says, and nobody else can know."""

    licence: str | None = None
    languages: tuple[str, ...] = ()
    base_model: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Source:
    """A ledger with what lies around it.

    Attributes:
        records: the tasks in force. history: those whose directions are in U, one that was taken out maybe among them.
        learner: the class that opens it. live: the learner itself, where it is at hand.
    """

    path: Path
    ledger: Ledger
    records: list[TaskRecord]
    history: list[TaskRecord]
    run: Run | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    learner: type[ContinualLearner] = ContinualLearner
    live: ContinualLearner | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's ``model:`` section."""
        return self.config.get("model") or {}

    @property
    def base_dir(self) -> str:
        return str(self.config.get("base_dir") or ".")


def open_source(path: str | Path) -> Source:
    """A run directory, a folder that `save_pretrained` wrote, or a ledger's own.

    Raises:
        KeepLoraError: it is none of them, or damaged.
    """
    path = Path(path).expanduser()
    ledger = open_ledger(path)
    run, config, learner = None, {}, _class_of(ledger)
    if (path / "config.yaml").is_file():
        from keeplora.methods import get_method

        run = load_run(path)
        config, _ = read_yaml(path / "config.yaml")
        if not isinstance(config, dict) or not isinstance(config.get("method"), str):
            raise KeepLoraError(f"{path / 'config.yaml'} is damaged: it names no method; restore it from a copy")
        learner = get_method(config["method"]).learner
    kept = history(ledger)
    records = [each.record for each in kept if each.active]
    past = [each.record for each in kept]
    return Source(path, ledger, records, past, run if run and run.results else None, config, learner)


def _class_of(ledger: Ledger) -> type[ContinualLearner]:
    """The class that wrote the ledger, where it says so and is one of the registered methods'."""
    name = (ledger.head.get("learner") or {}).get("class")
    if name in (None, ContinualLearner.__name__):
        return ContinualLearner
    from keeplora.methods import get_method, method_names

    found = (get_method(method).learner for method in method_names())
    return next((learner for learner in found if learner.__name__ == name), ContinualLearner)


def collect(source: Source, repo_id: str, told: Told, contents: Contents, online: bool = False) -> CardFacts:
    """All facts of the card.

    Args:
        repo_id: where the card will lie. contents: what lies beside it.
        online: whether the hub may be asked for the base model's licence; else only copies that are here are read.
    """
    run, head, records = source.run, source.ledger.head, source.records
    names = [record.name for record in records]
    measured = run.tasks[: run.done] if run is not None else []
    bases = Bases(source.ledger.bases(), source.history)
    pipeline = _pipeline(source)
    return CardFacts(
        repo_id=repo_id, title=told.title or repo_id.split("/")[-1], base=base_of(source, told, pipeline, online),
        tasks=tuple(_task(record, source) for record in records),
        method=_method(source), learner=_opener(source.learner), serves_task=not source.learner.accumulates,
        pipeline_tag=pipeline, licence=told.licence, languages=told.languages,
        rooms=tuple(rooms(head["targets"], bases, source.history)), fullest=fullest(head["targets"], bases, source.history),
        protection=_protection(head["config"]),
        memory="gradients in place of features" if head["config"].get("memory") == "gradients" else "their features",
        leak=_leak(source, bases) if bases else None,
        removed=(removed := tuple(record.name for record in source.history if record.name not in names)),
        gone=tuple(name for name in measured if name not in (*names, *removed)),
        newer=tuple(name for name in names if run is not None and name not in measured),
        versions=head.get("versions") or {}, run=run, contents=contents,
    )  # fmt: skip


# ---- the base model ------------------------------------------------------------------------------------------------


def base_of(source: Source, told: Told, pipeline: str | None, online: bool) -> Base:
    """The base model, under a name that others can use where there is one, and how it is opened."""
    from keeplora.models.checkpoint import OWN

    head = source.ledger.head["base"]
    name = told.base_model or portable_name(head["name"] or head["class"], source.base_dir)
    own = told.base_model is None and name in OWN
    hub_id = name if is_repo_id(name) and not own else None
    revision = None if told.base_model else source.settings.get("revision") or head.get("revision")
    dtype = _dtype(source, pipeline)
    arguments = {"revision": revision, "dtype": dtype, **{key: source.settings.get(key) for key in MODEL_ARGUMENTS}}
    given = {key: value for key, value in arguments.items() if value}
    opened = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in given.items())]).replace("'", '"')
    load = Opening(("from keeplora.models import load_model",), (f"base = load_model({opened}).model",))
    stock = load if own else _stock(name, revision, dtype, head["class"], source)
    return Base(
        name=name, cls=head["class"], hash=head["hash"], hub_id=hub_id, revision=revision,
        licence=_licence(source, name, hub_id, online), stock=stock, own=load if source.config or own else stock,
        module=_module(head["class"]),
    )  # fmt: skip


def _module(cls: str) -> str:
    """Where the base model's class can be imported from; "" where it is somebody's own."""
    import transformers

    from keeplora.models.embedded import EmbeddedDualEncoder

    if hasattr(transformers, cls):
        return "transformers"
    return EmbeddedDualEncoder.__module__ if cls == EmbeddedDualEncoder.__name__ else ""


def _dtype(source: Source, pipeline: str | None) -> str | None:
    """ "bf16" or "fp32" where a generative run has to say it, for its hash is of the weights as they were held; else None."""
    asked = source.settings.get("dtype")
    if asked in ("bf16", "fp32") or not source.config or not (pipeline or "").endswith("text-to-text"):
        return asked if asked in ("bf16", "fp32") else None
    # "auto": as published (half, for nearly all of them) where there was a GPU to run on, else fp32, as it is by default.
    environment = source.run.environment if source.run is not None else {}
    gpus = (environment.get("torch") or {}).get("gpus")
    return "bf16" if gpus and source.config.get("device") != "cpu" else None


def _stock(name: str, revision: str | None, dtype: str | None, cls: str, source: Source) -> Opening | None:
    """How transformers opens the base; None where it is no class of theirs, or was quantised."""
    if _module(cls) != "transformers" or source.settings.get("quantize"):
        return None
    imports, arguments = [f"from transformers import {cls}"], [f'"{name}"']
    if revision:
        arguments.append(f'revision="{revision}"')
    if source.config:  # runs say it when they open a model; whoever has a loop of their own took transformers' default
        imports.append("import torch")
        arguments.append(f"dtype=torch.{'bfloat16' if dtype == 'bf16' else 'float32'}")
    return Opening(tuple(imports), (f"base = {cls}.from_pretrained({', '.join(arguments)})",))


def _licence(source: Source, name: str, hub_id: str | None, online: bool) -> str | None:
    """What the base model's own card says; None where there is none at hand."""
    from huggingface_hub import hf_hub_download, metadata_load

    local = Path(source.base_dir, source.ledger.head["base"]["name"] or name, "README.md")
    try:
        if local.is_file():
            card: Any = local
        elif hub_id is not None:
            card = hf_hub_download(hub_id, "README.md", local_files_only=not online)
        else:
            return None
        found = metadata_load(card) or {}
    except Exception:  # a card that cannot be read tells no licence, and that is what is said
        return None
    licence = found.get("license_name") if found.get("license") == "other" else found.get("license")
    return str(licence) if licence else None


# ---- method and tasks ----------------------------------------------------------------------------------------------


def _opener(learner: type[ContinualLearner]) -> tuple[str, str]:
    """How another person gets the class that opens the ledger: an import line, and an expression."""
    if learner is ContinualLearner:
        return ("from keeplora import ContinualLearner", "ContinualLearner")
    return (f"from {learner.__module__} import {learner.__name__}", learner.__name__)


def _method(source: Source) -> str:
    if source.run is not None:
        return source.run.label
    if source.config:
        from keeplora.methods import get_method

        return get_method(source.config["method"]).title
    return "" if source.learner is ContinualLearner else source.learner.__name__


def _pipeline(source: Source) -> str | None:
    """The hub's name for what the model does, where it can be told."""
    infos = [record.info for record in source.records]
    videos = any("video" in info for info in infos)
    answers = any("scorer" in info for info in infos)
    cls = source.ledger.head["base"]["class"]
    if answers or cls.endswith("ForConditionalGeneration"):
        return "video-text-to-text" if videos else "image-text-to-text"
    if any(info.get("classes") for info in infos):
        return "video-classification" if videos else "zero-shot-image-classification"
    from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES

    return "zero-shot-image-classification" if cls in NAMES.values() else None


def _fate(record: TaskRecord) -> str:
    info = record.info
    if info.get("undone"):
        return "undone: it was not accepted"
    if why := info.get("not_learned"):
        return f"not learned: {without_paths(str(why))}"
    if info.get("deferred"):
        return LEARNED_LAST
    return "learned" if record.factors or record.full or record.tensors else "nothing was learned of it"


def _task(record: TaskRecord, source: Source) -> TaskFacts:
    info = record.info
    sets = source.run.sets if source.run is not None else []
    entry = next((s for s in sets if s.get("name") == record.name and s.get("kind") != "probe"), {})
    classes = info.get("classes")
    scorer = info.get("scorer") or entry.get("scorer")
    ranks = sorted({f.A.shape[0] for f in record.factors.values()})
    spec = next((s for s in source.config.get("tasks") or [] if s.get("name") == record.name), {})
    return TaskFacts(
        name=record.name, fate=_fate(record),
        learns=f"{len(classes)} classes" if classes else f"questions ({scorer})" if scorer else "",
        train=entry.get("train"), test=entry.get("test"), fingerprint=str(info.get("data") or entry.get("fingerprint") or ""),
        licence=entry.get("licence"), seed=info.get("seed"), when=record.time or info.get("time"),
        dataset=_dataset(spec, source), layers=len(record.factors) or len(record.full),
        ranks="–".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "", scorer=scorer,
    )  # fmt: skip


def _dataset(spec: Mapping[str, Any], source: Source) -> str | None:
    """The data set's name on the hub, where the task was loaded by it."""
    path = spec.get("path")
    beside = Path(source.base_dir, spec.get("base_dir") or ".", str(path))
    hub = spec.get("source") == "datasets" and is_repo_id(path) and not beside.exists()
    return str(path) if hub else None


# ---- room and leaks ------------------------------------------------------------------------------------------------


def _used(name: str, bases: Bases, records: Sequence[TaskRecord]) -> tuple[int, int]:
    """Columns of U at the start and now. The one place that counts them."""
    start = bases.start[name].k if name in bases else 0
    return start, next((record.used[name] for record in reversed(records) if name in record.used), start)


def rooms(targets: Sequence[Mapping[str, Any]], bases: Bases, records: Sequence[TaskRecord]) -> list[Room]:
    """Dimensions of each tower, summed over its layers; empty where nothing is protected.

    >>> targets = [{"name": "q", "tower": "vision", "n_in": 8}, {"name": "k", "tower": "vision", "n_in": 8}]
    >>> import torch
    >>> U = Bases.of({"q": torch.eye(8)[:, :2], "k": torch.eye(8)[:, :1]})
    >>> rooms(targets, U, [TaskRecord("a", used={"q": 4, "k": 1})])
    [Room(name='vision', used=5, of=16, start=3)]
    """
    towers: dict[str, list[Room]] = {}
    for t in targets if bases else ():
        start, used = _used(t["name"], bases, records)
        towers.setdefault(t["tower"] or "model", []).append(Room(t["name"], used, t["n_in"], start))
    return [
        Room(name, sum(r.used for r in each), sum(r.of for r in each), sum(r.start for r in each))
        for name, each in towers.items()
    ]


def fullest(targets: Sequence[Mapping[str, Any]], bases: Bases, records: Sequence[TaskRecord]) -> Room | None:
    """The layer of which the smallest share is left."""
    found = [Room(t["name"], _used(t["name"], bases, records)[1], t["n_in"]) for t in targets if bases]
    return min(found, key=lambda room: room.left / room.of, default=None)


def _leak(source: Source, bases: Bases) -> Leak:
    """The worst over layers and tasks, from the factors and the bases as they were when each task came."""
    worst = Leak(0.0, "", "")
    for name in bases:
        for record, U in zip(source.history, bases.before_each(name), strict=True):
            if (f := record.factors.get(name)) is not None and (leak := factor_leak(f.B, f.A, U)) > worst.factors:
                worst = Leak(leak, name, record.name)
    rows = ((source.run.results.get("audit") or {}).get("rows") or []) if source.run is not None else []
    weights = max(
        (row for row in rows if row.get("weight_leak") is not None), key=lambda row: row["weight_leak"], default=None
    )
    if weights is None:
        return worst
    return Leak(worst.factors, worst.layer, worst.task, weights["weight_leak"], weights.get("weight_floor"))


def _protection(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key or 'model'} {entry}" for key, entry in value.items())
        return str(value)

    keys = {
        "energy of the weights, ε_w": "energy_weights", "energy of the features, ε_f": "energy_features",
        "scale of the shallowest block, γ": "gamma", "schedule": "schedule", "r": "r", "alpha": "lora_alpha",
    }  # fmt: skip
    return tuple((told, shown(config[key])) for told, key in keys.items() if key in config)
