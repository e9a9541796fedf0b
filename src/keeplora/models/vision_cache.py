"""The output of a frozen vision tower, kept per picture: it is the same in every epoch, statistics pass and evaluation."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class VisionCache:
    """Answers ``forward`` of one or several towers from memory, picture by picture and frame by frame, while `active`.

    A picture that is not there is computed in a batch of its own, so that what is kept does not depend on which pictures
    came with it: an interrupted run that is resumed reads the same numbers. Calls without a gradient are answered whose
    first argument is ``pixel_values`` [N, 3, H, W] (a video's frames are N pictures; tensors beside it have one row per
    picture), or Qwen-VL's patches [P, D] with their ``grid_thw`` [N, 3] (a video is one row, with all its frames). All
    others go to the tower.

    Under autocast the output is given, and kept, in autocast's dtype: it is what the first product behind the tower takes.

    Args:
        towers: modules whose output (a tensor, or a mapping of tensors) has one row per picture, or rows of patches.
        max_bytes: what is held at most, for all of them; pictures beyond it are computed every time.
    """

    def __init__(self, *towers: nn.Module, max_bytes: int = 2 << 30) -> None:
        self.towers = towers
        self.left = max_bytes
        self.hits = self.misses = 0
        self._kept: dict[bytes, Any] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the towers' forward goes through the cache; afterwards it is as it was."""
        for number, tower in enumerate(self.towers):
            tower.forward = self._around(tower.forward, number)
        try:
            yield
        finally:
            for tower in self.towers:
                del tower.forward  # the class's own shows again

    def _around(self, inner: Any, number: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            name = next((key for key in ("pixel_values", "hidden_states") if key in kwargs), "pixel_values")
            pixels = args[0] if args else kwargs.get(name)
            rest = {key: value for key, value in kwargs.items() if key != name or args}
            if len(args) > 1 or not isinstance(pixels, Tensor) or pixels.requires_grad or not len(pixels):
                return inner(*args, **kwargs)
            rows = _rows(pixels, rest)
            if rows is None:
                return inner(*args, **kwargs)
            with torch.no_grad():
                return _join(
                    [self._row(row, beside, number, inner, name if not args else None) for row, beside in rows]
                )

        return forward

    def _row(self, pixels: Tensor, beside: dict[str, Any], number: int, inner: Any, name: str | None) -> Any:
        device = pixels.device.type
        dtype = str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pixels.dtype)
        setting = sorted((key, _told(value)) for key, value in beside.items())
        told = f"{number} {dtype} {tuple(pixels.shape)} {setting}".encode()
        tensors = [pixels, *(beside[key] for key in sorted(beside) if isinstance(beside[key], Tensor))]
        key = hashlib.blake2b(b"|".join([told, *map(_raw, tensors)]), digest_size=16).digest()
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        found = inner(pixels, **beside) if name is None else inner(**{name: pixels}, **beside)
        if torch.is_autocast_enabled(device):
            found = _rounded(found, torch.get_autocast_dtype(device))
        size = sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(found)}.values())
        if size <= self.left:
            self.left -= size
            self._kept[key] = found
        return found


def _rounded(output: Any, dtype: torch.dtype) -> Any:
    """The output with its floating-point tensors in ``dtype``."""
    if isinstance(output, Tensor):
        return output.to(dtype) if output.is_floating_point() else output
    if isinstance(output, Mapping):
        return type(output)(**{key: _rounded(value, dtype) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(_rounded(part, dtype) for part in output)
    return output


def _rows(pixels: Tensor, beside: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]] | None:
    """Each picture or video with its rows of what stands beside it; None where the call is not of a known form."""
    tensors = {key: value for key, value in beside.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in beside.items() if key not in tensors}
    if not _plain(others):
        return None
    grid = tensors.get("grid_thw")
    if pixels.ndim == 2 and grid is not None and len(tensors) == 1:
        parts = pixels.split(grid.prod(dim=1).tolist())
        return [(part, {**others, "grid_thw": grid[i : i + 1]}) for i, part in enumerate(parts)]
    if pixels.ndim != 4 or any(len(value) != len(pixels) for value in tensors.values()):
        return None
    return [
        (pixels[i : i + 1], {**others, **{key: value[i : i + 1] for key, value in tensors.items()}})
        for i in range(len(pixels))
    ]


def _told(value: Any) -> str:
    return f"tensor {value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments are values that a key can be made of."""
    flat = [v for value in kwargs.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return all(value is None or isinstance(value, bool | int | float | str) for value in flat)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _join(rows: list[Any]) -> Any:
    # Rebuilt even for one row: LLaVA's classes write into the output that they are given.
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat(rows)
    if isinstance(first, Mapping):
        return type(first)(**{key: _join([row[key] for row in rows]) for key in first})
    if isinstance(first, list | tuple):
        return type(first)(_join(list(parts)) for parts in zip(*rows, strict=True))
    return first
