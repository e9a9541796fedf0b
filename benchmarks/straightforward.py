"""The task boundary as one writes it down first, to compare ours with: what the authors' public code does, in our own words.

- Weights: an exact SVD of every target's weight.
- Gradient: every weight of the model requires one, and all of them are held; class prompts padded to the context length (77).
- A: exact SVD of G (I − U Uᵀ).
- Features: the inputs of every target, held whole, target by target (q, k and v hold the same tensor three times).
- Feature subspaces: exact SVD of the stacked features without their part in U.

Where the authors' code differs from the equations (METHOD: output-side vectors, one rank short, features averaged slot by slot)
this follows the equations, so that both sides find the same subspaces. All in float32, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Masks = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Per tower's prefix ("" is any), which positions count."""


def rank_for(squares: Tensor, energy: float, total: float, already: float = 0.0) -> int:
    """The smallest number of ``squares`` (falling) that together with ``already`` reach ``energy`` · ``total``."""
    if already >= energy * total:
        return 0
    reached = already + torch.cumsum(squares.double(), 0) >= energy * total * (1 - 1e-6)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(squares)


def weight_subspaces(model: nn.Module, energies: Mapping[str, float]) -> dict[str, Tensor]:
    """U₀ (in, p) of every target."""
    out = {}
    for name, energy in energies.items():
        W = model.get_submodule(name).weight.detach()
        _, sigma, Rt = torch.linalg.svd(W, full_matrices=False)
        squares = sigma.square()
        out[name] = Rt[: rank_for(squares, energy, float(squares.sum()))].T.contiguous()
    return out


def gradients(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """G (out, in) of every target, the mean over the samples; the gradients of all the other weights are held as well."""
    flags = {p: p.requires_grad for p in model.parameters()}
    for p in flags:
        p.requires_grad_(True)
    total = 0
    for batch in batches:
        losses = loss(model, batch)
        losses.sum().backward()
        total += losses.numel()
    G = {name: model.get_submodule(name).weight.grad / total for name in names}
    for p, flag in flags.items():
        p.grad = None
        p.requires_grad_(flag)
    return G


def factors(G: Mapping[str, Tensor], U: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A (r, in) of every target."""
    out = {}
    for name, g in G.items():
        _, _, Yt = torch.linalg.svd(g - (g @ U[name]) @ U[name].T, full_matrices=False)
        out[name] = Yt[:rank]
    return out


@torch.no_grad()
def features(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any],
    masks: Masks, once: Callable[[str], bool],
) -> dict[str, Tensor]:  # fmt: skip
    """Inputs (rows, in) of every target.

    Args:
        once: whether a target's inputs count in the first batch alone: those of class prompts, which every batch repeats.
    """
    held: dict[str, list[Tensor]] = {name: [] for name in names}
    now: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if held[name] and once(name):
                return
            x = args[0]
            mask = next((m for prefix, m in now.items() if name.startswith(prefix) and m.shape == x.shape[:-1]), None)
            held[name].append(x[mask].clone() if mask is not None else x.flatten(0, -2).clone())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in held]
    for batch in batches:
        now = dict(masks(batch))
        forward(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in held.items()}


def feature_subspaces(
    X: Mapping[str, Tensor], U: Mapping[str, Tensor], energies: Mapping[str, float]
) -> dict[str, Tensor]:
    """What the features add to U, (in, m) per target."""
    out = {}
    for name, x in X.items():
        rest = x - (x @ U[name]) @ U[name].T
        _, sigma, Rt = torch.linalg.svd(rest, full_matrices=False)
        squares, total = sigma.square(), float(x.double().square().sum())
        m = rank_for(squares, energies[name], total, total - float(squares.double().sum()))
        out[name] = Rt[:m].T.contiguous()
    return out
