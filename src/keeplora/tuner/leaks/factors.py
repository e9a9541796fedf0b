"""Leaks of the factors: of every task's update into U₀ and into what each earlier task had protected. Measured once each."""

from __future__ import annotations

import hashlib
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keeplora.math import factor_leaks
from keeplora.tuner.leaks.state import LayerState, as_factors

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner

Key = tuple[str, ...]
_known: weakref.WeakKeyDictionary[ContinualLearner, dict[Key, list[float]]] = weakref.WeakKeyDictionary()


def digest(X: Tensor) -> str:
    """A fingerprint of a tensor's values and shape."""
    data = X.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=16)
    found.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def leaks_by_basis(learner: ContinualLearner, states: dict[str, LayerState]) -> dict[tuple[str, int], list[float]]:
    """For each layer and task (its place in the history): leaks into U₀ and into each earlier task's increment.

    A task's factors and the directions before it stay what they are, so a figure is worked out once and then remembered,
    by the bytes it depends on: factors or bases that were changed since are measured again.
    """
    known = _known.get(learner, {})
    used: dict[Key, list[float]] = {}
    out: dict[tuple[str, int], list[float]] = {}
    for name, state in states.items():
        for i, update in enumerate(state.updates):
            if update is None:
                continue
            f = as_factors(update)
            U, widths = state.found_by(i)
            key = (digest(f.A), digest(f.B), *(digest(V) for V in U.split(widths, dim=1)))
            if key not in used:
                used[key] = known[key] if key in known else factor_leaks(f.B, f.A, U, widths)
            out[name, i] = used[key]
    _known[learner] = used
    return out
