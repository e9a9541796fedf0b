"""From what a source found to a task: splits, caps, checks, classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keeplora.data.benchmarks.class_incremental import part_of
from keeplora.data.checks import check_entries, handle_duplicates
from keeplora.data.classes import Classes, check_labels, resolve_classes
from keeplora.data.sets import Entry, PictureSet, TaskData
from keeplora.data.spec import DEFAULT_TEST_FRACTION, SPLIT_ALIASES, RawTask, TaskSpec
from keeplora.data.splits import cap_per_class, holdout, split_validation
from keeplora.data.streams import Sample
from keeplora.errors import DataError


def assemble(raw: RawTask, spec: TaskSpec, *, probe: bool) -> TaskData:
    """Build the task.

    The order matters: a split that must be cut is cut from whole pictures only (identical ones kept together); caps
    come before the reading of pictures where they can, so that a small sample of a large set is quick; duplicates
    are looked for among the pictures that are used. A part of the classes (`part`) is taken first of all.
    """
    if spec.part is not None:
        raw, spec = _part(raw, spec)
    _refuse_twice(raw)
    medium = _medium(raw)
    found = _probe_splits(raw, spec) if probe else raw.splits
    splits = {split: found[split] for split in SPLIT_ALIASES if split in found}  # one order, whatever the source's
    _refuse_empty(raw, splits, "test" if probe else "train", medium)
    warnings = raw.warnings
    if "test" not in splits:
        splits, found = _cut_test(splits, spec)
        warnings += found
        if probe:
            del splits["train"]
    limits = {"train": spec.max_train_per_class, "test": spec.max_test_per_class}
    lost: dict[str, int] = {}
    for split, entries in splits.items():
        chosen = cap_per_class([e.key for e in entries], [e.label for e in entries], limits.get(split), spec.split_seed)
        splits[split] = [entries[i] for i in chosen]
        if not all(entry.digest for entry in splits[split]):  # those that were cut have been read already
            splits[split], found = check_entries(splits[split], spec, split)
            lost[split] = len(chosen) - len(splits[split])
            warnings += found
    splits, found = handle_duplicates(splits, spec.duplicates, f"{medium}(s)")
    warnings += found

    main = "test" if probe else "train"
    if not splits[main]:
        raise DataError(f"no usable {medium} is left in {main}; see that the files can be opened")
    _refuse_lost(raw, splits[main], main)
    classes = resolve_classes(splits[main], raw, spec)
    for split in ("test", "validation"):
        if split in splits and split != main:
            warnings += check_labels(splits[split], classes, split)
            if not splits[split]:
                raise DataError(f"no usable {medium} is left in {split}; see that the files can be opened")
    # What cannot be read cannot be learned; in a test it still counts, as named wrongly.
    sets = {
        split: _numbered(entries, classes, spec, 0 if split == "train" else lost.get(split, 0))
        for split, entries in splits.items()
    }
    warnings += _unexpected(classes, splits, spec)
    train = sets.get("train", PictureSet([], [], max_pixels=spec.max_pixels))
    validation = sets.get("validation")
    if isinstance(spec.validation, float) and not probe:
        train, validation = split_validation(train, spec.validation, spec.split_seed)
    return TaskData(
        name=spec.name,
        classes=classes.display,
        templates=spec.templates,
        train=train,
        test=sets["test"],
        validation=validation,
        warnings=warnings,
        licence=spec.licence or raw.licence,
    )


def held_set(samples: Sequence[Sample], spec: TaskSpec, split: str) -> tuple[PictureSet, list[str]]:
    """A streamed test or validation split whose pictures are on the local disk by now: looked at, and as a set."""
    labels = {sample.item.key: sample.label for sample in samples}
    entries = [sample.item for sample in samples if isinstance(sample.item, Entry)]
    if split == "test" and isinstance(spec, TaskSpec) and spec.max_test_per_class is not None:
        chosen = cap_per_class(
            [e.key for e in entries], [e.label for e in entries], spec.max_test_per_class, spec.split_seed
        )
        entries = [entries[i] for i in chosen]
    good, warnings = check_entries(entries, spec, split)
    if not good:
        raise DataError(f"no usable picture is left in {split}; see that the files can be opened")
    skipped = len(entries) - len(good)
    return PictureSet(good, [labels[e.key] for e in good], max_pixels=spec.max_pixels, skipped=skipped), warnings


def _part(raw: RawTask, spec: TaskSpec) -> tuple[RawTask, TaskSpec]:
    """Keep the classes of `part`; what `classes` says is applied first, so that a list there fixes the order."""
    part = spec.part
    assert part is not None
    whole = resolve_classes(raw.splits.get("train") or raw.splits["test"], raw, spec)
    raw = part_of(replace(raw, class_order=whole.raw), part.index, part.of, part.seed)
    display = dict(zip(whole.raw, whole.display, strict=True))
    return raw, replace(spec, classes={label: display[label] for label in raw.class_order or ()})


def _refuse_twice(raw: RawTask) -> None:
    """Names must differ: a picture is looked up by its name when splits are cut and when results are compared."""
    for split, entries in raw.splits.items():
        seen: set[str] = set()
        for entry in entries:
            if entry.key in seen:
                raise DataError(f"{entry.where}: listed twice in {split} (as {entry.key!r}); delete one")
            seen.add(entry.key)


def _medium(raw: RawTask) -> str:
    """ "picture" or "video": a task is all of one, since a model that reads clips of a fixed length reads nothing else."""
    first: dict[str, Entry] = {}
    for entries in raw.splits.values():
        for entry in entries:
            first.setdefault(entry.medium, entry)
    if len(first) > 1:
        raise DataError(
            f"{first['picture'].where} is a picture and {first['video'].where} is a video: a task is of one or the other; "
            "take one kind out, or make two tasks of them"
        )
    return next(iter(first), "picture")


def _unexpected(classes: Classes, splits: dict[str, list[Entry]], spec: TaskSpec) -> list[str]:
    """Where the counts are not the published ones; a part or a sample of the data was chosen by the person."""
    if spec.part is not None or spec.max_train_per_class is not None or spec.max_test_per_class is not None:
        return []
    found = {"classes": len(classes.raw)} | {split: len(entries) for split, entries in splits.items()}
    return [
        "not paper-comparable: "
        + (f"there are {found[key]} classes" if key == "classes" else f"{key} has {found[key]} pictures")
        + f" where the published protocol has {wanted}"
        for key, wanted in spec.expect.items()
        if key in found and found[key] != wanted
    ]


def _numbered(entries: Sequence[Entry], classes: Classes, spec: TaskSpec, skipped: int) -> PictureSet:
    number = {label: index for index, label in enumerate(classes.raw)}
    labels = [number[entry.label] for entry in entries]
    return PictureSet(entries, labels, max_pixels=spec.max_pixels, skipped=skipped)


def _probe_splits(raw: RawTask, spec: TaskSpec) -> dict[str, list[Entry]]:
    """A probe is only tested: its test split, or all there is."""
    if "test" in raw.splits:
        return {"test": raw.splits["test"]}
    raw.empty["test"] = raw.empty.pop("train", [])
    return {"train" if isinstance(spec.test, float) else "test": raw.splits["train"]}


def _cut_test(splits: dict[str, list[Entry]], spec: TaskSpec) -> tuple[dict[str, list[Entry]], list[str]]:
    fraction = spec.test if isinstance(spec.test, float) else DEFAULT_TEST_FRACTION
    entries, warnings = check_entries(splits["train"], spec, "train")
    medium = entries[0].medium if entries else "picture"
    if not isinstance(spec.test, float):
        warnings.append(
            f"no test {medium}s were named: {fraction:.0%} of every class (split_seed {spec.split_seed}) are held out; "
            "set `test` to choose"
        )
    held = set(
        holdout(
            [e.key for e in entries],
            [e.label for e in entries],
            fraction,
            spec.split_seed,
            groups=[e.pixels or e.digest for e in entries],
            at_least=1,
        )
    )
    cut = {
        **splits,
        "train": [e for i, e in enumerate(entries) if i not in held],
        "test": [e for i, e in enumerate(entries) if i in held],
    }
    return cut, warnings


def _refuse_empty(raw: RawTask, splits: dict[str, list[Entry]], main: str, medium: str) -> None:
    for label, place in raw.empty.get(main, []):
        raise DataError(f"{place}: the class folder {label!r} holds no {medium}; add {medium}s or delete the folder")
    for split, empties in raw.empty.items():
        if split in splits:
            raw.warnings += [f"{place}: the class folder {label!r} holds no {medium}" for label, place in empties]


def _refuse_lost(raw: RawTask, entries: Sequence[Entry], main: str) -> None:
    """A class must not vanish because its pictures were skipped or dropped: the numbering would change silently."""
    left = {entry.label for entry in entries}
    for entry in raw.splits.get(main, raw.splits.get("train", [])):
        if entry.label not in left:
            raise DataError(
                f"class {entry.label!r} has no usable {entry.medium} left in {main} (one was {entry.where}); "
                f"replace its damaged or duplicate {entry.medium}s"
            )
