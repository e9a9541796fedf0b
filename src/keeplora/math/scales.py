"""Layer scales: shallow layers move less than deep ones (M6)."""

from __future__ import annotations

from collections.abc import Sequence

SCHEDULES = ("linear", "constant")
MEASURED = "measured"
"""A schedule that no formula gives: `measured_scales`."""

LEAST_RATIO = 1e-3
"""Smallest share of the largest drift that a drift is counted as, for γ = 0, which sets no bound."""


def layer_scales(L: int, gamma: float, schedule: str | Sequence[float] = "linear") -> list[float]:
    """One scale per transformer block of a tower, shallowest first (M6).

    Args:
        L: number of blocks in the tower, ≥ 1.
        gamma: γ in [0, 1], the scale of the shallowest block; 1 is KeepLoRA.
        schedule: "linear" (M6: γ + (1 − γ) · l / (L − 1)), "constant" (γ everywhere), or a list of L non-negative
            numbers, which is used as it is.

    Returns:
        L floats. With "linear" and L = 1 the scale is 1: a tower without depth has nothing to tell apart.

    >>> layer_scales(5, 0.5)
    [0.5, 0.625, 0.75, 0.875, 1.0]
    >>> layer_scales(1, 0.2)
    [1.0]
    """
    if L < 1:
        raise ValueError(f"L must be at least 1, got {L}")
    if not isinstance(schedule, str):
        scales = [float(value) for value in schedule]
        if len(scales) != L:
            raise ValueError(f"the schedule lists {len(scales)} scales but the tower has {L} blocks")
        if not all(0 <= value < float("inf") for value in scales):
            raise ValueError(f"layer scales must be finite and not negative, got {scales}")
        return scales
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie between 0 and 1, got {gamma!r}")
    if schedule == "constant":
        return [float(gamma)] * L
    if schedule != "linear":
        raise ValueError(f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}, or a list of {L} numbers")
    return [1.0 if L == 1 else gamma + (1 - gamma) * l / (L - 1) for l in range(L)]  # noqa: E741


def measured_scales(drifts: Sequence[float], linear: Sequence[float], gamma: float) -> list[float]:
    """Scales with which every block disturbs its tower's output alike, at the linear schedule's mean square.

    λ_l = κ / max(c_l, γ · max_j c_j), with κ such that Σ λ_l² is that of ``linear``. What moves the output most moves least; as
    on the straight line no scale is more than 1/γ times another, and γ = 1 is KeepLoRA.

    Args:
        drifts: c_l ≥ 0 per block, what a unit step of its B moves the output by. linear: M6's scales of the same blocks.
        gamma: γ in [0, 1].

    >>> [round(s, 3) for s in measured_scales([4.0, 1.0], [0.2, 1.0], 0.2)]
    [0.247, 0.989]
    """
    floor = max(gamma, LEAST_RATIO) * max(drifts)
    if not 0 < floor < float("inf"):
        raise ValueError(f"drifts must be finite, and one of them above 0, got {list(drifts)}")
    inverse = [1.0 / max(c, floor) for c in drifts]
    kappa = (sum(s * s for s in linear) / sum(i * i for i in inverse)) ** 0.5
    return [kappa * i for i in inverse]
