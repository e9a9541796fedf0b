"""The output of a frozen vision tower, kept per picture: it is the same in every epoch, statistics pass and evaluation."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class VisionCache:
    """Answers a tower's ``forward(pixel_values, …)`` from memory, picture by picture, while `active`.

    A picture that is not there is computed in a batch of its own, so that what is kept does not depend on which pictures
    came with it: an interrupted run that is resumed reads the same numbers. Only calls with ``pixel_values``
    [N, 3, H, W], without a gradient, are answered; all others go to the tower.

    Args:
        tower: a module whose output (a tensor, or a mapping of tensors) has one row per picture.
        max_bytes: what is held at most; pictures beyond it are computed every time.
    """

    def __init__(self, tower: nn.Module, max_bytes: int = 2 << 30) -> None:
        self.tower = tower
        self.left = max_bytes
        self.hits = self.misses = 0
        self._kept: dict[bytes, Any] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the tower's forward goes through the cache; afterwards it is as it was."""
        inner = self.tower.forward

        def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or pixel_values.ndim != 4 or pixel_values.requires_grad or not len(pixel_values):
                return inner(pixel_values, *args, **kwargs)
            setting = repr(sorted(kwargs.items())).encode() if _plain(kwargs) else None
            if setting is None:
                return inner(pixel_values, **kwargs)
            with torch.no_grad():
                return _join([self._row(row.unsqueeze(0), setting, inner, kwargs) for row in pixel_values])

        self.tower.forward = forward
        try:
            yield
        finally:
            del self.tower.forward  # the class's own shows again

    def _row(self, pixels: Tensor, setting: bytes, inner: Any, kwargs: Mapping[str, Any]) -> Any:
        device = pixels.device.type
        dtype = str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pixels.dtype)
        raw = pixels.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        key = hashlib.blake2b(b"|".join([dtype.encode(), setting, raw]), digest_size=16).digest()
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        found = inner(pixels, **kwargs)
        size = sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(found)}.values())
        if size <= self.left:
            self.left -= size
            self._kept[key] = found
        return found


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
