"""What the JSON files of a run directory may hold, checked before anything is made of them.

The files are keeplora's own, but whoever can write the folder can write them. Keys that are not named here are let pass:
another version may know more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from keeplora.errors import KeepLoraError

_STRICT = ConfigDict(strict=True, extra="allow")

Number = Annotated[float, Field(allow_inf_nan=False)] | None
"""A loss that diverged is written as null."""
Count = Annotated[int, Field(ge=0, lt=2**63)] | None
Text = str | None
Row = list[Number]


@with_config(_STRICT)
class Epoch(TypedDict, total=False):
    epoch: Count
    loss: Number
    train_accuracy: Number
    lr: Number
    seconds: Number


@with_config(_STRICT)
class EpochEvent(Epoch, total=False):
    task: Text


@with_config(_STRICT)
class TaskInfo(TypedDict, total=False):
    name: Text
    seconds: dict[str, Number] | None
    epochs: list[Epoch] | None
    best_epoch: Count
    accepted: bool | None
    trained_parameters: Count
    rank_shrunk: list[str] | None
    not_adapted: list[str] | None


LayerCounts = Annotated[list[Count], Field(max_length=100_000)]


@with_config(_STRICT)
class Layer(TypedDict, total=False):
    layer: Text
    tower: Text
    depth: Count
    blocks: Count
    scale: Number
    rank: LayerCounts | None
    used: LayerCounts | None


_Layer = TypedDict("_Layer", {"in": Count, "out": Count}, total=False)


@with_config(_STRICT)
class LayerRow(Layer, _Layer, total=False):
    """`Layer` with the keys that are words of Python."""


@with_config(_STRICT)
class AuditRow(TypedDict, total=False):
    layer: Text
    task: Text
    factor_leak: Number
    weight_leak: Number
    weight_floor: Number


@with_config(_STRICT)
class Audit(TypedDict, total=False):
    rows: list[AuditRow] | None
    notes: list[str] | None
    factor_leak_max: Number


@with_config(_STRICT)
class Results(TypedDict, total=False):
    name: Text
    kind: Text
    method: Text
    method_title: Text
    variant: Text
    order: Text
    candidates: Text
    evaluate_on: Text
    model: Text
    suite: Text
    seed: Count
    comparison_key: Text
    tasks: list[str] | None
    probes: list[str] | None
    accuracy: list[Row] | None
    probe_accuracy: list[Row] | None
    test_counts: dict[str, Count] | None
    chance: dict[str, Number] | None
    scorers: dict[str, str] | None
    metrics: dict[str, Number] | None
    layers: list[LayerRow] | None
    tasks_info: list[TaskInfo] | None
    cost: dict[str, Number] | None
    audit: Audit | None
    warnings: list[str] | None


@with_config(_STRICT)
class SetEntry(TypedDict, total=False):
    name: Text
    kind: Text
    classes: list[str] | None
    templates: list[str] | None
    train: Count
    validation: Count
    test: Count
    fingerprint: Text
    licence: Text
    warnings: list[str] | None
    scorer: Text
    max_new_tokens: Count


@with_config(_STRICT)
class Info(TypedDict, total=False):
    """What a run keeps in a task's record."""

    kind: Text
    classes: list[str] | None
    templates: list[str] | None
    seconds: dict[str, Number] | None
    epochs: list[Epoch] | None
    best_epoch: Count
    trained_parameters: Count
    rank_shrunk: list[str] | None
    not_adapted: list[str] | None
    undone: bool | None
    deferred: bool | None
    prompt: Text
    max_new_tokens: Count


@with_config(_STRICT)
class Data(TypedDict, total=False):
    tasks: list[SetEntry] | None


@with_config(_STRICT)
class Status(TypedDict, total=False):
    state: Text
    tasks_done: Count
    error: Text
    started: Text
    updated: Text
    seconds: Number


_SHAPES = {name: TypeAdapter(shape) for name, shape in (
    ("results.json", Results), ("data.json", Data), ("status.json", Status), ("epoch", EpochEvent), ("info", Info),
)}  # fmt: skip


def check_shape(value: Any, name: str, where: str | Path) -> None:
    """`KeepLoraError` that names the first entry which cannot be what keeplora wrote.

    Args:
        name: the file's name in a run directory, "epoch" for such an event of metrics.jsonl, "info" for
            that of a task's record. where: how the sentence names it.

    >>> check_shape({"tasks_done": "many"}, "status.json", "runs/a/status.json")
    Traceback (most recent call last):
    keeplora.errors.KeepLoraError: runs/a/status.json: tasks_done is 'many' (input should be a valid integer): the file was \
changed or damaged; restore it from a copy
    """
    if (shape := _SHAPES.get(name)) is None:
        return
    try:
        shape.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        shown = repr(first["input"])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise KeepLoraError(
            f"{where}: {key} is {shown} ({first['msg'][:1].lower()}{first['msg'][1:]}): the file was changed or damaged; "
            "restore it from a copy"
        ) from None


def remedy(path: Path) -> str:
    """What to do about a file of a run that cannot be read; never to delete the run, whose ledger may be whole."""
    if path.name == "results.json":
        return (
            "restore it from a copy, or delete this one file: `keeplora resume` makes it again from the ledger and "
            "metrics.jsonl"
        )
    return "restore it from a copy"
