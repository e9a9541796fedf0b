"""Which directions stay protected when a memory budget leaves no room for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math.complement import held_bytes


@dataclass(frozen=True)
class Candidates:
    """One layer's directions.

    Attributes:
        n_in: width. fixed: dimensions that stay in any case (U₀ first of all).
        values: (m,), ≥ 0: what each of the other directions protects.
    """

    n_in: int
    fixed: int
    values: Tensor

    @property
    def least(self) -> int:
        """Bytes that no choice goes below: the fixed directions alone, or all of them by their complement."""
        return min(held_bytes(self.n_in, self.fixed), self.whole)

    @property
    def whole(self) -> int:
        """Bytes of all directions together."""
        return held_bytes(self.n_in, self.fixed + len(self.values))


def keep_most_valuable(layers: Sequence[Candidates], budget: int) -> list[Tensor]:
    """Per layer, which of its directions to keep so that all layers together cost at most ``budget`` bytes.

    Where everything fits, everything stays. Else directions are kept in the order of their value per byte, over all layers.
    A layer past half its width is held by its complement, where a direction less costs bytes instead of sparing them: such a
    layer stays whole or competes direction by direction. The layers that stay whole are those of the highest value per byte
    it takes, as many of them as keeps the most value in all.

    Returns:
        one bool tensor (m,) per layer. Equal values are kept in the order in which they are given.

    Raises:
        ValueError: not even the fixed directions fit.

    >>> keep_most_valuable([Candidates(8, 1, torch.tensor([0.5, 0.1])), Candidates(4, 1, torch.tensor([0.2]))], 96)
    [tensor([ True, False]), tensor([True])]
    """
    needed = sum(layer.least for layer in layers)
    if needed > budget:
        raise ValueError(f"the directions that stay in any case take {needed} bytes, more than the budget of {budget}")
    if sum(layer.whole for layer in layers) <= budget:
        return [torch.ones(len(layer.values), dtype=torch.bool) for layer in layers]
    value = torch.cat([layer.values.to(torch.float64) for layer in layers])
    owner = torch.cat([torch.full((len(layer.values),), i) for i, layer in enumerate(layers)])
    cost = torch.tensor([4 * layer.n_in for layer in layers])[owner]
    order = torch.argsort(value / cost, descending=True, stable=True)

    fixed = [held_bytes(layer.n_in, layer.fixed) for layer in layers]
    free = {i for i, layer in enumerate(layers) if layer.whole <= fixed[i]}  # whole is the cheapest they can be
    past_half = [
        i for i, layer in enumerate(layers) if 2 * (layer.fixed + len(layer.values)) > layer.n_in and i not in free
    ]
    past_half.sort(key=lambda i: -float(layers[i].values.sum()) / (layers[i].whole - fixed[i]))
    best: tuple[float, int] | None = None
    for count in range(len(past_half) + 1):
        found = _fill(layers, free | set(past_half[:count]), budget, value, owner, cost, order)
        if found is None:
            break
        gained = float(value[found].sum())
        if best is None or gained >= best[0]:
            best = (gained, count)
    assert best is not None  # with no layer whole but the free ones, `needed` bytes are enough
    kept = _fill(layers, free | set(past_half[: best[1]]), budget, value, owner, cost, order)
    assert kept is not None
    return [kept[owner == i] for i in range(len(layers))]


def _fill(
    layers: Sequence[Candidates],
    whole: set[int],
    budget: int,
    value: Tensor,
    owner: Tensor,
    cost: Tensor,
    order: Tensor,
) -> Tensor | None:
    """The directions of the ``whole`` layers, and the most valuable of the others in what is left; None if nothing is."""
    room = budget - sum(
        layer.whole if i in whole else held_bytes(layer.n_in, layer.fixed) for i, layer in enumerate(layers)
    )
    if room < 0:
        return None
    is_whole = torch.zeros(len(layers), dtype=torch.bool)
    is_whole[list(whole)] = True
    kept = is_whole[owner]
    competing = order[~kept[order]]
    fits = cost[competing].cumsum(0) <= room
    kept[competing[fits]] = True
    room -= int(cost[competing[fits]].sum())
    for i in competing[~fits].tolist():  # the next is too wide for what is left; a narrower one may not be
        if room < 4 * min(layer.n_in for layer in layers):
            break
        if int(cost[i]) <= room:
            kept[i] = True
            room -= int(cost[i])
    return kept
