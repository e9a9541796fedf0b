"""Reading CIFAR's pickled batches without running anything that a pickle can ask for.

A pickle may name any function and have it called. Here the four names that an array in a pickle needs stand for
small records of ours, every other name is refused, and nothing of the file is called or imported.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from keeplora.data.benchmarks.common import need
from keeplora.errors import DataError


class _Refused(Exception):
    """The pickle names something that no batch of pictures needs."""


class _ArrayClass:
    """Stands for ``numpy.ndarray``, the first argument of an array's pickle."""


class _Dtype:
    """Stands for ``numpy.dtype``; only bytes are known."""

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if code not in ("u1", "|u1", "B", "uint8"):
            raise ValueError(f"an array of type {code!r} instead of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like mean nothing for bytes."""


class _Array:
    """Stands for ``_reconstruct``: an array that is filled by its state ``(version, shape, dtype, fortran, data)``."""

    value: np.ndarray

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != math.prod(shape):
            raise ValueError("an array whose size is not that of its data")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Encoded:
    """Stands for ``_codecs.encode``, which Python 3 writes for bytes under protocol 2."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"_codecs.encode to {encoding!r}")
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}


class _Allowed(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _ALLOWED.get((module_name, global_name))
        if found is None:
            raise _Refused(f"{module_name}.{global_name}")
        return found


def read_batch(path: Path, keys: tuple[str, ...], what: str, how: str) -> dict[str, Any]:
    """The values of ``keys`` in a pickled dictionary of byte arrays, lists, numbers and text; text comes as bytes or str.

    Raises:
        DataError: the file is missing, damaged, lacks a key, or names anything but arrays.
    """
    need(path, what, how)
    try:
        with path.open("rb") as handle:
            loaded = _Allowed(handle, encoding="bytes").load()
    except _Refused as error:
        raise DataError(
            f"{path}: {what} asks for {error}, which no picture batch needs; the file may be malicious: "
            f"delete it, and {how}"
        ) from error
    except Exception as error:  # damage shows as EOFError, UnpicklingError, KeyError, ValueError, MemoryError, ...
        brief = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{path}: {what} cannot be read as a pickled batch ({brief}); {how}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: {what} holds no dictionary but a {type(loaded).__name__}; {how}")
    named = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in loaded.items()}
    lacking = [key for key in keys if key not in named]
    if lacking:
        raise DataError(f"{path}: {what} lacks {lacking[0]!r}; {how}")
    return {key: value.value if isinstance(value := named[key], _Array) else value for key in keys}
