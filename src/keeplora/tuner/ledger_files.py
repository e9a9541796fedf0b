"""The ledger's files: JSON that vouches for itself, tensors that a record vouches for. Whatever is wrong is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.files import atomic_write_json, open_regular, read_regular, sha256_file
from keeplora.json_text import MAX_BYTES, parse_json

FORMAT = "keeplora-ledger"
VERSION = 1

_LARGE = 1 << 30
"""A file larger than this has its header looked at before it is hashed: terabytes of nothing cost nothing to make."""

_COPY = "the ledger is not complete; copy the whole folder again"


def no_ledger(path: Path) -> str:
    """What to say of a folder that holds nothing of a ledger, whichever command was given it."""
    runs = sorted(p for p in path.iterdir() if (p / "ledger" / "ledger.json").is_file())
    hint = f"one of the runs in it, such as {runs[0]}" if runs else "the folder that a run or save_pretrained wrote"
    return f"{path} holds no run and no ledger; give {hint}"


def refuse_link(path: Path) -> None:
    """A ledger's own files are files: a link could lead out of the folder, and would be followed by whoever writes."""
    if path.is_symlink():
        raise LedgerError(f"{path} is a symbolic link: a ledger holds its files itself; copy the file in its place")


def read_json(path: Path) -> Any:
    """The file's JSON, or a `LedgerError` that names it."""
    refuse_link(path)
    try:
        return parse_json(read_regular(path, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise LedgerError(f"{path} is missing: {_COPY}") from None
    except ValueError as error:
        raise LedgerError(
            f"{path} is not readable JSON ({error}): the file is damaged; restore it from a copy"
        ) from None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}") from None


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """A safetensors file whose hash is ``digest``, or a `LedgerError` that names it."""
    refuse_link(path)
    if not path.is_file():
        raise LedgerError(f"{path} is missing: {_COPY}")
    if path.stat().st_size > _LARGE:
        _check_size(path)
    if sha256_file(path) != digest:
        raise LedgerError(f"{path} does not have the SHA-256 that its record names: the file was changed or damaged")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise LedgerError(f"{path} is not a readable safetensors file ({error})") from None


def _check_size(path: Path) -> None:
    """Refuse a file whose size is not what its header says, before all of it is read."""
    try:
        with open_regular(path) as handle:
            size, n = path.stat().st_size, int.from_bytes(handle.read(8), "little")
            if n > min(size, MAX_BYTES):
                raise ValueError(f"its header would have {n:,} bytes")
            header = parse_json(handle.read(n).decode("utf-8"))
            end = max((e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"), default=0)
            if size != 8 + n + end:
                raise ValueError(f"it has {size:,} bytes, and by its header {8 + n + end:,}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise LedgerError(f"{path} is not a whole safetensors file ({error}): restore it from a copy") from None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}") from None


def seal(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object's other keys."""
    text = json.dumps({k: v for k, v in value.items() if k != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with its seal; atomic."""
    value = json.loads(json.dumps(value, allow_nan=False))  # as a reader will see it: keys as strings, tuples as lists
    atomic_write_json(path, {**value, "seal": seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """A sealed JSON object of this format, in a version that is known."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise LedgerError(f"{path} is not a keeplora ledger: its 'format' is not {FORMAT!r}")
    version = value.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= VERSION:
        raise LedgerError(
            f"{path} has format version {version!r}; this keeplora reads up to version {VERSION}: upgrade keeplora"
        )
    if value.get("seal") != seal(value):
        raise LedgerError(f"{path} was changed after it was written: its 'seal' does not fit; restore it from a copy")
    return value


def need(value: Mapping[str, Any], path: Path, **kinds: type | tuple[type, ...]) -> None:
    """`LedgerError` unless each named key is there and of the kind that is given."""
    for key, kind in kinds.items():
        found = value.get(key)
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
            raise LedgerError(
                f"{path}: its {key!r} is {'missing' if key not in value else f'of the wrong kind ({found!r:.60})'}; "
                "restore it from a copy"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a JSON file's bytes."""
    refuse_link(path)
    try:
        return hashlib.sha256(read_regular(path, MAX_BYTES)).hexdigest()
    except FileNotFoundError:
        raise LedgerError(f"{path} is missing: {_COPY}") from None
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror or error}") from None
