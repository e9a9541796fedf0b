"""The output of a frozen vision tower, kept per picture: it is the same in every epoch, statistics pass and evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.models.row_memory import RowMemory


class VisionCache:
    """Answers ``forward`` of one or several towers from memory, picture by picture and frame by frame, while `active`.

    Pictures that are not there are computed eight or four at a time where that gives the bits of each picture alone, else
    one by one (`row_memory`): what is kept does not depend on which pictures came with it, so that an interrupted run that
    is resumed reads the same numbers.

    Calls without a gradient are answered whose first argument is ``pixel_values`` [N, 3, H, W] (a video's frames are N
    pictures; tensors beside it have one row per picture), or Qwen-VL's patches [P, D] with their ``grid_thw`` [N, 3] (a video
    is one row, with all its frames). All others go to the tower.

    Under autocast the output is given, and kept, in autocast's dtype: it is what the first product behind the tower takes.

    Args:
        towers: modules whose output (a tensor, or a mapping of tensors) has one row per picture, or rows of patches.
        max_bytes: what is held at most, for all of them; pictures beyond it are computed every time.
    """

    def __init__(self, *towers: nn.Module, max_bytes: int = 2 << 30) -> None:
        self.towers = towers
        self.memory = RowMemory(max_bytes)

    @property
    def hits(self) -> int:
        return self.memory.hits

    @property
    def misses(self) -> int:
        return self.memory.misses

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
            device = pixels.device.type
            rounded = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

            def compute(some: list[tuple[Tensor, ...]]) -> Any:
                given = [torch.cat(parts) for parts in zip(*some, strict=True)]
                beside = {**others, **dict(zip(names, given[1:], strict=True))}
                found = inner(given[0], **beside) if args else inner(**{name: given[0]}, **beside)
                return found if rounded is None else _rounded(found, rounded)

            names, others, tensors = rows
            with torch.no_grad():
                answers: list[Any] = [None] * len(tensors)
                for form, places in _by_form(f"{number} {rounded} {sorted(others.items())} {names}", tensors).items():
                    # A video of patches is one row, and its output has as many as it has patches.
                    found = self.memory(form, [tensors[i] for i in places], compute, together=pixels.ndim == 4)
                    for i, answer in zip(places, found, strict=True):
                        answers[i] = answer
                return _join(answers)

        return forward


def _rounded(output: Any, dtype: torch.dtype) -> Any:
    """The output with its floating-point tensors in ``dtype``."""
    if isinstance(output, Tensor):
        return output.to(dtype) if output.is_floating_point() else output
    if isinstance(output, Mapping):
        return type(output)(**{key: _rounded(value, dtype) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(_rounded(part, dtype) for part in output)
    return output


def _rows(
    pixels: Tensor, beside: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any], list[tuple[Tensor, ...]]] | None:
    """Names of the tensors beside the pictures, all other settings, and each picture or video with its rows of those tensors.

    None where the call is not of a known form.
    """
    tensors = {key: value for key, value in sorted(beside.items()) if isinstance(value, Tensor)}
    others = {key: value for key, value in beside.items() if key not in tensors}
    if not _plain(others):
        return None
    grid = tensors.get("grid_thw")
    if pixels.ndim == 2 and grid is not None and len(tensors) == 1:
        parts = pixels.split(grid.prod(dim=1).tolist())
        return ["grid_thw"], others, [(part, grid[i : i + 1]) for i, part in enumerate(parts)]
    if pixels.ndim != 4 or any(len(value) != len(pixels) for value in tensors.values()):
        return None
    every = (pixels, *tensors.values())
    return list(tensors), others, [tuple(value[i : i + 1] for value in every) for i in range(len(pixels))]


def _by_form(call: str, rows: list[tuple[Tensor, ...]]) -> dict[str, list[int]]:
    """Places of the rows that have the same shapes and dtypes."""
    forms: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        forms.setdefault(f"{call} {[(t.dtype, tuple(t.shape)) for t in row]}", []).append(i)
    return forms


def _plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments are values that a key can be made of."""
    flat = [v for value in kwargs.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return all(value is None or isinstance(value, bool | int | float | str) for value in flat)


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
