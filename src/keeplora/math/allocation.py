"""A budget shared out over layers: the most value, direction by direction (beyond the paper, docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def allot(values: Sequence[Tensor], costs: Sequence[int], budget: int, least: int = 0) -> list[int]:
    """How many of its leading directions each layer gets, so that their values add up to the most that ``budget`` buys.

    Directions are taken in the order of their value per cost, over all layers, each that still fits. Values fall within a layer,
    so that what a layer gets are its leading ones; where all costs are equal no other choice has more value, and otherwise none
    has more by as much as one direction.

    Args:
        values: per layer (m,), ≥ 0 and falling: what each direction is worth. costs: per layer, ≥ 1: what one direction costs.
        budget: most that all may cost. least: directions that every layer gets in any case, where it has as many.

    Returns:
        One count per layer, from min(least, m) to m. Of equal values the layer that comes first gets its own.

    Raises:
        ValueError: what every layer gets in any case is over the budget.

    >>> allot([torch.tensor([5.0, 1.0]), torch.tensor([4.0, 3.0, 2.0])], [1, 1], 3)
    [1, 2]
    """
    counts = [min(least, len(v)) for v in values]
    room = budget - sum(n * cost for n, cost in zip(counts, costs, strict=True))
    if room < 0:
        raise ValueError(f"{least} directions in every layer cost {budget - room}, more than the budget of {budget}")
    rest = [v[n:].to(torch.float64) for v, n in zip(values, counts, strict=True)]
    if not any(len(v) for v in rest):
        return counts
    owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(rest)])
    cost = torch.tensor(list(costs))[owner]
    order = torch.argsort(torch.cat(rest) / cost, descending=True, stable=True)
    owner, cost = owner[order], cost[order]
    fits = cost.cumsum(0) <= room
    room -= int(cost[fits].sum())
    for i in torch.nonzero(~fits).flatten().tolist():  # too wide for what was left; a narrower one may not be
        if room < min(costs):
            break
        if int(cost[i]) <= room:
            fits[i] = True
            room -= int(cost[i])
    more = torch.bincount(owner[fits], minlength=len(counts)).tolist()
    return [n + m for n, m in zip(counts, more, strict=True)]
