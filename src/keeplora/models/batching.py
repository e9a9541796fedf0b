"""Batches of conversations: single samples padded and put together, and samples of like length brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from keeplora.errors import DataError, KeepLoraError

Item = Mapping[str, Tensor]
IGNORED = -100
"""The label of a token that is not learned."""
PAD, TEXT, IMAGE, ANSWER = range(4)
"""Kinds of token in `token_kinds`."""


def join_items(items: Sequence[Item], *, pad_token: int, side: str = "right") -> dict[str, Tensor]:
    """Several samples as one batch.

    Tensors that run along the sequence ([1, T, ...], as input_ids) are padded to the longest on `side`. All others, such
    as pixel_values [pictures or patches, ...], are filled up with zeros beyond dimension 0, as the processors do, and
    concatenated along it; a sample without pictures adds nothing to them.
    """
    if not items:
        raise KeepLoraError("there is no sample to join")
    if side not in ("left", "right"):
        raise KeepLoraError(f"side is {side!r}; use 'left' or 'right'")
    along: list[set[str]] = [{k for k, v in item.items() if _runs_along(v, item["input_ids"])} for item in items]
    longest = max(item["input_ids"].shape[1] for item in items)
    batch: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for item in items for key in item):
        rows = [(item[key], key in runs) for item, runs in zip(items, along, strict=True) if key in item]
        # A picture tensor of one sample may happen to be as long as its text; it is one only where all agree.
        if all(runs for _, runs in rows) and len(rows) == len(items):
            fill = pad_token if key == "input_ids" else IGNORED if key == "labels" else 0
            tensors = [_pad_sequence(value, longest, fill, side) for value, _ in rows]
        else:
            tensors = [value for value, _ in rows]
        batch[key] = torch.cat(_same_shape(tensors))
    return batch


def _runs_along(value: Tensor, ids: Tensor) -> bool:
    return value.dim() >= 2 and value.shape[:2] == ids.shape


def _pad_sequence(value: Tensor, length: int, fill: int, side: str) -> Tensor:
    missing = length - value.shape[1]
    ends = (missing, 0) if side == "left" else (0, missing)
    return nn.functional.pad(value, (0, 0) * (value.dim() - 2) + ends, value=fill)


def _same_shape(tensors: list[Tensor]) -> list[Tensor]:
    if len({t.shape[1:] for t in tensors}) == 1:
        return tensors
    size = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
    return [
        nn.functional.pad(t, [n for d in range(t.dim() - 1, 0, -1) for n in (0, size[d - 1] - t.shape[d])])
        for t in tensors
    ]


def shorten(item: Item, pictures: Sequence[Tensor], most: int, where: str, *, answers: bool) -> dict[str, Tensor]:
    """A sample cut to its first `most` tokens.

    Args:
        pictures: for each picture or video, the positions that stand for it, bool [T]; they are never cut.
        answers: whether it is to be learned; a prompt cannot be cut.

    Raises `DataError`, naming `where`, when a picture or video would be cut or no token of an answer would be left.
    """
    shape = item["input_ids"].shape
    shown = int((item["token_kinds"] == IMAGE).sum())
    told = (
        f"{where}: it is {shape[1]} tokens long"
        + (f", {shown} of them for pictures and videos," if shown else "")
        + " and "
    )
    mend = "raise max_length, show smaller or fewer pictures or frames, or shorten the text"
    if not answers:
        raise DataError(f"{told}max_length is {most}; a question cannot be cut: {mend}")
    if any(bool(taken[most:].any()) for taken in pictures):
        raise DataError(f"{told}cutting it to max_length {most} would cut a picture or video: {mend}")
    if not bool((item["labels"][:, 1:most] != IGNORED).any()):
        raise DataError(f"{told}cutting it to max_length {most} would leave nothing of an answer: {mend}")
    return {key: value[:, :most] if _runs_along(value, item["input_ids"]) else value for key, value in item.items()}


def lengths(items: Sequence[Item]) -> list[int]:
    """Tokens of each sample, pictures' placeholders included."""
    return [int(item["input_ids"].shape[1]) for item in items]


def length_grouped(
    indices: Sequence[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Batches of like length in random order, every index once.

    The indices are shuffled, cut into stretches of 50 batches, and each stretch is sorted by length: batches need little
    padding, yet who shares a batch with whom changes from epoch to epoch. The longest batch comes first, so that memory
    that does not suffice shows at once.

    Args:
        indices: what is to be batched. lengths: length of each, in the same order. batch_size: at least 1.
        generator: for the order.

    >>> [sorted(batch) for batch in length_grouped([7, 8, 9], [5, 1, 5], 2, torch.Generator().manual_seed(0))]
    [[7, 9], [8]]
    """
    if batch_size < 1:
        raise KeepLoraError(f"batch_size is {batch_size}; it must be at least 1")
    if len(indices) != len(lengths):
        raise KeepLoraError(f"{len(indices)} indices but {len(lengths)} lengths")
    order = torch.randperm(len(indices), generator=generator).tolist()
    stretch = 50 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), stretch):
        chosen = sorted(order[start : start + stretch], key=lambda i: -lengths[i])
        batches += [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    if mixed:
        first = max(range(len(mixed)), key=lambda i: max(lengths[j] for j in mixed[i]))
        mixed[0], mixed[first] = mixed[first], mixed[0]
    return [[indices[i] for i in batch] for batch in mixed]
