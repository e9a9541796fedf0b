"""Linear algebra layer by layer, on several cores at once, with the same bits on any number of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """torch computes with one thread inside; yields how many it may use otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def over_layers(work: Callable[[T], R], layers: Sequence[T]) -> list[R]:
    """``[work(layer) for layer in layers]``, as many at a time as torch may use threads (`torch.get_num_threads`).

    Each call computes with one thread. LAPACK's decompositions gain little from more (the bulk of a symmetric one is bound by
    memory), layers are independent, and what BLAS adds up in another order on another number of threads comes out in other
    bits: so it is the layers that are spread, and a result does not depend on the number of cores. torch lets go of Python's
    lock while it computes.

    Raises:
        whatever ``work`` raised first, in the order of ``layers``; what had not begun is not begun.

    >>> over_layers(lambda n: n * n, [1, 2, 3])
    [1, 4, 9]
    """
    with one_thread() as threads:
        workers = min(threads, len(layers))
        if workers <= 1:
            return [work(layer) for layer in layers]
        # torch keeps its number of threads per thread of Python.
        pool = ThreadPoolExecutor(workers, "keeplora-layers", initializer=torch.set_num_threads, initargs=(1,))
        try:
            return list(pool.map(work, layers))
        finally:
            pool.shutdown(cancel_futures=True)
