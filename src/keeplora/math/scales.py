"""Layer scales: shallow layers move less than deep ones (M6)."""

from __future__ import annotations

from collections.abc import Sequence

SCHEDULES = ("linear", "constant")


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
