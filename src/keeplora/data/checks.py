"""Looking at every file once: damaged ones, and the same picture or video on both sides of a split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace

from keeplora.data.digests import FileFacts, Stamp, holds, in_threads, read_settled
from keeplora.data.headers import read_header
from keeplora.data.pictures import MAX_ASPECT, PictureError, check_picture
from keeplora.data.remote import RemoteBytes
from keeplora.data.sets import Entry, FileBytes
from keeplora.data.spec import SourceSpec, listing
from keeplora.data.video import VideoError, check_video, video_digest
from keeplora.errors import DataError

#: Part of the name under which good pictures are remembered: another number whenever `check_picture` refuses other ones.
_CHECK = 1


def file_of(entry: Entry) -> str | None:
    """The absolute path of the picture's file; None where it is part of something larger."""
    return os.path.abspath(entry.source.path) if isinstance(entry.source, FileBytes) else None


def check_entries(entries: Sequence[Entry], spec: SourceSpec, split: str) -> tuple[list[Entry], list[str]]:
    """Read every picture and video and look at it, a few at a time; nothing decoded is kept.

    A good file that has not changed since it was last read is not read again (`keeplora.data.digests`). With
    ``on_error: skip`` every file is decoded in full, so that those left out are the same ones in training, statistics and
    evaluation, in every run and process, and none fails later.

    Returns:
        The usable entries with their digests, and warnings.

    Raises:
        PictureError: a file cannot be used, and none may be skipped.
        DataError: more than the share ``max_skipped`` of them cannot be used.
    """
    full = spec.check == "full" or spec.on_error == "skip"
    facts = FileFacts(f"checked-{_CHECK}-{'full' if full else 'header'}-{spec.max_pixels}")
    known = facts.recall(filter(None, map(file_of, entries)))
    new: dict[str, tuple[Stamp, str]] = {}

    def fact_of(entry: Entry) -> str:
        if entry.medium == "video":
            check_video(entry.source, entry.where, full=full, max_pixels=spec.max_pixels)
            return f"{video_digest(entry.source)} "
        data = entry.source.read()
        pixels = "" if not full and _whole_array(data, spec) else check_picture(
            data, entry.where, max_pixels=spec.max_pixels, full=full
        )  # fmt: skip
        return f"{hashlib.sha256(data).hexdigest()} {pixels}"

    def check(part: Sequence[Entry]) -> list[Entry | DataError]:
        found: list[Entry | DataError] = []
        for entry in part:
            path = file_of(entry)
            fact = holds(known, path) if path is not None else None
            if fact is None:
                try:
                    if path is None:
                        fact = fact_of(entry)
                    else:
                        stamp, fact = read_settled(path, lambda _, entry=entry: fact_of(entry))
                        if stamp is not None:
                            new[path] = (stamp, fact)
                except (PictureError, VideoError) as error:
                    found.append(_named(error, entry))
                    continue
            digest, _, pixels = fact.partition(" ")
            found.append(replace(entry, digest=digest, pixels=pixels))
        return found

    # Pillow decodes and hashlib hashes without the GIL
    videos = any(entry.medium == "video" for entry in entries)
    checked = [item for part in in_threads(check, entries, size=4 if videos else 64) for item in part]
    facts.remember(new)
    good = [item for item in checked if isinstance(item, Entry)]
    bad = [item for item in checked if isinstance(item, DataError)]
    if not bad:
        return good, []
    what = "video" if videos else "picture"
    if spec.on_error == "raise":
        more = f" ({len(bad) - 1} more {what}(s) of {split} cannot be used)" if len(bad) > 1 else ""
        raise type(bad[0])(f"{bad[0]}; or set `on_error: skip` to leave such {what}s out{more}")
    if len(bad) > spec.max_skipped * len(entries):
        raise DataError(
            f"{len(bad)} of the {len(entries)} {what}s of {split} cannot be used, more than the share of {spec.max_skipped:g} "
            f"that `max_skipped` lets pass: {listing((str(e) for e in bad), 3)}; mend them, or raise `max_skipped`"
        )
    return good, [f"{len(bad)} unusable {what}(s) of {split} skipped: {listing((str(e) for e in bad), 3)}"]


def _named(error: DataError, entry: Entry) -> DataError:
    """The error under the entry's name, which tells the row or entry of a list that named the file."""
    path = str(entry.source.path) if isinstance(entry.source, FileBytes | RemoteBytes) else ""
    told = str(error)
    return type(error)(entry.where + told[len(path) :]) if path and told.startswith(f"{path}: ") else error


def _whole_array(data: bytes, spec: SourceSpec) -> bool:
    """Whether these are a plain uncompressed picture of the right length, which nothing can be wrong with."""
    header = read_header(len(data), lambda offset, count: data[offset : offset + count])
    return header is not None and header.format == "PPM" and may_be_used(header.width, header.height, spec.max_pixels)


def may_be_used(width: int, height: int, max_pixels: int) -> bool:
    """Whether a picture of this size passes `check_picture`'s limits."""
    return 0 < width * height <= max_pixels and max(width, height) <= MAX_ASPECT * min(width, height)


def _names(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    return listing((f"{copy.where} = {original.where}" for copy, original in pairs), 3)


def handle_duplicates(
    splits: dict[str, list[Entry]], policy: str, what: str = "picture(s)"
) -> tuple[dict[str, list[Entry]], list[str]]:
    """Find one picture on two sides: equal bytes, or equal pixels where the check was full.

    Training copies of test and validation pictures, and validation copies of test pictures, are warned of, refused
    or dropped; the test set is never changed. Equal pictures in one training set under two classes are warned of.
    ``what`` says what an entry stands for.
    """
    warnings: list[str] = []
    kept = dict(splits)
    for side, against in (("train", "test"), ("validation", "test"), ("train", "validation")):
        originals: dict[str, Entry] = {}
        for entry in kept.get(against, ()):
            for digest in filter(None, (entry.digest, entry.pixels)):
                originals.setdefault(digest, entry)
        pairs = [
            (entry, original)
            for entry in kept.get(side, ())
            if (original := originals.get(entry.digest) or originals.get(entry.pixels)) is not None
        ]
        if not pairs:
            continue
        if policy == "refuse":
            raise DataError(
                f"{len(pairs)} {what} of {side} are also in {against}: {_names(pairs)}; "
                "delete one of each, or set `duplicates: drop`"
            )
        if policy == "drop":
            copies = {id(copy) for copy, _ in pairs}
            kept[side] = [entry for entry in kept[side] if id(entry) not in copies]
            warnings.append(f"{len(pairs)} {what} of {side} dropped, being in {against} too: {_names(pairs)}")
        else:
            warnings.append(
                f"{len(pairs)} {what} of {side} are also in {against}, which flatters the result: {_names(pairs)}; "
                "set `duplicates: drop` to take them out of "
                f"{side}"
            )
    first: dict[str, Entry] = {}
    clashes = []
    for entry in kept.get("train", ()):
        other = first.setdefault(entry.digest, entry)
        if other.label != entry.label:
            clashes.append((entry, other))
    if clashes:
        warnings.append(f"{len(clashes)} picture(s) of train appear under two classes: {_names(clashes)}")
    return kept, warnings
