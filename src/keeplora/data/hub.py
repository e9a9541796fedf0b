"""Pictures with classes out of `datasets`: by name, from a folder, a file or an address; whole, or as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.data.classes import Classes
from keeplora.data.hub_open import Opened, check_stream, counted, open_dataset, source_in_row
from keeplora.data.remote import RemotePath
from keeplora.data.sets import Entry, RowBytes, TaskData
from keeplora.data.spec import RawTask, TaskSpec, listing, suggest
from keeplora.data.streams import SampleStream, read_split
from keeplora.data.table import IMAGE_COLUMNS, LABEL_COLUMNS, clean_label, pick_column, pick_splits
from keeplora.errors import ConfigError, DataError


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask | TaskData:
    """Load the dataset and take its splits; pictures stay encoded in the dataset's own files."""
    check_stream(spec)
    opened = open_dataset(spec, base_dir)
    if spec.stream is not None:
        return _streamed(opened, spec, probe)
    raw = RawTask(splits={})
    for split, name in pick_splits(list(opened.splits), spec, opened.where, probe).items():
        where = f"{opened.where}, split {name!r}"
        raw.splits[split] = _entries(opened.splits[name], where, split, spec, opened.base, raw)
    raw.licence = _licence(opened)
    return raw


def _licence(opened: Opened) -> str | None:
    licence = getattr(next(iter(opened.splits.values())).info, "license", None)
    return licence if isinstance(licence, str) and licence else None


def _columns(spec: TaskSpec, features: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The columns of the picture and of the label."""
    import datasets

    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    image = pick_column(
        spec.extra.get("image_column"), (*images, *IMAGE_COLUMNS), list(features), where, "image_column"
    )
    label = pick_column(
        spec.extra.get("label_column"), (*labels, *LABEL_COLUMNS), list(features), where, "label_column"
    )
    return image, label


def _entries(
    dataset: Any, where: str, split: str, spec: TaskSpec, base: Path | RemotePath, raw: RawTask
) -> list[Entry]:
    import datasets

    features = dataset.features
    image, label = _columns(spec, features, where)
    if isinstance(features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    values = dataset[label][:]
    feature = features[label]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        if split == "train" or raw.class_order is None:
            raw.class_order = list(names)
        # -1 is how hidden test labels are published
        values = [names[v] if v is not None and 0 <= v < len(names) else None for v in values]
    # one column of one format: a row is then read without decoding the others
    pictures = dataset.select_columns([image]).with_format(None)
    return [
        Entry(f"{split}[{row}]", clean_label(value, f"{where}, row {row}"), f"{where}, row {row}", source)
        for row, value in enumerate(values)
        for source in (RowBytes(pictures, row, image, base, f"{where}, row {row}"),)
    ]


class _Pictures:
    """Rows of a stream as pictures with the number of their class; small and picklable."""

    def __init__(
        self, image: str, label: str, names: Sequence[str] | None, classes: Classes, base: Path | RemotePath, split: str
    ) -> None:
        self.image, self.label, self.names, self.base, self.split = image, label, names, base, split
        self.number = {raw: i for i, raw in enumerate(classes.raw)}

    def __call__(self, row: Mapping[str, Any], key: str, where: str) -> tuple[Entry, int]:
        value = row.get(self.label)
        if self.names is not None:
            value = self.names[value] if value is not None and 0 <= value < len(self.names) else None
        label = clean_label(value, where)
        if label not in self.number:
            raise DataError(f"{where}: label {label!r} is not in `classes`{suggest(label, list(self.number))}")
        source = source_in_row(row.get(self.image), self.base, where)
        return Entry(f"{self.split}/{key}", label, where, source), self.number[label]


def _streamed(opened: Opened, spec: TaskSpec, probe: bool) -> TaskData:
    """The training split as a stream, the others read once: classes come from the data set's description or the task's."""
    from keeplora.data.load import held_set

    chosen = pick_splits(list(opened.splits), spec, opened.where, probe)
    if "test" not in chosen:
        raise DataError(
            f"{opened.where}: has the splits {listing(opened.splits)}; a stream is not cut: name the split to test on with `test`"
        )
    splits = {split: name for split, name in chosen.items() if not probe or split == "test"}
    sets: dict[str, Any] = {}
    warnings: list[str] = []
    display: list[str] = []
    for split in sorted(splits, key=lambda split: split != "train"):
        where, dataset = f"{opened.where}, split {splits[split]!r}", opened.splits[splits[split]]
        features = dataset.features or {}
        if not features:
            features = next(iter(dataset.take(1)), {})
        image, label = _columns(spec, features, where)
        names = getattr(features[label], "names", None)
        classes = _classes(spec, names, where, label)
        display = classes.display
        dataset = dataset.decode(False) if dataset.features else dataset
        make = _Pictures(image, label, names, classes, opened.base, split)
        if split == "train":
            origin = [opened.origin, splits[split], image, label]
            stream = SampleStream(dataset, make, counted(spec, opened, splits[split]), name=where, origin=origin)
            sets[split] = stream
        else:
            held, found = held_set(read_split(dataset, make, spec, where), spec, split)
            sets[split], warnings = held, warnings + found
    from keeplora.data.sets import PictureSet

    return TaskData(
        name=spec.name, classes=display, templates=spec.templates, warnings=warnings, licence=spec.licence or _licence(opened),
        train=sets.get("train", PictureSet([], [], max_pixels=spec.max_pixels)), test=sets["test"],
        validation=sets.get("validation"),
    )  # fmt: skip


def _classes(spec: TaskSpec, names: Sequence[str] | None, where: str, column: str) -> Classes:
    """What the rows write for each class, and what prompts say: a stream is not scanned for them.

    Raises:
        ConfigError: nobody tells them.
    """
    given = spec.classes
    if names is not None:
        known = {name: name.replace("_", " ").strip() or name for name in names}
        if isinstance(given, list):
            by_name = {**{shown: raw for raw, shown in known.items()}, **{raw: raw for raw in known}}
            if wrong := [name for name in given if name not in by_name]:
                raise DataError(
                    f"{where}: `classes` names {wrong[0]!r}, which is no class of the data{suggest(wrong[0], names)}"
                )
            raw = [by_name[name] for name in given]
            return Classes(raw, [known.get(name, name) for name in given])
        if wrong := [name for name in given or () if name not in known]:
            raise DataError(f"`classes` renames {wrong[0]!r}, which is no class of the data{suggest(wrong[0], names)}")
        return Classes(list(names), [(given or {}).get(name, shown) for name, shown in known.items()])
    if given is None:
        raise ConfigError(
            f"{where}: the column {column!r} does not tell its classes, and a stream cannot be scanned for them; list them as "
            "`classes: [cat, dog]`, as the rows write them, or as `classes: {n02123045: tabby cat}`"
        )
    if isinstance(given, dict):
        return Classes(list(given), list(given.values()))
    return Classes(list(given), [name.replace("_", " ").strip() or name for name in given])
