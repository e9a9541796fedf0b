"""Continual-learning metrics of an accuracy matrix.

A matrix ``accuracy`` has one row per moment and one column per task, in percent: row 0 is the untouched model, row i
the model after task i (i = 1..N). Row 0 never enters a metric; it is what the metrics are held against. All tasks
weigh the same, whatever the size of their test sets.

A metric is ``None`` where it is undefined: while rows are missing (a run that is not finished), where a cell that it
needs is ``None``, and where its mean is over nothing (Transfer, forgetting and BWT of a single task).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from keeplora.errors import KeepLoraError

Row = Sequence[float | None]
Matrix = Sequence[Row]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _check(matrix: Matrix, name: str) -> None:
    """Refuse a matrix that no metric can be read from: ragged, or with a cell that is not a finite number."""
    for i, row in enumerate(matrix):
        if len(row) != len(matrix[0]):
            raise KeepLoraError(
                f"{name}: row {i} has {len(row)} columns and row 0 has {len(matrix[0])}; every row needs one per set"
            )
        for j, value in enumerate(row):
            if value is not None and not math.isfinite(value):
                raise KeepLoraError(f"{name}[{i}][{j}] is {value}; use None for a cell that was not measured")


def _rows(accuracy: Matrix) -> list[Row] | None:
    """Rows 1..N of a finished N-task matrix, else None; raises for a matrix that cannot be one."""
    _check(accuracy, "accuracy")
    if not accuracy or not accuracy[0]:
        return None
    n = len(accuracy[0])
    if len(accuracy) > n + 1:
        raise KeepLoraError(
            f"accuracy has {len(accuracy)} rows for {n} tasks; at most {n + 1} (row 0 is the untouched model)"
        )
    return list(accuracy[1:]) if len(accuracy) == n + 1 else None


def transfer(accuracy: Matrix) -> float | None:
    """Accuracy on tasks before they are learned: mean over j >= 2 of mean over i < j of acc[i][j], i, j = 1..N.

    Each task from the second on is averaged over the moments before it first, so late tasks do not weigh more.

    >>> transfer([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 78, 70]])  # (42 + (34 + 32) / 2) / 2
    37.5
    """
    rows = _rows(accuracy)
    if rows is None or len(rows) < 2:
        return None
    return _mean([_mean([rows[i][j] for i in range(j)]) for j in range(1, len(rows))])


def average(accuracy: Matrix) -> float | None:
    """Mean of all N x N cells (Avg): learned, not yet learned, and just learned alike.

    >>> average([[50, 40], [90, 42], [88, 80]])
    75.0
    """
    rows = _rows(accuracy)
    return None if rows is None else _mean([value for row in rows for value in row])


def last(accuracy: Matrix) -> float | None:
    """Mean over all tasks after the last one.

    >>> last([[50, 40], [90, 42], [88, 80]])
    84.0
    """
    rows = _rows(accuracy)
    return None if rows is None else _mean(list(rows[-1]))


def per_task_forgetting(accuracy: Matrix) -> list[float | None]:
    """For each task j < N: its best over rows 1..N-1 less its value after the last task, in points.

    Negative where a task gained. Returns N values; the last is None, since nothing was learned after the last task.
    All None while rows are missing.

    >>> per_task_forgetting([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 81, 70]])
    [4, -1, None]
    """
    rows = _rows(accuracy)
    n = len(accuracy[0]) if accuracy else 0
    if rows is None:
        return [None] * n
    drops: list[float | None] = []
    for j in range(n - 1):
        column = [value for row in rows if (value := row[j]) is not None]
        drops.append(max(column[:-1]) - column[-1] if len(column) == n else None)
    return [*drops, None]


def forgetting(accuracy: Matrix) -> float | None:
    """Mean of `per_task_forgetting` over the tasks before the last, in points; lower is better.

    >>> forgetting([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 81, 70]])
    1.5
    """
    drops = per_task_forgetting(accuracy)[:-1]
    return _mean(drops)


def bwt(accuracy: Matrix) -> float | None:
    """Backward transfer: sum over j < N of (acc[N][j] - acc[j][j]) / (N - 1), in points; higher is better.

    >>> bwt([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 81, 70]])
    -1.5
    """
    rows = _rows(accuracy)
    if rows is None:
        return None
    pairs = [(rows[-1][j], rows[j][j]) for j in range(len(rows) - 1)]
    return _mean([None if end is None or start is None else end - start for end, start in pairs])


def mft(accuracy: Matrix) -> float | None:
    """Mean Finetune accuracy: mean over i of acc[i][i], each task right after it was learned.

    >>> mft([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 81, 70]])
    80.0
    """
    rows = _rows(accuracy)
    return None if rows is None else _mean([row[i] for i, row in enumerate(rows)])


def mfn(accuracy: Matrix) -> float | None:
    """Mean Final accuracy: mean over j of acc[N][j], all tasks after the last one.

    This is `last` under the name that continual instruction tuning gives it; the two are always equal.

    >>> mfn([[50, 40], [90, 42], [88, 80]])
    84.0
    """
    return last(accuracy)


def maa(accuracy: Matrix) -> float | None:
    """Mean Average Accuracy: mean over i of the mean over j <= i of acc[i][j], the tasks learned so far at each moment.

    >>> maa([[50, 40, 30], [90, 42, 34], [88, 80, 32], [86, 81, 70]])  # (90 + (88 + 80) / 2 + (86 + 81 + 70) / 3) / 3
    84.33333333333333
    """
    rows = _rows(accuracy)
    return None if rows is None else _mean([_mean(list(row[: i + 1])) for i, row in enumerate(rows)])


def probe(probe_accuracy: Matrix) -> float | None:
    """Mean over the probe sets and over rows 1..N: what was never trained on, through the whole sequence.

    ``probe_accuracy`` is [N + 1][number of probe sets], row 0 the untouched model. None without probe sets or rows.

    >>> probe([[46, 20], [44, 18], [42, 16]])
    30.0
    """
    _check(probe_accuracy, "probe_accuracy")
    return _mean([value for row in probe_accuracy[1:] for value in row])


def summary(accuracy: Matrix, probe_accuracy: Matrix = ()) -> dict[str, float | None]:
    """All metrics by their names in ``results.json``.

    They are transfer, average, last, forgetting, bwt, mft, mfn, maa, probe and probe_before.

    ``probe`` is None while the matrix is unfinished, like the others: a mean over fewer rows is another number.
    ``probe_before`` is the untouched model's mean over the probe sets and is known from the first evaluation on.

    >>> summary([[50, 40], [90, 42], [88, 80]], [[46], [44], [42]])["probe"]
    43.0
    """
    finished = _rows(accuracy) is not None
    _check(probe_accuracy, "probe_accuracy")
    if len(probe_accuracy) not in (0, len(accuracy)):
        raise KeepLoraError(
            f"accuracy has {len(accuracy)} rows and probe_accuracy {len(probe_accuracy)}; they share their rows"
        )
    return {
        "transfer": transfer(accuracy),
        "average": average(accuracy),
        "last": last(accuracy),
        "forgetting": forgetting(accuracy),
        "bwt": bwt(accuracy),
        "mft": mft(accuracy),
        "mfn": mfn(accuracy),
        "maa": maa(accuracy),
        "probe": probe(probe_accuracy) if finished else None,
        "probe_before": _mean(list(probe_accuracy[0])) if probe_accuracy else None,
    }
