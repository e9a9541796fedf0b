"""From the labels that a source writes to numbered classes with display names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keeplora.data.sets import Entry
from keeplora.data.spec import RawTask, TaskSpec, listing, suggest
from keeplora.errors import DataError


@dataclass(frozen=True, slots=True)
class Classes:
    """``raw[i]`` is what the source writes for class ``i``, ``display[i]`` what a prompt says."""

    raw: list[str]
    display: list[str]


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def in_order(labels: Iterable[str]) -> list[str]:
    """Sorted by code point; by value where every label is a whole number (so that 10 follows 9)."""
    found = sorted(set(labels))
    return sorted(found, key=int) if found and all(map(_is_number, found)) else found


def resolve_classes(entries: Sequence[Entry], raw: RawTask, spec: TaskSpec) -> Classes:
    """Number the classes of the training entries (of the test entries for a probe).

    Raises:
        DataError: a class without a picture, a label outside ``classes``, one class only, two classes of one name.
    """
    present = {entry.label for entry in entries}
    declared = raw.class_order
    order = in_order(present) if declared is None else [c for c in declared if c in present]
    absent = [c for c in declared or () if c not in present]
    pretty = {label: label.replace("_", " ").strip() or label if raw.pretty else label for label in order}
    if isinstance(spec.classes, list):
        order, display = _listed(spec.classes, entries, order, pretty)
    else:
        if absent:
            raw.warnings.append(f"{len(absent)} declared class(es) without a picture were left out: {listing(absent)}")
        for label in spec.classes or {}:
            if label not in pretty:
                raise DataError(f"`classes` renames {label!r}, which is no class of the data{suggest(label, order)}")
        display = [(spec.classes or {}).get(label, pretty[label]) for label in order]
    if len(order) < 2:
        only = f"only the class {order[0]!r}" if order else "no class"
        raise DataError(f"{only} in {_place(entries)}; a task needs at least two classes{raw.hint}")
    for index, name in enumerate(display):
        first = display.index(name)
        if first < index:
            raise DataError(
                f"the classes {order[first]!r} and {order[index]!r} would both be called {name!r}; "
                "give them different names with `classes`"
            )
    return Classes(order, display)


def _listed(
    names: list[str], entries: Sequence[Entry], order: list[str], pretty: dict[str, str]
) -> tuple[list[str], list[str]]:
    """A list fixes the order. Its names are the source's labels; or, where these are 0, 1, ..., their names."""
    found = {**{pretty[label]: label for label in order}, **{label: label for label in order}}
    by_index = not any(name in found for name in names) and all(map(_is_number, order))
    if by_index:
        found = {name: str(index) for index, name in enumerate(names)}
    for name in names:
        if found.get(name) not in order:
            raise DataError(
                f"`classes` names {name!r}, which has no picture in {_place(entries)}{suggest(name, order)}"
            )
    chosen = [found[name] for name in names]
    for entry in entries:
        if entry.label not in chosen:
            raise DataError(f"{entry.where}: label {entry.label!r} is not in `classes`{suggest(entry.label, names)}")
    return chosen, [pretty[name] if name == label else name for name, label in zip(names, chosen)]


def _place(entries: Sequence[Entry]) -> str:
    return f"the {len(entries)} pictures ({entries[0].where}, ...)" if entries else "the data"


def check_labels(entries: Sequence[Entry], classes: Classes, split: str) -> list[str]:
    """Refuse a class that training lacks; return a warning for classes that the split lacks."""
    known = set(classes.raw)
    for entry in entries:
        if entry.label not in known:
            raise DataError(
                f"{entry.where}: class {entry.label!r} is in {split} but not in train; "
                f"add training pictures of it or remove it from {split}{suggest(entry.label, classes.raw)}"
            )
    missing = [label for label in classes.raw if label not in {entry.label for entry in entries}]
    if not missing:
        return []
    return [f"{len(missing)} class(es) of train have no picture in {split}: {listing(missing)}"]
