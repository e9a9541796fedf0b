"""What was learned as one stock PEFT adapter: all tasks, those up to one, or a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from keeplora.errors import ConfigError, KeepLoraError, did_you_mean
from keeplora.tuner.adapter import Factors
from keeplora.tuner.persistence import concatenated, write_peft_adapter
from keeplora.tuner.records import TaskRecord


def choose_records(
    records: Sequence[TaskRecord], *, upto: str | None = None, tasks: Sequence[str] | None = None,
    aside: Sequence[str] = (),
) -> list[TaskRecord]:  # fmt: skip
    """Those of the active tasks that an export is to hold, in the order in which they were learned.

    Args:
        records: the active tasks. upto: the last task of a prefix. tasks: names of a selection. aside: names of tasks that
            were removed or rolled back, for the sentence.

    >>> [r.name for r in choose_records([TaskRecord("a"), TaskRecord("b"), TaskRecord("c")], tasks=["c", "a"])]
    ['a', 'c']
    """
    if upto is not None and tasks is not None:
        raise ConfigError("give --upto or --tasks, not both")
    if upto is None and tasks is None:
        return list(records)
    names = [record.name for record in records]
    wanted = [upto] if upto is not None else list(tasks or ())
    if not wanted or len(set(wanted)) != len(wanted):
        raise ConfigError("--tasks must name different tasks, at least one")
    for name in wanted:
        if name not in names:
            if name in aside:
                raise ConfigError(f"task {name!r} is not active; put it in again with `keeplora ledger restore`")
            hint = did_you_mean(name, names) if names else "; none is learned"
            raise ConfigError(f"no learned task is named {name!r}{hint}")
    if upto is not None:
        return list(records[: names.index(upto) + 1])
    return [record for record in records if record.name in wanted]


def write_adapter(
    target: str | Path, records: Sequence[TaskRecord], base_name: str, layers: Mapping[str, tuple[int, int]],
    free: Mapping[str, Tensor] | None = None, *, where: str | Path,
) -> Path:  # fmt: skip
    """The tasks as one stock PEFT adapter: A stacked, s·B side by side, alpha = rank. ``target`` must not exist.

    Args:
        layers: the targets; an update of one of them without factors cannot go into an adapter.
        free: whole parameters of free modules (`free_weights`). where: the ledger, for the sentence.
    """
    factors: dict[str, Factors] = concatenated(list(records))
    whole = sorted({name for record in records for name in record.full if name in layers})
    if not factors or whole:
        raise KeepLoraError(f"{where} holds no low-rank factors; export it with --format merged")
    return write_peft_adapter(Path(target), factors, base_name, free)
