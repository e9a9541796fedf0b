"""MNIST (``MNIST/raw/*-ubyte``, also ``.gz``): the official 60,000 / 10,000 pictures in the IDX format.

Class names are torchvision's ("0 - zero", ..., "9 - nine"), which the code of ZSCL and of KeepLoRA puts into the
prompt ``a photo of the number: "{c}".``; CLIP's own notebook says "0", ..., "9": set `classes` for these.

With ``shots`` the training set is that many pictures of each digit, drawn as in RAIL's released X-TAIL code: numpy's
``RandomState(split_seed).choice``, without replacement, digit by digit from 0.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keeplora.data.benchmarks.common import ArrayBytes, benchmark_root, need
from keeplora.data.sets import Entry
from keeplora.data.spec import RawTask, TaskSpec
from keeplora.errors import DataError

CLASSES = (
    *("0 - zero", "1 - one", "2 - two", "3 - three", "4 - four"),
    *("5 - five", "6 - six", "7 - seven", "8 - eight", "9 - nine"),
)
_HOW = "fetch the file again"


def read(spec: TaskSpec, base_dir: Path, probe: bool) -> RawTask:
    """Read the four IDX files; the pictures stay in one array."""
    raw = need(benchmark_root(spec, base_dir) / "raw", "the folder of the four IDX files", _HOW, folder=True)
    task = RawTask(splits={}, class_order=list(CLASSES), pretty=False)
    shots = spec.numbers.get("shots")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        where, pictures = _idx(raw / f"{prefix}-images-idx3-ubyte", f"the {split} pictures", 3)
        table, labels = _idx(raw / f"{prefix}-labels-idx1-ubyte", f"the {split} labels", 1)
        if len(pictures) != len(labels):
            raise DataError(f"{table}: {len(labels)} labels for the {len(pictures)} pictures of {where}; fetch both")
        digits = labels.tolist()
        if max(digits) > 9:
            raise DataError(f"{table}: holds the label {max(digits)}, not a digit; {_HOW}")
        chosen = range(len(digits)) if shots is None or split == "test" else draw(digits, shots, spec.split_seed)
        task.splits[split] = [
            Entry(f"{split}/{i:05d}", CLASSES[digits[i]], f"{where}, picture {i}", ArrayBytes(pictures, i))
            for i in chosen
        ]
    return task


def draw(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Indices of ``shots`` pictures of each class, or all of a class that has no more, in ascending class order."""
    generator = np.random.RandomState(seed)
    every = np.asarray(labels)
    chosen: list[int] = []
    for label in np.unique(every):
        members = np.flatnonzero(every == label)
        chosen += generator.choice(members, min(shots, len(members)), replace=False).tolist()
    return chosen


def _idx(path: Path, what: str, axes: int) -> tuple[Path, np.ndarray]:
    """The uint8 array of an IDX file, packed or not, and the file's path.

    The header is big-endian: two zero bytes, 8 for uint8, the number of axes, then their lengths as 32-bit numbers.
    """
    packed = path.with_name(f"{path.name}.gz")
    file = packed if not path.exists() and packed.exists() else need(path, what, f"{_HOW}, or its .gz")
    try:
        data = gzip.decompress(file.read_bytes()) if file == packed else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: {what} cannot be read ({error}); {_HOW}") from error
    start = 4 + 4 * axes
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) < start:
        raise DataError(f"{file}: {what} do not start as an IDX file of bytes with {axes} axes does; {_HOW}")
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if len(data) - start != math.prod(shape) or len(data) == start:
        raise DataError(
            f"{file}: {what} are damaged: {len(data) - start:,} bytes where the header says {math.prod(shape):,}; {_HOW}"
        )
    return file, np.frombuffer(data, np.uint8, offset=start).reshape(shape)
