"""Class folders of pictures or of videos: ``train/<class>/...`` and ``test/<class>/...``, or a flat ``<class>/...`` that is
split.

Links are followed, also out of the folder: pointing class folders at another disk is common, and the fingerprint is
of the bytes. A link that leads nowhere is an unusable file; a link to a folder above itself is refused.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path

from keeplora.data.pictures import EXTENSIONS
from keeplora.data.remote import RemotePath, bytes_at, place
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import SPLIT_ALIASES, RawTask, TaskSpec, listing, locate
from keeplora.data.video import VIDEO_SUFFIXES
from keeplora.errors import ConfigError, DataError

#: Left behind by systems and tools; never anyone's data.
_LITTER = frozenset({"__macosx", "@eadir", "__pycache__", "thumbs.db", "desktop.ini", "lost+found"})


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Find the splits below ``path``, or those that ``train``, ``test`` and ``validation`` name."""
    if remote := _remote(spec, base_dir):
        return _read_remote(remote, spec, probe)
    raw = RawTask(splits={})
    base = _folder(spec.path, base_dir) if spec.path is not None else base_dir
    roots = {split: _folder(name, base, split) for split, name in spec.split_names.items()}
    for split, root in roots.items():
        if found := _layout(root):
            raise DataError(
                f"{root}: `{split}` names a folder that holds {listing(p.name for p in found.values())}, not classes; "
                "write `path:` instead of `train:` and `test:`, or name the inner folder"
            )
    if spec.path is not None and "train" not in roots and not (probe and "test" in roots):
        layout = _layout(base)
        if layout and "test" not in layout and "validation" in layout and spec.test is None:
            raise DataError(
                f"{base}: holds {listing(p.name for p in layout.values())} and no test folder; set "
                f"`test: {layout['validation'].name}` to test on it, or `test: 0.2` to hold pictures out of training"
            )
        if layout and isinstance(spec.test, float) and "test" in layout:
            raise ConfigError(f"`test` is {spec.test}, but {layout['test']} exists; remove `test` or the folder")
        if "validation" in layout and (spec.validation is not None or layout["validation"] in roots.values()):
            del layout["validation"]
        roots = {**(layout or {"train": base}), **roots}
        raw.hint = _deeper(base)
    for split, root in roots.items():
        raw.splits[split] = _read_split(root, split, raw, base)
    if not probe and "train" not in raw.splits:
        raise ConfigError("no training pictures named: give `train`, or `path` for a folder that holds it")
    return raw


def _remote(spec: TaskSpec, base_dir: Path) -> dict[str, RemotePath]:
    """The remote folders that the description names: "" for ``path``, else a split's; empty where all is local."""
    base = place(spec.path, base_dir) if spec.path is not None else base_dir
    found = {split: place(name, base) for split, name in spec.split_names.items()}  # type: ignore[arg-type]
    if spec.path is not None and "train" not in found:
        found[""] = base
    remote = {split: path for split, path in found.items() if isinstance(path, RemotePath)}
    if remote and len(remote) < len(found):
        raise ConfigError("some splits are local folders and some are addresses; name all as one or the other")
    return remote


def _read_remote(roots: dict[str, RemotePath], spec: TaskSpec, probe: bool) -> RawTask:
    """The same layouts from one listing of each remote folder; there are no empty folders, and no links."""
    raw = RawTask(splits={})
    ignored = 0
    for root_split, root in roots.items():
        names = [name for name in root.find() if not any(_hidden(part) for part in name.split("/"))]
        if not names:
            raise DataError(f"{root}: no files there; check the address")
        top = {name.split("/")[0].lower() for name in names}
        split_of = {alias: split for split, aliases in SPLIT_ALIASES.items() for alias in aliases}
        by_split = root_split == "" and top <= set(split_of) and all(name.count("/") >= 2 for name in names)
        for name in names:
            parts = name.split("/")
            split = split_of[parts[0].lower()] if by_split else root_split or "train"
            label, inside = (
                ("", "") if len(parts) < 2 + by_split else (parts[by_split], "/".join(parts[1 + by_split :]))
            )
            medium = medium_of(Path(name))
            if not label or medium is None:
                ignored += 1
                continue
            if split in spec.split_names and root_split != split:
                continue
            label, inside = (unicodedata.normalize("NFC", text) for text in (label, inside))
            path = root.below(name, str(root))
            entry = Entry(f"{split}/{label}/{inside}", label, str(path), bytes_at(path), medium=medium)
            raw.splits.setdefault(split, []).append(entry)
    if ignored:
        raw.warnings.append(f"{ignored} file(s) that are not pictures or videos in class folders ignored")
    if not probe and "train" not in raw.splits:
        raise ConfigError("no training pictures named: give `train`, or `path` for a folder that holds it")
    return raw


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _folder(value: str, base: Path, split: str = "") -> Path:
    path = locate(value, base, kind="folder", split=split)
    if not path.is_dir():
        raise DataError(f"{path}: a file, not a folder of class folders; unpack it, or use `source: table` for a table")
    return path


def _visible(folder: Path) -> list[Path]:
    try:
        found = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _LITTER]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror or error}); check its permissions") from error
    return sorted(found, key=lambda p: (_name(p), p.name))


def _name(path: Path) -> str:
    # macOS hands out decomposed letters, Linux whatever was stored: one spelling, so that order and fingerprint agree
    return unicodedata.normalize("NFC", path.name)


def medium_of(path: Path) -> str | None:
    """ "picture" or "video", by the file's ending; None where it is neither."""
    ending = path.suffix.lower()
    return "picture" if ending in EXTENSIONS else "video" if ending in VIDEO_SUFFIXES else None


def _layout(root: Path) -> dict[str, Path]:
    """The folders train, test, validation where ``root`` holds such splits; {} where it holds classes.

    A class may well be called "train" (vehicles): a split holds folders.
    """
    found: dict[str, Path] = {}
    folders = [p for p in _visible(root) if p.is_dir()]
    for path in folders:
        for split, aliases in SPLIT_ALIASES.items():
            if path.name.lower() in aliases and any(p.is_dir() for p in _visible(path)):
                if split in found:
                    raise DataError(
                        f"{root}: both {found[split].name} and {path.name} look like the {split} pictures; "
                        f"name one with `{split}`"
                    )
                found[split] = path
    if "train" in found and (len(found) > 1 or len(folders) == 1):
        return found
    usual = {alias for aliases in SPLIT_ALIASES.values() for alias in aliases}
    if folders and all(p.name.lower() in usual for p in folders):
        raise DataError(
            f"{root}: holds only {listing(p.name for p in folders)}, without train and test folders that hold class "
            "folders; put the pictures of each class into a folder of its own, as train/<class> and test/<class>"
        )
    return {}


def _deeper(root: Path) -> str:
    """A hint for someone who points one folder too high."""
    for path in _visible(root):
        if path.is_dir() and any(p.is_dir() for p in _visible(path)):
            return f"; did you mean `path: {path}`?"
    return ""


def _read_split(root: Path, split: str, raw: RawTask, base: Path) -> list[Entry]:
    entries: list[Entry] = []
    ignored: list[Path] = []
    names: dict[str, str] = {}
    for folder in _visible(root):
        if not folder.is_dir():
            ignored.append(folder)
            continue
        label = _name(folder)
        if not label.isprintable() and any("\ud800" <= c <= "\udfff" for c in label):
            raise DataError(f"{folder}: the folder's name is not UTF-8, so it can be no class's name; rename it")
        if label in names:
            raise DataError(
                f"{folder}: the folders {names[label]!r} and {folder.name!r} have one name in two Unicode spellings; "
                "merge them"
            )
        names[label] = folder.name
        files = _files(folder, (os.path.realpath(root), os.path.realpath(folder)), ignored)
        if not files:
            raw.empty.setdefault(split, []).append((label, str(folder)))
        for file in files:
            inside = unicodedata.normalize("NFC", file.relative_to(folder).as_posix())
            medium = medium_of(file) or "picture"
            key = f"{split}/{label}/{inside}"
            entries.append(Entry(key, label, str(file), FileBytes(file), medium=medium))
    loose = [p for p in ignored if p.parent == root and medium_of(p)]
    media = " or ".join(sorted({f"{medium_of(p)}" for p in loose})) or "picture"
    if not names:
        what = f"{len(loose)} {media}(s) but no class folders" if loose else "no class folders"
        raise DataError(f"{root}: holds {what}; put the {media}s of each class into a folder named after it")
    if loose:
        raw.warnings.append(f"{len(loose)} {media}(s) outside the class folders ignored: {listing(map(str, loose))}")
    other = [p for p in ignored if p not in loose]
    if other:
        kinds = Counter(p.suffix.lower() or "no ending" for p in other)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raw.warnings.append(
            f"{len(other)} file(s) that are not pictures or videos ignored ({counts}): {listing(map(str, other))}"
            + ("; convert .heic to PNG or JPEG to use them" if {".heic", ".heif"} & set(kinds) else "")
        )
    return entries


def _files(folder: Path, above: tuple[str, ...], ignored: list[Path]) -> list[Path]:
    """Pictures and videos of a class folder, also in folders below it, sorted by name."""
    found: list[Path] = []
    for path in _visible(folder):
        if path.is_dir():
            real = os.path.realpath(path)
            if real in above:
                raise DataError(f"{path}: the link leads back to a folder above itself; delete it")
            found += _files(path, (*above, real), ignored)
        elif medium_of(path):
            found.append(path)
        else:
            ignored.append(path)
    return found
