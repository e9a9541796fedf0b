"""`keeplora suites`: list the benchmarks, show one, and check that its data is there and sound."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.errors import ConfigError
from keeplora.files import expand

if TYPE_CHECKING:
    from rich.console import Console

    from keeplora.data.doctor import TaskCheck

app = typer.Typer(help="List, show and check the benchmark suites.", invoke_without_command=True)
_Name = Annotated[str, typer.Argument(help="A packaged suite, such as mtil, or the path of a suite's YAML file.")]


@app.callback()
def _list_unless_asked(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        ls()


@app.command()
def ls() -> None:
    """List the packaged suites."""
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console
    from keeplora.suites import load_suite, suite_names

    table = Table()
    for header in ("name", "tasks", "probes", "what it is"):
        table.add_column(header)
    for name in suite_names():
        suite = load_suite(name)
        tasks, probes = (", ".join(spec["name"] for spec in suite[key]) for key in ("tasks", "probes"))
        table.add_row(name, tasks, probes, suite["description"])
    print_table(wide_console(), table)


@app.command()
def show(name: _Name) -> None:
    """Show a suite: its tasks, counts, prompts, scores, orders, and where its data is looked for."""
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console
    from keeplora.suites import data_folder, load_suite

    suite = load_suite(name)
    console = wide_console()
    console.print(f"{suite['name']}: {suite['description']}", highlight=False)
    model = suite.get("model")
    settings = {
        "model": model.get("name") if isinstance(model, dict) else model, "preset": suite.get("preset"),
        "candidates at test": suite.get("candidates"), "data": data_folder(name),
    }  # fmt: skip
    for key, value in settings.items():
        if value is not None:
            _line(console, f"{key}: {value}")
    for order, entry in suite.get("orders", {}).items():
        preset = f" (preset {entry['preset']})" if "preset" in entry else ""
        _line(console, f"order {order}{preset}: {', '.join(entry['order'])}")
    table = Table()
    asked = any(_asks(spec) for key in ("tasks", "probes") for spec in suite[key])
    for header in ("", "name", "source", "path", "classes", "train", "test", "prompt", *(["score"] if asked else [])):
        table.add_column(header, justify="right" if header in ("classes", "train", "test") else "left")
    for kind, key in (("task", "tasks"), ("probe", "probes")):
        for spec in suite[key]:
            expect = spec.get("expect") or {}
            counts = (f"{expect[count]:,}" if count in expect else "" for count in ("classes", "train", "test"))
            prompts = spec.get("templates", spec.get("prompt", ""))
            prompt = prompts if isinstance(prompts, str) else prompts[0] if prompts else ""
            place = str(spec.get("path", spec.get("train", "")))
            score = str(spec.get("scorer", "exact")) if _asks(spec) else "accuracy"
            split = spec.get("split_classes")
            parts = f" in {split.get('tasks')} tasks" if isinstance(split, dict) else ""
            cells = (kind, spec["name"] + parts, str(spec.get("source", "folder")), place, *counts, prompt)
            table.add_row(*cells, *([score] if asked else []))
    print_table(console, table, keys=2)


def _asks(spec: dict[str, Any]) -> bool:
    """Whether a task is of questions and answers."""
    from keeplora.data import SOURCES

    source = SOURCES.get(str(spec.get("source")))
    return source is not None and source.kind == "generation"


@app.command()
def doctor(
    name: _Name,
    data: Annotated[
        Path | None, typer.Option(help="The folder with the datasets; default $KEEPLORA_DATA, else ./data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Decode every picture and video, instead of a look at its first and last bytes."),
    ] = False,
) -> None:
    """Check that a suite's data is all there and sound. Exit status 1 where something is missing or wrong."""
    from keeplora.data import SOURCES
    from keeplora.data.doctor import examine
    from keeplora.suites import data_folder, load_suite

    suite = load_suite(name)
    if data is not None and suite.get("data") != "external":
        raise ConfigError(
            f"--data {data}: the suite {suite['name']!r} says itself where its pictures are; leave it out"
        )
    if data is not None and not expand(data).is_dir():
        raise ConfigError(f"--data {data}: no such folder; give the one that holds the datasets' folders")
    base = data_folder(name, data)
    todo = [(spec, key == "probes") for key in ("tasks", "probes") for spec in suite[key]]
    if isinstance(suite.get("reference"), dict):
        todo.append((suite["reference"], True))
    checks: list[TaskCheck] = []
    with _bar() as progress:
        for spec, probe in todo:
            fetch = suite["fetch"].get(spec["name"], "")
            checks.append(examine(spec, base, SOURCES, fetch=fetch, probe=probe, full=full, progress=progress))
    if as_json:
        found = [{**asdict(check), "ok": check.ok} for check in checks]
        ok = all(check.ok for check in checks)
        print(json.dumps({"suite": suite["name"], "data": str(base), "full": full, "ok": ok, "tasks": found}, indent=1))
    else:
        _tell(checks, suite, base)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _line(console: Console, text: str, style: str = "") -> None:
    """One line however long, so that it can be searched; nothing in it is markup."""
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)


class _bar:
    """A progress bar on standard error; none in a pipe."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._bar.start()
        row = self._bar.add_task("", total=None)

        def progress(task: str, done: int, total: int) -> None:
            self._bar.update(row, description=task, completed=done, total=total or None)

        return progress

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _tell(checks: list[TaskCheck], suite: dict[str, Any], base: Path) -> None:
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console
    from keeplora.data.doctor import summary
    from keeplora.report.tables import size

    table = Table(title=f"{suite['name']}, data in {base}")
    for header in ("name", "classes", "train", "test", "size", "smallest", "largest", ""):
        table.add_column(header, justify="left" if header in ("name", "") else "right")
    for check in checks:
        pictures = {"classes": check.classes, **check.pictures}
        counts = (_count(pictures.get(key), check.expect.get(key)) for key in ("classes", "train", "test"))
        sides = (f"{side[0]} × {side[1]}" if side else "" for side in (check.smallest, check.largest))
        problems = f"{len(check.problems)} problem{'s' if len(check.problems) > 1 else ''}"
        state = "[green]ok[/]" if check.ok else "[bold red]missing[/]" if check.fetch else f"[bold red]{problems}[/]"
        table.add_row(check.name, *counts, size(check.bytes) if check.bytes else "", *sides, state)
    console = wide_console()
    print_table(console, table)
    if not base.is_dir():
        _line(
            console, f"{base}: no such folder; name the datasets' folder with --data, or set KEEPLORA_DATA", "bold red"
        )
    for check in checks:
        for problem in check.problems:
            _line(console, f"{check.name}: {problem}", "red")
        if check.fetch:
            _line(console, f"{check.name}: get it: {check.fetch}")
    notes: dict[str, list[str]] = {}
    for check in checks:
        for note in check.notes:
            notes.setdefault(note, []).append(check.name)
    for note, names in notes.items():
        _line(console, f"{', '.join(names)}: note: {note}", "dim")
    _line(console, summary(checks))


def _count(found: int | None, wanted: int | None) -> str:
    if found is None:
        return f"– of {wanted:,}" if wanted else "–"
    return f"{found:,}" if wanted in (None, found) else f"[bold red]{found:,} of {wanted:,}[/]"
