"""What a frozen function says of each row of a batch, kept by the row's content; new rows go through together where that is safe.

What is kept must not depend on which rows happened to come with it. A run that was interrupted has lost its memory, and meets
its pictures in other company than the run that was not; both must read the same bits. So the value of a row is that of a pass
of this row alone, and rows are taken together only where that gives the same bits. Whether it does is up to the kernels, which
may add in another order when a matrix has more rows. It is therefore tried, once for each form of call (function, shapes,
dtype, settings) and size of batch: the rows alone, and the same rows together. Which order a kernel adds in follows from
shapes, threads and machine, not from the numbers, and all positions of a batch are looked at, with every bit of the output:
what held for the rows of the trial holds for others. On the CPU that we have tried, a ViT-B/16 gives the same bits in batches of
1 to 8 (one thread and two, float32 and bfloat16), and one linear layer of a single row per picture does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SIZES = (8, 4)
"""Rows that go through together; what is left over goes through by itself."""


class RowMemory:
    """Answers for rows of content, from memory where it can.

    Args:
        max_bytes: what is held at most; rows beyond it are computed every time.

    Attributes:
        left: bytes that are free. hits, misses: rows that were known, and that were not.

    >>> memory = RowMemory(1 << 20)
    >>> rows = [(torch.ones(1, 2),), (torch.zeros(1, 2),)]
    >>> memory("sum", rows, lambda some: torch.cat([x for x, in some]).sum(1))
    [tensor([2.]), tensor([0.])]
    >>> memory("sum", rows[:1], lambda some: torch.cat([x for x, in some]).sum(1)), memory.hits, memory.misses
    ([tensor([2.])], 1, 2)
    """

    def __init__(self, max_bytes: int) -> None:
        self.left = max_bytes
        self.hits = self.misses = 0
        self._kept: dict[bytes, Any] = {}
        self._together: dict[tuple[str, int], bool] = {}

    def __call__(
        self, form: str, rows: Sequence[tuple[Tensor, ...]], compute: Callable[[list[tuple[Tensor, ...]]], Any], *,
        together: bool = True,
    ) -> list[Any]:  # fmt: skip
        """What ``compute`` says of each row.

        Args:
            form: all that the answer depends on beside a row's tensors, their shapes included: rows of one form may go
                through ``compute`` in one call.
            rows: the tensors of each. compute: takes some rows; returns a tensor, or a mapping, list or tuple of tensors,
                with one entry of dimension 0 for each row.
            together: False: each row by itself, whatever it costs.

        Returns an answer for each row, as ``compute`` gives it of this row alone. They are kept: do not write into them.
        """
        keys = [_key(form, row) for row in rows]
        answers = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in answers}
        self.misses += len(new)
        self.hits += len(rows) - len(new)
        found = self._computed(form, list(new.values()), compute, SIZES if together else ())
        for key, answer in zip(new, found, strict=True):
            answers[key] = answer
            if (size := _bytes(answer)) <= self.left:
                self.left -= size
                self._kept[key] = answer
        return [answers[key] for key in keys]

    def _computed(
        self, form: str, rows: list[tuple[Tensor, ...]], compute: Callable[[list[tuple[Tensor, ...]]], Any],
        sizes: Sequence[int],
    ) -> Iterator[Any]:  # fmt: skip
        done = 0
        while done < len(rows):
            fit = (n for n in sizes if n <= len(rows) - done and self._together.get((form, n), True))
            some = rows[done : done + next(fit, 1)]
            done += len(some)
            if len(some) == 1:
                yield compute(some)
                continue
            known = (form, len(some)) in self._together
            answers = _several(compute, some)
            if not known or answers is None:
                alone = [compute([row]) for row in some]
                self._together[form, len(some)] = answers is not None and all(map(_same, alone, answers))
                answers = alone
            yield from answers


def _several(compute: Callable[[list[tuple[Tensor, ...]]], Any], rows: list[tuple[Tensor, ...]]) -> list[Any] | None:
    """The answers of one pass over all rows; None where it has no room, or its output no entry for each row."""
    try:
        return _split(compute(rows), len(rows), {})
    except torch.OutOfMemoryError:
        return None


def _split(output: Any, n: int, seen: dict[int, list[Any]]) -> list[Any] | None:
    """The output's rows, each with a storage of its own; a tensor that occurs twice does so in every row."""
    if isinstance(output, Tensor):
        if output.ndim == 0 or len(output) != n:
            return None
        if id(output) not in seen:
            seen[id(output)] = [output[i : i + 1].clone() for i in range(n)]
        return seen[id(output)]
    if isinstance(output, Mapping):
        parts = {key: _split(value, n, seen) for key, value in output.items()}
        if any(part is None for part in parts.values()):
            return None
        return [type(output)(**{key: part[i] for key, part in parts.items() if part is not None}) for i in range(n)]
    if isinstance(output, list | tuple):
        lists = [_split(value, n, seen) for value in output]
        if any(part is None for part in lists):
            return None
        return [type(output)(part[i] for part in lists if part is not None) for i in range(n)]
    return [output] * n


def _same(one: Any, other: Any) -> bool:
    mine, theirs = list(tensors_of(one)), list(tensors_of(other))
    return len(mine) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        for a, b in zip(mine, theirs, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, by which 0 and -0 differ and NaN is itself."""
    return tensor.detach().contiguous().view(torch.uint8)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in an output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def _bytes(answer: Any) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors_of(answer)}.values())


def _key(form: str, row: tuple[Tensor, ...]) -> bytes:
    digest = hashlib.blake2b(form.encode(), digest_size=16)
    for tensor in row:
        digest.update(_bits(tensor).cpu().numpy().tobytes())
    return digest.digest()
