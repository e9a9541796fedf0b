"""What a task's data lacks: files, pictures, classes, counts."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from keeplora.data.classes import check_labels, resolve_classes
from keeplora.data.conversation_spec import ConversationSpec, parse
from keeplora.data.doctor.check import Progress, TaskCheck, miscounted
from keeplora.data.doctor.layouts import look_for, needed
from keeplora.data.doctor.look import Look, find_duplicates, look_at
from keeplora.data.doctor.questions import examine_questions
from keeplora.data.sets import Entry
from keeplora.data.spec import RawTask, Source, TaskSpec, listing
from keeplora.errors import ConfigError, DataError, KeepLoraError
from keeplora.files import expand


def examine(
    spec: Mapping[str, Any],
    base: Path,
    sources: Mapping[str, Source],
    *,
    fetch: str = "",
    probe: bool = False,
    full: bool = False,
    progress: Progress = lambda task, done, total: None,
) -> TaskCheck:
    """Look at all of a task's data and say what is wrong with it. It never raises because of the data.

    Args:
        spec: the task as `keeplora.data.load_task` takes it; of a class-incremental one the whole dataset is looked at.
        base: where relative paths start.
        sources: `keeplora.data.SOURCES`.
        fetch: where to get the data, in words.
        probe: look only at what a probe set needs.
        full: decode every picture; else its size, first kilobyte and end are looked at.
        progress: called now and then.
    """
    check = TaskCheck(name=str(spec.get("name")))
    whole = {key: value for key, value in spec.items() if key not in ("split_classes", "part", "fetch")}
    try:
        _examine(check, whole, base, sources, probe, full, progress)
    except ConfigError as error:  # the description is wrong, not the data
        check.problems.append(str(error))
        return check
    except KeepLoraError as error:
        check.problems.append(str(error))
    except Exception as error:  # whatever it is, the other datasets must still be looked at
        check.problems.append(f"its loader failed, which is a fault of keeplora ({type(error).__name__}: {error})")
    if check.missing or (check.problems and not check.pictures):
        check.fetch = fetch
    return check


def _examine(
    check: TaskCheck, given: Mapping[str, Any], base: Path, sources: Mapping[str, Source],
    probe: bool, full: bool, progress: Progress,
) -> None:  # fmt: skip
    spec = parse(given, sources)
    check.source, check.expect = spec.source, dict(spec.expect)
    progress(spec.name, 0, 0)
    reader = importlib.import_module(sources[spec.source].module)
    if isinstance(spec, ConversationSpec):
        examine_questions(check, spec, base, reader.read, probe=probe, full=full, progress=progress)
        return
    if names := needed(spec):
        check.folder = os.path.abspath(base / expand(spec.path or ""))
        root = Path(check.folder)
        if not root.is_dir():
            check.missing = [os.path.basename(root) + "/"]
            check.problems.append(f"{root}: no such folder{_near(root)}")
            return
        check.found, check.missing = look_for(root, names)
        check.problems += [f"{check.folder}: lacks {name}" for name in check.missing]
        if check.missing:
            return
    elif spec.path is not None:
        path = base / expand(spec.path)
        check.folder = os.path.abspath(path) if path.exists() else ""
    raw = reader.read(spec, base, probe)
    _lists(check, raw, spec, probe)
    _pictures(check, raw, spec, full, progress)


def _near(folder: Path) -> str:
    """A folder beside it whose name differs a little: another release, or another way to unpack."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    plain = {_plain(name): name for name in beside}
    near = difflib.get_close_matches(_plain(folder.name), plain, n=1, cutoff=0.6)
    return f"; is it {plain[near[0]]!r} beside it? Then rename or link that" if near else ""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _lists(check: TaskCheck, raw: RawTask, spec: TaskSpec, probe: bool) -> None:
    """Classes and counts, from the lists alone."""
    check.pictures = {split: len(entries) for split, entries in raw.splits.items()}
    for split, places in raw.empty.items():
        check.problems += [
            f"{place}: the class folder {label!r} of {split} holds no picture" for label, place in places
        ]
    main = "test" if probe and "test" in raw.splits else "train"
    try:
        classes = resolve_classes(raw.splits.get(main, []), raw, spec)
        check.classes = len(classes.raw)
        for split in raw.splits:
            if split != main and not probe:
                check.notes += check_labels(raw.splits[split], classes, split)
    except DataError as error:
        check.problems.append(str(error))
        check.classes = len({entry.label for entry in raw.splits.get(main, [])})
    check.notes += raw.warnings
    if "test" not in raw.splits:  # train and test are cut out of one set
        found = {"classes": check.classes, "train and test": check.pictures.get("train", 0)}
        wanted = {"classes": spec.expect.get("classes"), "train and test": _total(spec.expect)}
    else:
        found = {"classes": check.classes, **check.pictures}
        wanted: dict[str, int | None] = dict(spec.expect)
    check.problems += miscounted(found, wanted)


def _total(expect: Mapping[str, int]) -> int | None:
    return expect["train"] + expect["test"] if {"train", "test"} <= set(expect) else None


def _pictures(check: TaskCheck, raw: RawTask, spec: TaskSpec, full: bool, progress: Progress) -> None:
    total, done = sum(check.pictures.values()), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(spec.name, done, total)

    splits: dict[str, list[tuple[Entry, Look]]] = {}
    for split, entries in raw.splits.items():
        looks = look_at(entries, full=full, max_pixels=spec.max_pixels, tick=tick)
        splits[split] = list(zip(entries, looks, strict=True))
        check.tally(splits[split], split, skip=spec.on_error == "skip")
    if (
        spec.on_error == "skip"
    ):  # a run does without them; published counts were compared before, with all that is there
        for split, found in splits.items():
            check.pictures[split] -= sum(bool(look.problem) for _, look in found)
    found = find_duplicates(splits)
    (check.problems if spec.duplicates == "refuse" else check.notes).extend(found)


def summary(checks: Collection[TaskCheck]) -> str:
    """One line: how many tasks are ready, and which are not."""
    bad = [check.name for check in checks if not check.ok]
    if not bad:
        return f"All {len(checks)} datasets are there and sound."
    return f"{len(checks) - len(bad)} of {len(checks)} datasets are ready; not ready: {listing(bad, 12)}."
