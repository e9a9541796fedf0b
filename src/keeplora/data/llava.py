"""Questions and answers as LLaVA keeps them: a JSON list (or JSON lines) for each split, and a folder of pictures or videos."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from keeplora.data.conversation_entries import Entries, pictures_of, videos_of
from keeplora.data.conversation_spec import ConversationSpec, RawConversations
from keeplora.data.conversations import Conversation
from keeplora.data.remote import RemoteBytes, place, read_whole
from keeplora.data.sets import FileBytes
from keeplora.data.spec import SPLIT_ALIASES, anywhere, listing
from keeplora.data.table import MAX_TABLE_BYTES, Table, json_rows
from keeplora.errors import ConfigError, DataError
from keeplora.json_text import parse_json

ENDINGS = (".json", ".jsonl")


def read(spec: ConversationSpec, base_dir: Path, probe: bool) -> RawConversations:
    """Read the files that ``train``, ``test`` and ``validation`` name, or those with the usual names in ``path``.

    ``images`` is the folder that pictures' paths start at (default: that of the JSON file), ``videos`` that of videos'
    (default: ``images``), ``references`` a file of COCO captions by which the test's answers are judged.
    """
    raw = RawConversations()
    files = split_files(spec, base_dir)
    if not probe and "train" not in files:
        raise ConfigError("no training file named: give `train`, or `path` for a folder with train.json")
    base = _base(spec, base_dir)
    images = anywhere(spec.extra["images"], base, kind="folder") if "images" in spec.extra else None
    videos = anywhere(spec.extra["videos"], base, kind="folder") if "videos" in spec.extra else images
    for split, file in files.items():
        if not probe or split == "test" or "test" not in files:
            folders = (images or file.parent, videos or file.parent)
            raw.splits[split] = _read(file, folders, split, spec, raw)
    if "references" in spec.extra:
        if "test" not in raw.splits:
            raise ConfigError("`references` judges the answers of `test`: name a test file")
        told = _captions(anywhere(spec.extra["references"], base, kind="file"))
        raw.splits["test"] = [_with_references(c, told, spec.extra["references"]) for c in raw.splits["test"]]
    return raw


def split_files(spec: ConversationSpec, base_dir: Path) -> dict[str, Table]:
    """The JSON file of each split.

    Raises:
        DataError: one is named and not there.
    """
    base = _base(spec, base_dir)
    files = {split: anywhere(name, base, kind="file", split=split) for split, name in spec.split_names.items()}
    if spec.path is None:
        return files
    path = anywhere(spec.path, base_dir)
    if path.is_file():
        return {"train": path} | files
    for split, names in SPLIT_ALIASES.items():
        found = [path / f"{name}{ending}" for name in names for ending in ENDINGS]
        found = [file for file in found if file.is_file()]
        taken = isinstance({"test": spec.test, "validation": spec.validation}.get(split), float)
        if found and not taken:
            files.setdefault(split, found[0])
    if not files:
        raise DataError(f"{path}: holds no train.json or test.json; name the files with `train` and `test`")
    return files


def _base(spec: ConversationSpec, base_dir: Path) -> Table:
    """Where the files' names start: at ``path``, where that is a folder."""
    path = place(spec.path, base_dir) if spec.path is not None else base_dir
    return path if path.is_dir() else base_dir


def _read(
    file: Table, folders: tuple[Table, Table], split: str, spec: ConversationSpec, raw: RawConversations
) -> list[Conversation]:
    entries = Entries(split, spec.prompt)
    found = []
    for number, entry in enumerate(load_entries(file), start=1):
        where = f"{file}, entry {number}"
        pictures, videos = pictures_of(entry, folders[0], where), videos_of(entry, folders[1], where)
        found.append(entries.conversation(entry, pictures, where, number, videos))
    if not found:
        raise DataError(f"{file}: holds no entries for {split}; fill it or name another")
    if entries.repeated and split == "test":
        raw.warnings.append(f"{entries.repeated} id(s) of {split} are there more than once; each entry counts")
    return found


def _text(file: Table) -> str:
    try:
        return read_whole(file, MAX_TABLE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); name a .json or .jsonl file") from error


def _json(file: Table) -> Any:
    try:
        return parse_json(_text(file))
    except ValueError as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        told = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{file}{line}: not JSON ({told}); mend it or copy it again") from error


def load_entries(file: Table) -> list[Any]:
    """The entries of a JSON list or of JSON lines.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        return [entry for _, entry in json_rows(_text(file), file)]
    found = _json(file)
    if not isinstance(found, list):
        keys = f" with {listing(map(str, found))}" if isinstance(found, dict) else ""
        raise DataError(
            f"{file}: holds {type(found).__name__}{keys}, not a list of entries; name the file with the questions"
        )
    return found


def _captions(file: Table) -> dict[str, tuple[str, ...]]:
    """Captions by the picture's file name, out of COCO's ``{"images": [...], "annotations": [...]}``."""
    found = _json(file)
    try:
        names = {image["id"]: Path(image["file_name"]).name for image in found["images"]}
        captions: dict[str, list[str]] = defaultdict(list)
        for annotation in found["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not COCO captions, which hold `images` with id and file_name, and `annotations` with image_id and "
            f"caption ({type(error).__name__}: {error}); copy the file again"
        ) from error
    return {name: tuple(told) for name, told in captions.items()}


def _with_references(conversation: Conversation, captions: dict[str, tuple[str, ...]], file: str) -> Conversation:
    names = [source.path.name for source in conversation.pictures if isinstance(source, FileBytes | RemoteBytes)]
    references = [caption for name in names for caption in captions.get(name, ())]
    if not references:
        raise DataError(
            f"{conversation.where}: no caption of {listing(names) or 'a picture'} in {file}; is it the file of this test set?"
        )
    return replace(conversation, references=tuple(references))
