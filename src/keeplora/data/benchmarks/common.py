"""What the benchmark loaders share: official lists, .mat files, the seeded 80/20 split, pictures held in one array."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keeplora.data.sets import Entry
from keeplora.data.spec import TaskSpec, listing, locate
from keeplora.errors import ConfigError, DataError

#: What torchvision's ImageFolder takes for a picture.
IMAGE_FOLDER_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True, eq=False)
class ArrayBytes:
    """One row of a uint8 array ``[N, H, W]`` or ``[N, H, W, 3]``, as an uncompressed PGM or PPM picture.

    Not PNG: its bytes depend on the compressor that Pillow was built with, and the fingerprint is over these bytes.
    All rows share one array, which is pickled once however many rows go to a loader worker together.

    >>> ArrayBytes(np.array([[[0, 255]]], np.uint8), 0).read()
    b'P5\\n2 1\\n255\\n\\x00\\xff'
    """

    array: np.ndarray
    row: int

    def read(self) -> bytes:
        pixels = self.array[self.row]
        height, width = pixels.shape[:2]
        return b"P%d\n%d %d\n255\n" % (6 if pixels.ndim == 3 else 5, width, height) + pixels.tobytes()


def benchmark_root(spec: TaskSpec, base_dir: Path) -> Path:
    """The dataset's folder; the keys that would choose other splits are refused, as the official ones are used.

    Raises:
        ConfigError: no ``path``, or a split is named.
        DataError: the folder does not exist.
    """
    if spec.path is None:
        raise ConfigError(f"source {spec.source!r} needs `path`, the dataset's folder")
    for key, value in (("train", spec.train), ("test", spec.test)):
        if value is not None:
            raise ConfigError(f"source {spec.source!r} has its official splits: remove `{key}: {value}`")
    if isinstance(spec.validation, str):
        raise ConfigError(f"source {spec.source!r}: `validation` is {spec.validation!r}: give a fraction of train")
    return locate(spec.path, base_dir, kind="folder")


def need(path: Path, what: str, how: str, *, folder: bool = False) -> Path:
    """``path`` if it is a file (a folder with ``folder``).

    Raises:
        DataError: ``"<path>: <what> is missing; <how>"``.
    """
    if path.is_dir() if folder else path.is_file():
        return path
    if path.exists():
        kind = "a file, not a folder" if path.is_file() else "not an ordinary file"
        raise DataError(f"{path}: {what} is {kind}; {how}")
    raise DataError(f"{path}: {what} is missing; {how}")


def inner_folder(root: Path, name: str, what: str, how: str) -> Path:
    """``root/name``; or ``root`` itself where the person named the inner folder already."""
    if root.name == name and not (root / name).is_dir():
        return root
    return need(root / name, what, how, folder=True)


def read_lines(path: Path, what: str, how: str) -> list[str]:
    """The lines of a text file, stripped, without the empty ones; at least one.

    Raises:
        DataError: the file is missing, empty or no text.
    """
    try:
        text = need(path, what, how).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {what} cannot be read as text ({error}); {how}") from error
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if not lines:
        raise DataError(f"{path}: {what} is empty; {how}")
    return lines


def read_mat(path: Path, variables: Sequence[str], what: str, how: str) -> dict[str, Any]:
    """Variables of a MATLAB file (version 7.2 or older), by name, with axes of length one squeezed away.

    Raises:
        DataError: the file is missing or damaged, or lacks one of ``variables``.
    """
    from scipy.io import loadmat

    need(path, what, how)
    try:
        found = loadmat(str(path), squeeze_me=True)
    except Exception as error:  # damage shows in scipy as ValueError, zlib.error, KeyError, ...
        brief = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{path}: {what} cannot be read as a MATLAB file ({brief}); {how}") from error
    lacking = [name for name in variables if name not in found]
    if lacking:
        raise DataError(f"{path}: {what} lacks the variable(s) {listing(lacking)}; {how}")
    return {name: found[name] for name in variables}


def file_names(folder: Path, what: str, how: str, extensions: tuple[str, ...] | None = None) -> list[str]:
    """Names in ``folder`` by code point, without hidden ones; one listing, nothing is opened.

    Args:
        extensions: lower-case endings to keep; None keeps every name, folders too.
    """
    need(folder, what, how, folder=True)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DataError(f"{folder}: {what} cannot be listed ({error.strerror or error}); {how}") from error
    return sorted(n for n in names if not n.startswith(".") and (extensions is None or n.lower().endswith(extensions)))


def folder_names(folder: Path, what: str, how: str) -> list[str]:
    """Names of the folders in ``folder`` by code point, without hidden ones."""
    return [name for name in file_names(folder, what, how) if (folder / name).is_dir()]


def random_split_80_20(n: int) -> tuple[list[int], list[int]]:
    """Training and test indices of MTIL's own splits: a permutation, its first ``int(0.8 n)`` for training.

    The same as ``torch.utils.data.random_split`` with a generator of seed 42.

    >>> random_split_80_20(5)
    ([2, 4, 3, 0], [1])
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(42)).tolist()
    cut = int(0.8 * n)
    return order[:cut], order[cut:]


def split_80_20(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """`random_split_80_20` of entries whose keys have no split yet: ``{"train": [...], "test": [...]}``."""
    train, test = random_split_80_20(len(entries))
    found: dict[str, list[Entry]] = {}
    for split, chosen in (("train", train), ("test", test)):
        own = [entries[i] for i in chosen]
        found[split] = [Entry(f"{split}/{e.key}", e.label, e.where, e.source) for e in own]
    return found
