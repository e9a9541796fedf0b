"""Class prompts through a text tower: in batches of like length, so that few pads are computed, and of a bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from keeplora.models.dual_encoder import DualEncoder

# What one more batch costs, in tokens that could be computed instead. A CPU spends little on starting a layer. A GPU waits
# for the launches of a pass of so few tokens: about 10 ms forward and back, in which it computes some thousands of them
# (estimated from the kernels of a ViT-B/16's text tower, not measured).
_OVERHEAD = {"cpu": 64, "cuda": 8192}


def cut_by_length(lengths: Sequence[int], *, overhead: int, most: int | None = None) -> list[list[int]]:
    """Texts in batches for which (texts × longest, summed over the batches) + ``overhead`` × batches is least.

    Exact, by dynamic programming over the lengths that occur: a best partition never parts texts of one length, and never
    lets a text be joined by a longer and a shorter one without those between.

    Args:
        lengths: tokens of each text, without pads. overhead: what one more batch costs, in tokens.
        most: tokens of a batch, pads included; a batch above it is cut into equal ones, a single text never. None: no bound.

    Returns the indices of each batch's texts, from the shortest batch on. One batch keeps the texts in their order.

    >>> cut_by_length([3, 9, 3, 9], overhead=4)
    [[0, 2], [1, 3]]
    >>> cut_by_length([3, 9, 3, 9], overhead=40)
    [[0, 1, 2, 3]]
    >>> cut_by_length([3, 9, 3, 9], overhead=40, most=18)
    [[0, 2], [1, 3]]
    """
    sizes = sorted(set(lengths))
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    ends = [0] + [sum(length <= size for length in lengths) for size in sizes]
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # of the texts up to each length: the least cost, and where its last batch begins
    for j in range(1, len(ends)):
        best.append(min((best[i][0] + (ends[j] - ends[i]) * sizes[j - 1] + overhead, i) for i in range(j)))
    cuts = [len(ends) - 1]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    batches = []
    for start, end in pairwise(reversed(cuts)):
        part = order[ends[start] : ends[end]]
        room = len(part) if most is None else max(1, most // sizes[end - 1])
        count = -(-len(part) // room)  # as many as must be, as equal as can be
        batches += [part[len(part) * k // count : len(part) * (k + 1) // count] for k in range(count)]
    return [sorted(batches[0])] if len(batches) == 1 else batches


class PromptBatches:
    """How one set of tokenised prompts goes through a text tower.

    Args:
        text_batch: from `DualEncoder.tokenize`: each tensor [C, T]. lengths: tokens of each text that are no pads at its end.
        device: where the tower computes. most: tokens whose activations may be held at once for a backward pass; None: all.

    Attributes:
        batches: (indices [n], the tensors [n, longest of the batch]) of each batch.
        recompute: whether the prompts have more tokens than ``most``: then a batch's activations are not kept but computed
            again in the backward pass, which holds those of one batch at a time.
    """

    def __init__(
        self, text_batch: Mapping[str, Tensor], lengths: Sequence[int], device: torch.device, most: int | None = None
    ) -> None:
        overhead = _OVERHEAD.get(device.type, _OVERHEAD["cuda"])
        cut = cut_by_length(lengths, overhead=overhead, most=most)
        self.whole = text_batch
        self.batches: list[tuple[Tensor, dict[str, Tensor]]] = []
        for rows in cut:
            chosen, longest = torch.tensor(rows), max(lengths[i] for i in rows)
            self.batches.append((chosen, {key: value[chosen, :longest] for key, value in text_batch.items()}))
        tokens = sum(part["input_ids"].numel() for _, part in self.batches)
        self.recompute = most is not None and len(cut) > 1 and tokens > most

    def features(self, family: DualEncoder) -> Tensor:
        """Text features of all prompts in their order, [C, D], as `DualEncoder.text_features` gives them; differentiable.

        With `recompute` by gradient checkpointing (Chen et al., 1604.06174): one more forward pass of the prompts.
        """
        if len(self.batches) == 1:
            return family.text_features(self.whole)
        again = self.recompute and torch.is_grad_enabled()
        parts = [
            checkpoint(family.text_features, part, use_reentrant=False) if again else family.text_features(part)
            for _, part in self.batches
        ]
        order = torch.cat([chosen for chosen, _ in self.batches]).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]
