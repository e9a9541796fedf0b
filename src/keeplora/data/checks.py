"""Reading every picture once: damaged ones, and the same picture on both sides of a split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from keeplora.data.pictures import PictureError, check_picture
from keeplora.data.sets import Entry
from keeplora.data.spec import TaskSpec, listing
from keeplora.errors import DataError


def check_entries(entries: Sequence[Entry], spec: TaskSpec, split: str) -> tuple[list[Entry], list[str]]:
    """Read every picture and look at it, a few at a time; nothing decoded is kept.

    With ``on_error: skip`` every picture is decoded in full, so that the pictures left out are the same ones in
    every run and process, and none fails later.

    Returns:
        The usable entries with their digests, and warnings.
    """
    full = spec.check == "full" or spec.on_error == "skip"

    def check(entry: Entry) -> Entry | PictureError:
        try:
            data = entry.source.read()
            pixels = check_picture(data, entry.where, max_pixels=spec.max_pixels, full=full)
        except PictureError as error:
            return error
        return replace(entry, digest=hashlib.sha256(data).hexdigest(), pixels=pixels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes and hashlib hashes without the GIL
        checked = list(pool.map(check, entries))
    good = [item for item in checked if isinstance(item, Entry)]
    bad = [item for item in checked if isinstance(item, PictureError)]
    if not bad:
        return good, []
    if spec.on_error == "raise":
        more = f" ({len(bad) - 1} more picture(s) of {split} cannot be used)" if len(bad) > 1 else ""
        raise PictureError(f"{bad[0]}; or set `on_error: skip` to leave such pictures out{more}")
    return good, [f"{len(bad)} unusable picture(s) of {split} skipped: {listing((str(e) for e in bad), 3)}"]


def _names(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    return listing((f"{copy.where} = {original.where}" for copy, original in pairs), 3)


def handle_duplicates(splits: dict[str, list[Entry]], policy: str) -> tuple[dict[str, list[Entry]], list[str]]:
    """Find one picture on two sides: equal bytes, or equal pixels where the check was full.

    Training copies of test and validation pictures, and validation copies of test pictures, are warned of, refused
    or dropped; the test set is never changed. Equal pictures in one training set under two classes are warned of.
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
                f"{len(pairs)} picture(s) of {side} are also in {against}: {_names(pairs)}; "
                "delete one of each, or set `duplicates: drop`"
            )
        if policy == "drop":
            copies = {id(copy) for copy, _ in pairs}
            kept[side] = [entry for entry in kept[side] if id(entry) not in copies]
            warnings.append(f"{len(pairs)} picture(s) of {side} dropped, being in {against} too: {_names(pairs)}")
        else:
            warnings.append(
                f"{len(pairs)} picture(s) of {side} are also in {against}, which flatters the result: {_names(pairs)}; "
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
