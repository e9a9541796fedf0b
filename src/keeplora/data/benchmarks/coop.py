"""The splits of CoOp (``split_zhou_*.json``) with a few shots per class, as the X-TAIL benchmark uses them.

Folders as CoOp's DATASETS.md lays them out; keys ``path``, ``split_file`` and ``images``:

| dataset | path | split_file | images |
|--|--|--|--|
| FGVC Aircraft | fgvc_aircraft | none: variants.txt, images_variant_{train,test}.txt | images |
| Caltech101 (100 classes) | caltech-101 | split_zhou_Caltech101.json | 101_ObjectCategories |
| DTD | dtd | split_zhou_DescribableTextures.json | images |
| EuroSAT | eurosat | split_zhou_EuroSAT.json | 2750 |
| Flowers102 | oxford_flowers | split_zhou_OxfordFlowers.json | jpg |
| Food101 | food-101 | split_zhou_Food101.json | images |
| OxfordPets | oxford_pets | split_zhou_OxfordPets.json | images |
| StanfordCars | stanford_cars | split_zhou_StanfordCars.json | . |
| SUN397 | sun397 | split_zhou_SUN397.json | SUN397 |

X-TAIL's tenth domain is MNIST, which CoOp lacks: source ``mnist`` with ``shots``. A split file holds lists ``train``,
``val`` and ``test`` of ``[picture, label, class name]``; ``val`` is not used, in X-TAIL neither. Class names are the
file's, with spaces for underscores, in label order.

``shots`` pictures of each class are drawn as CoOp (Dassl) draws them when started with ``split_seed``: Python's
``random.sample``, class by class in the order of their first appearance; a class with fewer is drawn from with
repetition. RAIL's released X-TAIL code draws all domains, and draws each again for every evaluation, from one
generator that is never seeded anew, so that its shots depend on the run: a warning says so.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from keeplora.data.benchmarks.common import benchmark_root, need, read_lines
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

#: (picture below the folder of pictures, label, class name)
Item = tuple[str, int, str]
_SPLITS = ("train", "test")
_HOW_JSON = "fetch it again from the links in CoOp's DATASETS.md"
_HOW_AIRCRAFT = "copy data/ of fgvc-aircraft-2013b again, or name a `split_file`"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the split and draw the shots; pictures are not touched."""
    root = benchmark_root(spec, base_dir)
    folder = spec.extra.get("images", "images")
    images = need(root / folder, "the folder of pictures", "set `images` to the one that the dataset has", folder=True)
    file = spec.extra.get("split_file")
    items = _aircraft(root) if file is None else _split_file(root / file)
    names = {label: name for split in _SPLITS for _, label, name in items[split]}
    raw = RawTask(splits={}, class_order=[names[label] for label in sorted(names)], pretty=False)
    shots = spec.numbers.get("shots")
    if shots is not None:
        train = items["train"]
        items["train"] = [train[i] for i in few_shots([label for _, label, _ in train], shots, spec.split_seed)]
        raw.warnings.append(
            f"not paper-comparable: the {shots} shots per class are drawn with seed {spec.split_seed} for each dataset "
            "by itself, as CoOp does; which pictures the published X-TAIL results were trained on is not known"
        )
    for split in _SPLITS:
        times: Counter[str] = Counter()
        raw.splits[split] = entries = []
        for picture, _, name in items[split]:
            times[picture] += 1
            again = f"#{times[picture]}" if split == "train" and shots is not None and times[picture] > 1 else ""
            path = images / picture
            entries.append(Entry(f"{split}/{picture}{again}", name, str(path), FileBytes(path)))
    return raw


def few_shots(labels: Sequence[Hashable], shots: int, seed: int) -> list[int]:
    """Indices of ``shots`` items of each class, class by class; a class with fewer gives some of them repeatedly.

    >>> few_shots(["b", "b", "a", "b"], 2, seed=42)
    [3, 0, 2, 2]
    """
    generator = random.Random(seed)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    chosen: list[int] = []
    for found in members.values():
        chosen += generator.sample(found, shots) if len(found) >= shots else generator.choices(found, k=shots)
    return chosen


def _split_file(path: Path) -> dict[str, list[Item]]:
    need(path, "the split file", _HOW_JSON)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path}: the split file cannot be read as JSON ({error}); {_HOW_JSON}") from error
    items: dict[str, list[Item]] = {}
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for split in _SPLITS:
        found = content.get(split) if isinstance(content, dict) else None
        if not isinstance(found, list) or not found:
            raise DataError(f"{path}: the split file has no list of {split} pictures; {_HOW_JSON}")
        items[split] = [_item(value, f"{path}, entry {at} of {split}") for at, value in enumerate(found)]
        for picture, label, name in items[split]:
            if names.setdefault(label, name) != name or labels.setdefault(name, label) != label:
                raise DataError(
                    f"{path}: {picture!r} has label {label} and class {name!r}, where another picture pairs one of "
                    f"these with something else; {_HOW_JSON}"
                )
    return items


def _item(value: Any, where: str) -> Item:
    if isinstance(value, list) and len(value) == 3:
        picture, label, name = value
        whole = isinstance(label, int) and not isinstance(label, bool)
        if whole and isinstance(picture, str) and picture and isinstance(name, str) and name.strip():
            return picture, label, name.replace("_", " ").strip()
    raise DataError(f"{where}: {value!r} is not [picture, label, class name]; {_HOW_JSON}")


def _aircraft(root: Path) -> dict[str, list[Item]]:
    """FGVC Aircraft: CoOp has no split of its own but reads the dataset's, variants as classes, train without val."""
    variants = read_lines(root / "variants.txt", "the list of variants", _HOW_AIRCRAFT)
    number = {name: index for index, name in enumerate(variants)}
    items: dict[str, list[Item]] = {}
    for split in _SPLITS:
        table = root / f"images_variant_{split}.txt"
        items[split] = []
        for line in read_lines(table, f"the list of {split} pictures", _HOW_AIRCRAFT):
            picture, _, name = line.partition(" ")
            if name not in number:
                raise DataError(f"{table}: {line!r} is not `picture variant` with one of variants.txt; {_HOW_AIRCRAFT}")
            items[split].append((f"{picture}.jpg", number[name], name))
    return items
