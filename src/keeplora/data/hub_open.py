"""Opening a data set with `datasets`: by name, from a folder or file, or from an address; whole, or as a stream."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.data.pictures import PictureError
from keeplora.data.remote import RemotePath, bytes_at, is_url, named_in, place, told
from keeplora.data.sets import ByteSource, HeldBytes
from keeplora.data.spec import SPLIT_ALIASES, SourceSpec, StreamSpec, locate
from keeplora.errors import ConfigError, DataError

FORMATS = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow",
    ".tar": "webdataset",
}  # fmt: skip
"""What `datasets` calls the files of each ending."""
TABLES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson"})
SAVED_SHARDS = 64
"""Most shards that a folder written by ``save_to_disk`` is streamed as."""


@dataclass(frozen=True)
class Opened:
    """Splits by name, the name for errors, where paths in rows start, and what the data is, as JSON values."""

    splits: Mapping[str, Any]
    where: str
    base: Path | RemotePath
    origin: Any
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows of the splits where their files tell."""


class _Saved(NamedTuple):
    """A split of a folder that ``save_to_disk`` wrote, as a stream over its memory-mapped files, and its rows."""

    stream: Any
    rows: int


def open_dataset(spec: SourceSpec, base_dir: Path) -> Opened:
    """Open what ``path`` names.

    Raises:
        ConfigError: ``path`` is missing, or needs a package that is not installed.
        DataError: there is nothing, or `datasets` cannot load it.
    """
    if spec.path is None:
        raise ConfigError(f"source {spec.source!r} needs `path`: a dataset's name, a folder, a file or an address")
    path, streaming = spec.path, spec.stream is not None
    local = place(path, base_dir)
    named = not is_url(path) and not local.exists()
    if named and (path.startswith((".", "/", "~")) or Path(path).suffix in FORMATS or path.count("/") > 1):
        locate(path, base_dir)  # raises: this can be no dataset's name
    where = f"dataset {path!r}" if named else str(local)
    tables = streaming or spec.source == "vqa-datasets"
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        if named:
            base: Path | RemotePath = base_dir
            origin: Any = [path, spec.extra.get("config"), spec.extra.get("revision")]
            loaded = _load(path, spec.extra.get("config"), revision=spec.extra.get("revision"), **options)
        elif isinstance(local, RemotePath):
            base = local if local.is_dir() else local.parent
            files = _remote_files(local)
            origin = [[name, info.get("size")] for name, info in files.items()]
            loaded = _load(*_by_split(local, list(files), tables), **options)
        else:
            base = local if local.is_dir() else local.parent
            origin = _local_origin(local) if streaming else None
            loaded = _load_local(local, spec, tables, options)
    except (DataError, ConfigError):
        raise
    except Exception as error:  # the library and what lies below it raise nearly anything
        raise DataError(
            f"{where}: `datasets` cannot load it ({told(error)}); check the name, `config` and the network, or give a "
            "local folder"
        ) from error
    splits = {str(name): part for name, part in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
    counts = {name: part.rows for name, part in splits.items() if isinstance(part, _Saved)}
    splits = {name: part.stream if isinstance(part, _Saved) else part for name, part in splits.items()}
    return Opened(splits, where, base, origin, counts)


def _load(*args: Any, **options: Any) -> Any:
    import datasets

    return datasets.load_dataset(*args, **options)


def _load_local(local: Path, spec: SourceSpec, tables: bool, options: dict[str, Any]) -> Any:
    import datasets

    if local.is_file():
        return _load(_format(local, tables), data_files={"train": str(local)}, **options)
    if any((local / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(str(local))
        if spec.stream is None:
            return loaded
        parts = loaded if isinstance(loaded, dict) else {"train": loaded}
        return {k: _Saved(p.to_iterable_dataset(max(1, min(SAVED_SHARDS, len(p)))), len(p)) for k, p in parts.items()}
    beside = [p.name for p in sorted(local.iterdir()) if p.suffix.lower() in FORMATS and not p.name.startswith(".")]
    if spec.source == "vqa-datasets" and len({FORMATS[Path(name).suffix.lower()] for name in beside}) == 1:
        return _load(
            *_by_split(local, beside, tables), **options
        )  # `datasets` would see the pictures beside them alone
    return _load(str(local), spec.extra.get("config"), revision=spec.extra.get("revision"), **options)


def _format(file: Path | RemotePath, tables: bool) -> str:
    """The name of `datasets`' reader for a file; ``tables``: of CSV and JSON too."""
    ending = file.suffix.lower()
    if ending in FORMATS and (tables or ending not in TABLES):
        return FORMATS[ending]
    hint = "use `source: table` for CSV, TSV and JSONL" if ending in TABLES else f"it reads {', '.join(FORMATS)}"
    raise DataError(f"{file}: not a parquet file; {hint}")


def _local_origin(local: Path) -> Any:
    """Names and sizes of the files: enough to see that another set lies there now."""
    if local.is_file():
        return [[local.name, local.stat().st_size]]
    files = sorted(
        Path(folder, name) for folder, _, names in os.walk(local) for name in names if not name.startswith(".")
    )
    return [[file.relative_to(local).as_posix(), file.stat().st_size] for file in files]


def _remote_files(root: RemotePath) -> dict[str, dict[str, Any]]:
    """The data files of an address: itself, or those below it that one reader reads."""
    if root.suffix.lower() in FORMATS and root.is_file():
        return {"": {"size": root.fs.info(root.path).get("size")}}
    found = {name: info for name, info in root.find().items() if Path(name).suffix.lower() in FORMATS}
    kinds = sorted({FORMATS[Path(name).suffix.lower()] for name in found})
    if len(kinds) != 1:
        have = f"files of the kinds {', '.join(kinds)}; name a folder with one kind" if kinds else "no data files"
        raise DataError(f"{root}: holds {have} ({', '.join(FORMATS)} are read)")
    return found


def _by_split(root: Path | RemotePath, names: list[str], tables: bool) -> tuple[Any, ...]:
    """The arguments of ``load_dataset``: the reader's name, and each split's files by the words in their names."""
    alias = {word: split for split, words in SPLIT_ALIASES.items() for word in words}
    files: dict[str, list[str]] = {}
    for name in names:
        words = re.split(r"[/_.\-]", name.lower())
        split = next((alias[word] for word in words if word in alias), "train")
        files.setdefault(split, []).append(str(root / name) if name else str(root))
    first = root / names[0] if names[0] else root
    return _format(first, tables), None, None, files  # name, data_dir and data_files of load_dataset


def counted(spec: SourceSpec, opened: Opened, split: str) -> SourceSpec:
    """The description with the samples of one pass: as given, else as the data set's own description tells."""
    assert spec.stream is not None
    dataset = opened.splits[split]
    info = (getattr(dataset.info, "splits", None) or {}).get(split)
    count = opened.counts.get(split) or getattr(info, "num_examples", None)
    if spec.stream.samples is not None or not count:
        return spec
    stream: StreamSpec = replace(spec.stream, samples=int(count))
    return replace(spec, stream=stream)


def check_stream(spec: SourceSpec) -> None:
    """Refuse what a stream cannot do.

    Raises:
        ConfigError: a key, and what to do in its place.
    """
    if spec.stream is None:
        return
    for key, value in (("test", spec.test), ("validation", spec.validation)):
        if isinstance(value, float):
            raise ConfigError(
                f"`{key}: {value}` would cut a stream, which is read once and in order; name a split of its own"
            )
    for key in ("part", "max_train_per_class", "max_train"):
        if getattr(spec, key, None) is not None:
            raise ConfigError(
                f"`{key}` needs to know every sample, and a stream is not scanned; set `streaming: {{samples: N}}`"
            )
    if spec.duplicates != "warn":
        raise ConfigError(
            f"`duplicates: {spec.duplicates}` needs to know every sample, and a stream is not scanned; leave it out"
        )


def source_in_row(value: Any, base: Path | RemotePath, where: str) -> ByteSource:
    """The picture or video that a cell holds: bytes, ``{"bytes", "path"}``, or a path below ``base``.

    Raises:
        PictureError: it is missing. DataError: it leads elsewhere.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return HeldBytes(bytes(value))
    if not isinstance(value, str) or not value.strip():
        raise PictureError(f"{where}: the picture is missing; remove the row or fill it in")
    name = value.strip()
    if is_url(name):
        # Compared as text: what data names is not opened to find out where it leads.
        inside = base.inside(name) if isinstance(base, RemotePath) else None
        if inside is None:
            raise DataError(f"{where}: {name!r} is an address outside of {base}; data names files below it alone")
        name = inside
    return bytes_at(named_in(base, name, where))
