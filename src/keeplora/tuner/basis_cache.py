"""U₀ of weights that were decomposed before (M1), from the user's cache.

One safetensors file per weight under ``bases/`` of `keeplora.files.cache_dir`. Its name is a SHA-256 of everything that the bits
of U₀ depend on: the weight's bytes, dtype and shape, ε_w, this module's `RECIPE`, and what computes: torch, its BLAS and the
instructions of the processor. What is read is the same bits that would be computed; a file that is damaged, or is not of that
weight, counts as none. The cache is never needed: ``KEEPLORA_NO_CACHE=1`` turns it off, files may be deleted at any time, and no
fault of the disk is anyone's concern.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from keeplora.files import atomic_write_bytes, cache_dir
from keeplora.math import Subspace, orthonormality_error, weight_basis

CPU = torch.device("cpu")
RECIPE = 1
"""Raised whenever `weight_basis` or `Subspace.of` would give other bits for the same weight."""
SMALLEST_SIDE = 256
"""Weights with a smaller side are decomposed in some milliseconds: a file would not pay."""
DEFAULT_BYTES = 4 * 2**30
"""Most that the cache takes; ``KEEPLORA_BASES_BYTES`` sets another number. What was used longest ago goes first."""
LEAST_AGE = 3600.0
"""Seconds for which a file that was used is left alone: a model larger than the cache must not push its own layers out."""
_ORTHONORMAL = 1e-5
_SLACK = 1e-4


def weight_subspace(W: Tensor, energy: float, device: torch.device = CPU) -> Subspace:
    """M1's basis of W by its smaller side, as ``Subspace.of(weight_basis(W, energy))`` and bit for bit that; on the CPU.

    Args:
        W: (out, in), any float dtype. energy: ε_w in [0, 1]. device: where it is computed. Another device gives other bits, so a
            basis is in the cache once for each that it was computed on.
    """
    if not 0 < energy <= 1 or W.ndim != 2 or min(W.shape) < SMALLEST_SIDE or not _enabled():
        return _computed(W, energy, device)
    key = _key(W, energy, device)
    path = _folder() / f"{key}.safetensors"
    if (found := _read(path, key, W, energy, device)) is not None:
        return found
    made = _computed(W, energy, device)
    _write(path, key, made)
    return made


def _computed(W: Tensor, energy: float, device: torch.device) -> Subspace:
    S = Subspace.of(weight_basis(W.to(device), energy)).to(CPU)
    # As a file gives it: what is multiplied by a matrix laid out in another order comes out in other bits.
    return Subspace(S.held.contiguous(), S.by_complement)


def _enabled() -> bool:
    return os.environ.get("KEEPLORA_NO_CACHE", "0") in ("", "0") and _limit() > 0


def _limit() -> int:
    told = os.environ.get("KEEPLORA_BASES_BYTES", "")
    return int(told) if told.isdecimal() else DEFAULT_BYTES


def _folder() -> Path:
    return cache_dir() / "bases"


@functools.cache
def _computer(device: torch.device = CPU) -> str:
    """What the bits of a decomposition depend on beside its input."""
    told: list[Any] = [
        RECIPE,
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.__config__.show(),
    ]
    return json.dumps(told if device.type == "cpu" else [*told, *_gpu(device)])


def _gpu(device: torch.device) -> list[Any]:
    """The chip and the libraries of a CUDA device; which of several like it computes makes no difference."""
    told = torch.cuda.get_device_properties(device)
    library = str(torch.backends.cuda.preferred_linalg_library())
    return [told.name, told.major, told.minor, torch.version.cuda, torch.version.hip, library]


def _key(W: Tensor, energy: float, device: torch.device) -> str:
    W = W.detach().cpu()
    digest = hashlib.sha256(json.dumps([_computer(device), str(W.dtype), list(W.shape), float(energy)]).encode())
    digest.update(_bytes(W))
    return digest.hexdigest()


def _bytes(M: Tensor) -> memoryview:
    data: Any = M.flatten().view(torch.uint8).numpy()
    return memoryview(data)


def _sum(held: Tensor) -> str:
    return hashlib.sha256(_bytes(held)).hexdigest()


def _read(path: Path, key: str, W: Tensor, energy: float, device: torch.device) -> Subspace | None:
    """The subspace in a file, if it is whole and one of this weight; None otherwise."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            held = file.get_tensor("held")
    except (OSError, SafetensorError):
        return None
    fits = held.ndim == 2 and held.dtype == torch.float32 and 2 * held.shape[1] <= held.shape[0] == W.shape[1]
    if not fits or told.get("key") != key or told.get("sha256") != _sum(held):
        return None
    S = Subspace(held, told.get("side") == "complement")
    if not _is_basis(S.to(device), W.to(device), energy):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return S


def _is_basis(S: Subspace, W: Tensor, energy: float) -> bool:
    """Whether S is orthonormal and holds ε_w of W's energy: sums tell of bits alone, not of what wrote them."""
    if not torch.isfinite(S.held).all() or orthonormality_error(S.held) > _ORTHONORMAL:
        return False
    W32 = W.detach().to(torch.float32)
    total, along = float(W32.square().sum()), float((W32 @ S.held).square().sum())
    return (total - along if S.by_complement else along) >= (energy - _SLACK) * total


def _write(path: Path, key: str, S: Subspace) -> None:
    metadata = {"key": key, "sha256": _sum(S.held), "side": "complement" if S.by_complement else "columns"}
    data = save({"held": S.held.contiguous()}, metadata=metadata)
    with contextlib.suppress(OSError):
        if _make_room(path.parent, len(data)):
            atomic_write_bytes(path, data)


def _make_room(folder: Path, size: int) -> bool:
    """Delete what was used longest ago until ``size`` bytes more fit; False where only files of the last hour are left."""
    limit, files = _limit(), []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            told = path.stat()
            files.append((told.st_mtime, told.st_size, path))
    held = sum(n for _, n, _ in files)
    for used, n, path in sorted(files):
        if held + size <= limit:
            break
        if time.time() - used < LEAST_AGE:
            return False
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        held -= n
    return held + size <= limit
