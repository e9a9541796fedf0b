"""Read the runs of a study or of any folders, and refuse to put what differs into one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.files import real_path
from keeplora.methods import get_method, method_names
from keeplora.report.kinds import GENERATION
from keeplora.report.runs import Run, load_run
from keeplora.report.study_data import Study, StudyCell
from keeplora.study.plan import LISTED
from keeplora.study.store import StudyStore, is_study
from keeplora.study.tables import summarise
from keeplora.yaml_text import parse_yaml

KIND = "the kind of run"


class Collected(NamedTuple):
    """Cells that may stand in one table, and sentences on what was left out."""

    cells: list[StudyCell]
    notes: list[str]


def config_of(run: Run) -> dict[str, Any]:
    """The run's configuration; empty where it has none yet."""
    if not run.config:
        return {}
    try:
        value, _ = parse_yaml(run.config, str(run.path / "config.yaml"))
    except ConfigError as error:
        raise KeepLoraError(f"{error}; this file is written by keeplora alone") from None
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    text = "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def identity(run: Run) -> dict[str, Any]:
    """What must be equal for runs to be pooled, whatever the order of their tasks; by names that a sentence can use."""
    config, results = config_of(run), run.results
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    asks = run.kind is GENERATION
    prints = {str(entry.get("name")): entry.get("fingerprint") for entry in run.sets}
    found: dict[str, Any] = {
        KIND: run.kind.name,
        "the model": results.get("model") or model.get("name"),
        "the model's revision": model.get("revision"),
        "the picture size": model.get("image_size"),
        "the model's quantisation": model.get("quantize"),
        "the tasks": sorted(run.tasks),
        "the probe sets": sorted(run.probes),
        "the test candidates": results.get("candidates") or config.get("candidates") or "own",
        "evaluate_on": results.get("evaluate_on") or config.get("evaluate_on") or "test",
    }
    if asks:
        lengths = {str(entry.get("name")): entry.get("max_new_tokens") for entry in run.sets}
        found["the weights' precision"] = model.get("dtype") or "auto"
        found["the longest conversation"] = model.get("max_length")
        found["the scorers"] = sorted(f"{name}: {scorer}" for name, scorer in run.scorers.items())
        found["the longest answers"] = sorted(f"{name}: {tokens}" for name, tokens in lengths.items())
        found["how answers are generated"] = config.get("generation")
    what = "pictures or questions" if asks else "pictures or classes"
    for name in sorted(prints):
        found[f"the {what} of {name}"] = prints[name]
    return found


def differences(a: Run, b: Run) -> str:
    """What differs between two runs, in words; empty where they may be pooled."""
    one, two = identity(a), identity(b)
    if one[KIND] != two[KIND]:
        return f"what they do: a run that {a.kind.does} ({a.kind.name}) against one that {b.kind.does} ({b.kind.name})"
    keys = [key for key in one | two if one.get(key) != two.get(key)]
    # Sets that only one of the two has are told by their names already.
    if "the tasks" in keys or "the probe sets" in keys:
        keys = [key for key in keys if not key.startswith("the pictures or ") or (key in one and key in two)]
    hashes = [key for key in keys if key.startswith("the pictures or ")]
    told = [f"{key} ({_short(one.get(key))} against {_short(two.get(key))})" for key in keys if key not in hashes]
    return ", ".join([*told, *hashes])


def _usable(cell: StudyCell) -> bool:
    return cell.run is not None and bool(cell.run.results)


def _groups(cells: Sequence[StudyCell]) -> list[tuple[list[StudyCell], str]]:
    """Cells by what they were made on, the largest group first; with each, how it differs from the first."""
    groups: dict[str, list[StudyCell]] = {}
    for cell in cells:
        if _usable(cell) and cell.run is not None:
            key = json.dumps(identity(cell.run), sort_keys=True, default=str)
            groups.setdefault(hashlib.sha256(key.encode()).hexdigest(), []).append(cell)
    ordered = sorted(groups.values(), key=len, reverse=True)
    found = [(group, differences(group[0].run, ordered[0][0].run)) for group in ordered]  # type: ignore[arg-type]
    if not ordered:
        return []
    # Within one order the runs' own keys must agree as well: they hash the order and what a later version may add.
    by_key: dict[tuple[str, str], list[StudyCell]] = {}
    for cell in ordered[0]:
        assert cell.run is not None
        by_key.setdefault((cell.order, str(cell.run.results.get("comparison_key"))), []).append(cell)
    kept: list[StudyCell] = []
    odd: list[tuple[list[StudyCell], str]] = []
    for order in dict.fromkeys(cell.order for cell in ordered[0]):
        mine = sorted((group for (label, _), group in by_key.items() if label == order), key=len, reverse=True)
        kept += mine[0]
        for group in mine[1:]:
            first, other = mine[0][0].run, group[0].run
            assert first is not None
            assert other is not None
            same = first.tasks == other.tasks
            told = (
                "their comparison keys"
                if same
                else f"the order of the tasks ({_short(other.tasks)} against {_short(first.tasks)})"
            )
            odd.append((group, told))
    return [(kept, ""), *found[1:], *odd]


def comparable(cells: Sequence[StudyCell], *, strict: bool) -> Collected:
    """Cells that may stand in one table.

    With ``strict`` (runs that someone named) a mixture is refused; else (one study, whose data changed under it) the
    smaller groups are left out and named.
    """
    groups = _groups(cells)
    if len(groups) < 2:
        return Collected(list(cells), [])
    if strict:
        first = groups[0][0][0].path
        lines = [
            f"{group[0].path}{f' and {len(group) - 1} more' if len(group) > 1 else ''} differ from {first} in {told}"
            for group, told in groups[1:]
        ]
        raise KeepLoraError(
            "these runs cannot stand in one table: " + "; ".join(lines) + ". Name the runs of one group at a time."
        )
    out = {id(cell) for group, _ in groups[1:] for cell in group}
    notes = [
        f"{', '.join(cell.place for cell in group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''}: left out of "
        f"every table, made on something else than the rest: {told}."
        for group, told in groups[1:]
    ]
    return Collected([cell for cell in cells if id(cell) not in out], notes)


def study_cells(store: StudyStore) -> list[StudyCell]:
    """The cells of a study's folder, as they are now."""
    found = []
    for key, record in store.cells.items():
        folder = store.folder(key)
        begun = any((folder / name).is_file() for name in ("results.json", "status.json", "config.yaml"))
        run = load_run(folder) if begun else None
        found.append(
            StudyCell(
                key.method, key.order, key.seed, record.state, folder, run, record.error or "", record.dropped_bytes
            )
        )
    return found


def _labels(runs: Sequence[Run]) -> dict[tuple[str, ...], str]:
    """A label for each sequence of tasks: the name its runs give it, else "listed" or a letter."""
    names: dict[tuple[str, ...], str | None] = {}
    for run in runs:
        sequence = tuple(run.tasks)
        names[sequence] = names.get(sequence) or (str(run.results["order"]) if run.results.get("order") else None)
    labels: dict[tuple[str, ...], str] = {}
    letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for sequence, name in names.items():
        label = name or (LISTED if len(names) == 1 else None)
        if label is None or label in labels.values():
            label = f"{label or ''} {next(letters, len(labels))}".strip()
        labels[sequence] = label
    return labels


def read_runs(paths: Sequence[Path]) -> Collected:
    """Cells from run directories, from the folders of studies, and from folders with run directories in them.

    Raises
    ------
    KeepLoraError
        Nothing to read, runs that cannot stand in one table, or two runs of one method, order and seed.
    """
    runs: dict[Path, Run] = {}
    skipped: list[Path] = []
    extra: list[StudyCell] = []
    for path in paths:
        if is_study(path):
            extra += study_cells(StudyStore(path).load())
        elif any((path / name).is_file() for name in ("results.json", "status.json", "config.yaml")):
            runs[real_path(path)] = load_run(path)
        elif path.is_dir() and (inner := sorted(p.parent for p in path.glob("*/results.json"))):
            runs |= {real_path(one): load_run(one) for one in inner}
        elif not path.exists():
            raise KeepLoraError(f"no such file or folder: {path} (methods are given as --methods lora,keeplora++)")
        else:
            skipped.append(path)
    if not runs and not extra:
        told = f"{skipped[0]} is no run directory" if skipped else "no run was named"
        raise KeepLoraError(f"{told}; give folders that `keeplora run` made, or a STUDY.yaml")
    labels = _labels([run for run in runs.values() if run.results])
    # A study's name for a sequence goes before what its runs call it: they may not know it.
    labels |= {tuple(cell.run.tasks): cell.order for cell in extra if cell.run is not None and cell.run.tasks}
    cells = [
        StudyCell(
            run.method, labels[tuple(run.tasks)], run.seed if isinstance(run.seed, int) else 0,
            str(run.status.get("state") or ("finished" if run.finished else "interrupted")), run.path, run,
            str(run.status.get("error") or ""),
        )
        for run in runs.values() if run.results
    ]  # fmt: skip
    unread = [run.path for run in runs.values() if not run.results]
    cells = comparable([*extra, *cells], strict=True).cells
    sequences: dict[tuple[str, ...], StudyCell] = {}
    for cell in cells:
        if cell.run is None or not cell.run.tasks:
            continue
        first = sequences.setdefault(tuple(cell.run.tasks), cell)
        if first.order != cell.order:
            raise KeepLoraError(
                f"{first.path} and {cell.path} have the same sequence of tasks under two names of orders ({first.order} and "
                f"{cell.order}), which would count as two orders; read the studies one at a time"
            )
    seen: dict[tuple[str, str, int], StudyCell] = {}
    for cell in cells:
        other = seen.setdefault((cell.method, cell.order, cell.seed), cell)
        if other is not cell:
            raise KeepLoraError(
                f"{other.path} and {cell.path} are both {cell.place}; a table takes one: name only one of them"
            )
    notes = [f"{path} was passed over: it is no run directory." for path in skipped]
    notes += [f"{path} was passed over: it has no results yet." for path in unread]
    return Collected(cells, notes)


def study_of(
    cells: Sequence[StudyCell], *, name: str, against: str | None, methods: Sequence[str] | None = None,
    orders: Sequence[str] | None = None, facts: Sequence[tuple[str, str]] = (), notes: Sequence[str] = (), strict: bool = False,
) -> Study:  # fmt: skip
    """`summarise` of the cells that may stand in one table, methods in the registry's order unless one is given."""
    collected = comparable(cells, strict=strict)
    names = list(methods or sorted({cell.method for cell in cells}, key=_rank))
    odd = made_otherwise(collected.cells)
    configs = [(c, _in_force(c.run.method, config)) for c in collected.cells if c.run and (config := config_of(c.run))]
    return summarise(
        collected.cells, name=name, against=against, methods=names, orders=orders, titles=_titles(names),
        configs=configs, facts=facts, notes=[*notes, *collected.notes, *odd],
    )  # fmt: skip


def made_otherwise(cells: Sequence[StudyCell]) -> list[str]:
    """A note where runs that are compared, of one order and seed, were not made by the same code, packages or machine."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.finished and cell.run is not None and cell.run.environment:
            groups.setdefault((cell.order, cell.seed), []).append(cell.run.environment)
    found: dict[str, int] = {}
    for group in groups.values():
        for what, told in _MADE_BY.items():
            if len({json.dumps(value, sort_keys=True) for one in group if (value := told(one)) is not None}) > 1:
                found[what] = found.get(what, 0) + 1
    if not found:
        return []
    parts = ", ".join(f"{what} in {n} of {len(groups)} pairs of order and seed" for what, n in found.items())
    return [f"Runs that are compared were not all made alike ({parts}): part of their differences may be of that."]


def _packages(env: Mapping[str, Any]) -> dict[str, Any] | None:
    versions = env.get("versions") or {}
    return {name: versions[name] for name in ("torch", "transformers", "peft", "numpy") if name in versions} or None


_MADE_BY: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "other code of keeplora": lambda env: env.get("code"),
    "other packages": _packages,
    "another processor": lambda env: (env.get("cpu") or {}).get("model"),
    "another GPU": lambda env: (
        sorted({str(gpu.get("name")) for gpu in (env.get("torch") or {}).get("gpus") or []}) or None
    ),
}


def _in_force(method: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what defines the method laid over it, as the learner does."""
    tuner = config.get("tuner")
    fixed = get_method(method).config if method in method_names() else {}
    return {**config, "tuner": {**tuner, **fixed}} if isinstance(tuner, Mapping) else dict(config)


def _rank(name: str) -> tuple[int, str]:
    known = method_names()
    return (known.index(name) if name in known else len(known), name)


def _titles(names: Sequence[str]) -> dict[str, str]:
    known = method_names()
    return {name: get_method(name).title for name in names if name in known}
