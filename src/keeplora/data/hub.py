"""A `datasets` name, a folder written by ``save_to_disk``, a parquet file, or a folder that ``load_dataset`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.data.sets import Entry, RowBytes
from keeplora.data.spec import RawTask, TaskSpec, locate
from keeplora.data.table import IMAGE_COLUMNS, LABEL_COLUMNS, clean_label, pick_column, pick_splits
from keeplora.errors import ConfigError, DataError
from keeplora.files import expand


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Load the dataset and take its splits; pictures stay encoded in the dataset's own files."""
    if spec.path is None:
        raise ConfigError("source 'datasets' needs `path`: a dataset's name, folder or parquet file")
    loaded, where, base = _load(spec, spec.path, base_dir)
    raw = RawTask(splits={})
    for split, name in pick_splits(list(loaded), spec, where, probe).items():
        raw.splits[split] = _entries(loaded[name], f"{where}, split {name!r}", split, spec, base, raw)
    licence = getattr(next(iter(loaded.values())).info, "license", None)
    raw.licence = licence if isinstance(licence, str) and licence else None
    return raw


def _load(spec: TaskSpec, path: str, base_dir: Path) -> tuple[Mapping[str, Any], str, Path]:
    """The splits by name, the name for errors, and where relative picture paths start."""
    import datasets

    local = (base_dir / expand(path)).absolute()
    if not local.exists() and (path.startswith((".", "/", "~")) or path.endswith(".parquet") or path.count("/") > 1):
        locate(path, base_dir)  # raises: this can be no dataset's name
    where = str(local) if local.exists() else f"dataset {path!r}"
    try:
        if local.is_file():
            if local.suffix != ".parquet":
                raise DataError(f"{local}: not a parquet file; use `source: table` for CSV, TSV and JSONL")
            loaded = datasets.load_dataset("parquet", data_files={"train": str(local)})
        elif local.is_dir() and any((local / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(local))
        else:
            loaded = datasets.load_dataset(
                str(local) if local.is_dir() else path, spec.extra.get("config"), revision=spec.extra.get("revision")
            )
    except DataError:
        raise
    except Exception as error:  # the library and what lies below it raise nearly anything
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{where}: `datasets` cannot load it ({type(error).__name__}: {text}); check the name, `config` and the "
            "network, or give a local folder"
        ) from error
    splits = {str(name): part for name, part in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
    return splits, where, local if local.is_dir() else local.parent if local.exists() else base_dir


def _entries(dataset: Any, where: str, split: str, spec: TaskSpec, base: Path, raw: RawTask) -> list[Entry]:
    import datasets

    features = dataset.features
    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    image = pick_column(
        spec.extra.get("image_column"), (*images, *IMAGE_COLUMNS), list(features), where, "image_column"
    )
    label = pick_column(
        spec.extra.get("label_column"), (*labels, *LABEL_COLUMNS), list(features), where, "label_column"
    )
    if image in images:
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
