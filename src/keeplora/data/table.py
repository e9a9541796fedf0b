"""CSV, TSV and JSONL tables: one row a picture or a video, its path (relative to the table) and its label."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keeplora.data.remote import RemotePath, bytes_at, named_in, read_whole
from keeplora.data.sets import Entry
from keeplora.data.spec import SPLIT_ALIASES, RawTask, SourceSpec, TaskSpec, anywhere, listing, or_a_share, suggest
from keeplora.data.video import is_video
from keeplora.errors import ConfigError, DataError
from keeplora.json_text import parse_json

IMAGE_COLUMNS = ("image", "path", "image_path", "file", "file_name", "filename")
VIDEO_COLUMNS = ("video", "video_path", "clip")
LABEL_COLUMNS = ("label", "class", "category", "class_name")
MAX_TABLE_BYTES = 4 << 30
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")

Row = tuple[int, dict[str, Any]]
Table = Path | RemotePath


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """One table per split, or one table at ``path`` whose split column (where it has one) tells them apart."""
    raw = RawTask(splits={})
    for split, (table, rows, columns) in split_tables(spec, base_dir, probe).items():
        raw.splits[split] = _entries(table, rows, columns, split, spec, raw)
    return raw


def split_tables(spec: SourceSpec, base_dir: Path, probe: bool) -> dict[str, tuple[Table, list[Row], list[str]]]:
    """Table, rows and columns of each split."""
    if spec.path is None:
        named = {split: anywhere(name, base_dir, kind="table", split=split) for split, name in spec.split_names.items()}
        if not probe and "train" not in named:
            raise ConfigError("no training table named: give `train`, or `path` for one table with all pictures")
        return {split: (table, *_rows(table, spec)) for split, table in named.items()}
    table = anywhere(spec.path, base_dir, kind="table")
    rows, columns = _rows(table, spec)
    column = spec.extra.get("split_column") or ("split" if "split" in columns else None)
    if column is None:
        if spec.split_names:
            split, name = next(iter(spec.split_names.items()))
            raise ConfigError(
                f"{table}: has no split column to find `{split}: {name}` in; name it with `split_column`, "
                f"or give one table each as `train` and `test` without `path`{or_a_share(split, 'name of that column')}"
            )
        return {"train": (table, rows, columns)}
    _known(column, columns, table, "split_column")
    by_split: dict[str, list[Row]] = {}
    for line, row in rows:
        by_split.setdefault(_text(row.get(column), table, line, column), []).append((line, row))
    chosen = pick_splits(by_split, spec, str(table), probe)
    return {split: (table, by_split[name], columns) for split, name in chosen.items()}


def pick_splits(available: Collection[str], spec: SourceSpec, where: str, probe: bool) -> dict[str, str]:
    """Which of the source's splits are train, test and validation: those named, else those with the usual names.

    Raises:
        DataError: a named split does not exist, or it is unclear which pictures to test on.
    """
    chosen: dict[str, str] = {}
    for split, aliases in SPLIT_ALIASES.items():
        named = spec.split_names.get(split)
        if named is not None:
            if named not in available:
                share = "" if spec.stream else or_a_share(split, "split's name")
                raise DataError(f"{where}: no split {named!r} for `{split}`{suggest(named, available)}{share}")
            chosen[split] = named
        elif not isinstance({"test": spec.test, "validation": spec.validation}.get(split), float):
            free = [name for name in available if name.lower() in aliases and name not in spec.split_names.values()]
            if free:
                chosen[split] = free[0]
    if "train" not in chosen and len(available) == 1 and "test" not in spec.split_names:
        chosen = {"train": next(iter(available))}
    if "test" not in chosen and spec.test is None and len(available) > 1:
        raise DataError(
            f"{where}: has the splits {listing(available)} and none is called test; name one with `test`, "
            "or set `test: 0.2` to hold pictures out of training"
        )
    if "train" not in chosen and not (probe and "test" in chosen):
        raise DataError(f"{where}: has the splits {listing(available)} and none is called train; name it with `train`")
    return chosen


def pick_column(given: str | None, usual: Sequence[str], columns: Collection[str], where: object, key: str) -> str:
    """The column that a person named, else the first of the usual names that exists."""
    if given is not None:
        _known(given, columns, where, key)
        return given
    for name in usual:
        if name in columns:
            return name
    raise DataError(f"{where}: which column is `{key}`? It has {listing(columns, 12)}; name one")


def _known(column: str, columns: Collection[str], where: object, key: str) -> None:
    if column not in columns:
        raise DataError(f"{where}: no column {column!r} for `{key}`{suggest(column, columns)}")


def clean_label(value: object, where: str) -> str:
    """A label as text; 3 and 3.0 are "3". A missing or composite one is a DataError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None or value != value else value  # NaN is how a missing number arrives
    if not isinstance(text, str | int | float):
        raise DataError(f"{where}: the label is {value!r}, not one name or number; give one class per picture")
    text = str(text).strip()
    if not text:
        raise DataError(f"{where}: the label is missing; fill it in or delete the row")
    return text


def _text(value: object, table: Table, line: int, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{table}, line {line}: column {column!r} is {value!r}; fill it in with text or delete the row")
    return value.strip()


def _entries(
    table: Table, rows: Iterable[Row], columns: list[str], split: str, spec: TaskSpec, raw: RawTask
) -> list[Entry]:
    named = {key: spec.extra[key] for key in ("image_column", "video_column") if key in spec.extra}
    if len(named) > 1:
        raise ConfigError(
            "`image_column` and `video_column` are both given: a task is of pictures or of videos; keep one"
        )
    key, given = next(iter(named.items()), ("image_column", None))
    image = pick_column(given, (*IMAGE_COLUMNS, *VIDEO_COLUMNS), columns, table, key)
    label = pick_column(spec.extra.get("label_column"), LABEL_COLUMNS, columns, table, "label_column")
    entries: dict[str, Entry] = {}
    twice: list[str] = []
    for line, row in rows:
        where = f"{table}, line {line}"
        name = _text(row.get(image), table, line, image)
        if "://" in name:
            raise DataError(f"{where}: {name!r} is an address, not a file; download the files first")
        path = named_in(table.parent, name, where)
        video = key == "video_column" or image in VIDEO_COLUMNS or is_video(path.name)
        entry = Entry(
            f"{split}/{name}", clean_label(row.get(label), where), f"{path} ({where})", bytes_at(path),
            medium="video" if video else "picture",
        )  # fmt: skip
        first = entries.setdefault(entry.key, entry)
        if first.label != entry.label:
            raise DataError(
                f"{where}: {name!r} is labelled {entry.label!r} here and {first.label!r} in another row of {split}; "
                "delete one"
            )
        if first is not entry:
            twice.append(where)
    if not entries:
        raise DataError(f"{table}: no rows for {split}; fill the table or name another")
    if twice:
        raw.warnings.append(f"{len(twice)} repeated row(s) of {split} ignored: {listing(twice)}")
    return list(entries.values())


def _rows(table: Table, spec: SourceSpec) -> tuple[list[Row], list[str]]:
    """All rows with their line numbers, and the columns."""
    ending = table.suffix.lower()
    if not table.is_file() or ending not in (*_DELIMITERS, *_JSON_LINES):
        raise DataError(
            f"{table}: not a .csv, .tsv or .jsonl table; export it as one (or use `source: folder`, "
            "or `source: datasets` for parquet)"
        )
    try:
        text = read_whole(table, MAX_TABLE_BYTES).decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: byte {error.start} is not UTF-8; save the table as UTF-8") from error
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror or error}); check its permissions") from error
    if ending in _JSON_LINES:
        rows = list(json_rows(text, table))
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
    else:
        rows, columns = _csv_rows(text, table, spec.extra.get("delimiter") or _DELIMITERS[ending])
    if not rows:
        raise DataError(f"{table}: holds no rows; fill it or name another table")
    return rows, columns


def _csv_rows(text: str, table: Table, delimiter: str) -> tuple[list[Row], list[str]]:
    if len(delimiter) != 1:
        raise ConfigError(f"`delimiter` is {delimiter!r}: give one character")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(columns):
                raise DataError(
                    f"{table}, line {reader.line_num}: {len(values)} fields under {len(columns)} columns; "
                    "put quotes around a field that holds the delimiter"
                )
            rows.append((reader.line_num, dict(zip(columns, values))))
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}; mend the quotes of that line") from error
    if len(columns) == 1 and (others := [d for d in ",;\t|" if d in columns[0]]):
        raise DataError(f"{table}: its columns seem to be separated by {others[0]!r}; set `delimiter` to it")
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(f"{table}: the column {name!r} is there twice; rename one")
    return rows, columns


def json_rows(text: str, table: Table) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{table}, line {number}: not JSON ({error}); write one object on each line") from error
        if not isinstance(row, dict):
            raise DataError(f"{table}, line {number}: not a JSON object; write one object on each line")
        yield number, row
