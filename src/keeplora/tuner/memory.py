"""Where the memory of a GPU does not suffice: the same samples in smaller batches, said once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from keeplora.errors import KeepLoraError

T = TypeVar("T")


def release_cached() -> None:
    """Give what torch's allocator keeps aside back to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32, whatever `torch.set_float32_matmul_precision` lets a GPU (TF32) or oneDNN (bf16) do.

    A user may want that for a model's passes; in C and in G, whose smallest directions count, ten bits are too few (M2, M8).
    What was set before is set again behind it.

    >>> with full_float32():
    ...     torch.backends.cuda.matmul.fp32_precision
    'ieee'
    """
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch before 2.9 has the one switch alone
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    was = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, was, strict=True):
            backend.fp32_precision = precision


def halved(batches: Iterable[Any]) -> Iterable[Any] | None:
    """The same samples in the same order, in batches of half the size; None where that cannot be done.

    A `DataLoader` in its set's order is rebuilt; any other object is asked for ``halved()``.

    >>> smaller = halved(DataLoader(range(5), batch_size=4))
    >>> [batch.tolist() for batch in smaller]
    [[0, 1], [2, 3], [4]]
    >>> halved([torch.zeros(4)]) is None
    True
    """
    if isinstance(batches, DataLoader):
        ordered = isinstance(batches.sampler, SequentialSampler) or isinstance(batches.dataset, IterableDataset)
        if not ordered or not batches.batch_size or batches.batch_size == 1:
            return None
        return DataLoader(
            batches.dataset, batch_size=batches.batch_size // 2, collate_fn=batches.collate_fn,
            num_workers=batches.num_workers, worker_init_fn=batches.worker_init_fn, generator=batches.generator,
            pin_memory=batches.pin_memory,
        )  # fmt: skip
    ask: Callable[[], Iterable[Any] | None] | None = getattr(batches, "halved", None)
    return None if ask is None else ask()


def in_smaller_batches(what: str, batches: Iterable[Any], take: Callable[[Iterable[Any]], T]) -> T:
    """``take(batches)``; where the memory does not suffice, from the start again with batches of half the size.

    Args:
        what: the pass, for a message.

    Raises:
        KeepLoraError: the batches cannot be made smaller.
    """
    while True:
        try:
            return take(batches)
        except torch.OutOfMemoryError as error:
            told = first_line(error)
        release_cached()  # out here nothing holds the pass's tensors any more
        smaller = halved(batches)
        if smaller is None:
            raise KeepLoraError(
                f"the {what} pass does not fit the memory ({told}), and its batches cannot be made smaller; use smaller "
                "batches or pictures"
            )
        batches = smaller
        warnings.warn(
            f"the {what} pass did not fit the memory and was taken again in batches of half the size; the sums are the same",
            stacklevel=2,
        )


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Pieces:
    """Work on n samples at once, or on fewer where the memory does not suffice: for passes whose samples are independent.

    >>> pieces = Pieces("evaluation")
    >>> pieces(5, lambda start, end: list(range(start, end)))
    [[0, 1, 2, 3, 4]]
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.limit: int | None = None

    def __call__(self, n: int, work: Callable[[int, int], T]) -> list[T]:
        """What ``work(start, end)`` returned for stretches that cover 0 … n in order.

        Raises:
            KeepLoraError: not even one sample fits.
        """
        found: list[T] = []
        start = 0
        while start < n:
            end = min(n, start + (self.limit or n))
            try:
                found.append(work(start, end))
                start = end
                continue
            except torch.OutOfMemoryError as error:
                told = first_line(error)
            release_cached()
            if end - start == 1:
                raise KeepLoraError(
                    f"{self.what}: not even one sample fits the memory ({told}); use smaller pictures or a larger GPU"
                )
            self.limit = -(-(end - start) // 2)
            warnings.warn(
                f"{self.what}: the memory did not hold {end - start} samples at once; it goes on with at most {self.limit}",
                stacklevel=2,
            )
        return found
