"""Results as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.report.answers import count_tables, read_answers
from keeplora.report.charts import number
from keeplora.report.compare import best, entries
from keeplora.report.kinds import CLASSIFICATION
from keeplora.report.runs import Run, load_run
from keeplora.report.tables import duration

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


MOST_TASKS = 12
"""A matrix of more tasks is told in means: its columns would be cut to a digit each."""


def _runs(results: Sequence[Mapping[str, Any] | Run]) -> list[Run]:
    return [
        one if isinstance(one, Run) else Run(path=Path(str(one.get("name") or "run")), results=dict(one))
        for one in results
    ]


def _value(value: float | None, best: bool) -> Text:
    from rich.text import Text

    return Text(f"{number(value)}★" if best else number(value), style="bold" if best else "")


def results_table(results: Sequence[Mapping[str, Any] | Run], *, title: str | None = None) -> Table:
    """Methods x the metrics of the runs' kind and seconds, the best of each column starred.

    ``results`` are runs (`load_run`), or the contents of their ``results.json`` files, that share a ``comparison_key``; of
    two runs of one method only the former can say which settings differ. The last row is the untouched
    model, read off row 0, unless a zero-shot run is among them. Values are percent (forgetting and BWT: points); "–" is
    a value that does not exist (yet).

    Example::

        rich.print(results_table([load_results(path) for path in paths]))
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    runs = _runs(results)
    metrics = (runs[0].kind if runs else CLASSIFICATION).metrics
    for _, name, _, _ in metrics:  # a star marks the best, so no arrow is needed, and 80 columns are enough
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    if not runs:
        return table
    found = entries(runs[0], runs[1:])
    winners = {key: best(found, key, higher) for key, _, higher, _ in metrics}
    if any(winners.values()):
        lowest = [name for key, name, higher, _ in metrics if winners[key] and not higher]
        but = f" ({' and '.join(lowest)}: the lowest)" if lowest else ""
        table.caption, table.caption_justify = f"★ the best of its column, as far as shown{but}", "left"
    for i, entry in enumerate(found):
        label = entry.label
        if entry.run is not None and entry.run.removed:
            label += f" (with {', '.join(entry.run.removed)}, taken out since)"
        if entry.run is not None and not entry.run.finished:
            label += f" ({entry.run.done} of {len(entry.run.tasks)} tasks)"
        # Text, not markup: a name may hold square brackets.
        row = [Text(label, style="dim" if entry.run is None else "")]
        row += [_value(entry.metrics.get(k), i in winners[k]) for k, *_ in metrics]
        table.add_row(*row, Text(duration(entry.run.cost.get("seconds")) if entry.run else "–"))
    return table


def scorer_note(run: Run) -> str:
    """The scorer that most sets have, then the sets of the others.

    >>> scorer_note(Run(Path("x"), {"scorers": {"counting": "exact", "signs": "exact", "captions": "rouge-l"}}))
    'exact; captions: rouge-l'
    """
    most = Counter(run.scorers.values()).most_common(1)
    others = [f"{name}: {scorer}" for name, scorer in run.scorers.items() if scorer != most[0][0]]
    return "; ".join([most[0][0], *others])


def matrix_table(results: Mapping[str, Any]) -> Table:
    """One run's matrix: a row per moment, a column per task, then the probe sets; a task just learned is bold.

    Of more than `MOST_TASKS` tasks the columns are means, since no terminal is that wide; the report has the whole matrix.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = _runs([results])[0]
    title = Text(f"{run.label}: {run.kind.quantity} in percent")
    if run.scorers:
        title.append(f" ({scorer_note(run)})")
    note = f"Measured with {', '.join(run.removed)} in the model, which was taken out since." if run.removed else None
    table = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption=Text(note) if note else None, caption_justify="left",
    )  # fmt: skip
    table.add_column("moment", no_wrap=True)
    shortened = len(run.tasks) > MOST_TASKS
    for name in ("just learned", "mean of learned", "mean of those to come") if shortened else run.tasks:
        table.add_column(Text(name), justify="right")
    for name in run.probes:
        table.add_column(Text(f"{name} (probe)"), justify="right", style="dim")
    for i, row in enumerate(run.accuracy):
        moment = "before" if i == 0 else f"after {run.tasks[i - 1]}" if i <= len(run.tasks) else f"after {i}"
        probes = run.probe_accuracy[i] if i < len(run.probe_accuracy) else [None] * len(run.probes)
        values = _means(row, i) if shortened else row
        cells = [
            Text(number(value), style="bold" if not shortened and j == i - 1 else "") for j, value in enumerate(values)
        ]
        table.add_row(Text(moment), *cells, *(Text(number(value)) for value in probes))
    return table


def _means(row: Sequence[float | None], learned: int) -> list[float | None]:
    """The task just learned, the mean of all learned, the mean of those to come.

    >>> _means([90.0, 80.0, 30.0, 10.0], 2), _means([None, None], 1)
    ([80.0, 85.0, 20.0], [None, None, None])
    """
    sides = ([value for value in side if value is not None] for side in (row[:learned], row[learned:]))
    just = row[learned - 1] if 0 < learned <= len(row) else None
    return [just, *(sum(side) / len(side) if side else None for side in sides)]


def answers_tables(run_dir: Path) -> list[Table]:
    """What became of every test question of a run that answers questions; empty for other runs and without predictions.

    One table of the tasks that are seen before, right after and later, one of the sets with two moments.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = load_run(run_dir)
    made = []
    for one in count_tables(read_answers(run, pictures=False)) if run.scorers else []:
        table = Table(
            title=Text(one.caption),
            title_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, name in enumerate(one.head):
            table.add_column(name, justify="left" if i == 0 or i in one.left else "right", no_wrap=True)
        for row in one.rows:
            table.add_row(*(Text(cell if isinstance(cell, str) else cell.text) for cell in row))
        made.append(table)
    return made
