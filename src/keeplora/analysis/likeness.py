"""How alike two representations of the same samples are: linear CKA without its bias (feature drift)."""

from __future__ import annotations

import torch
from torch import Tensor


def _centred(K: Tensor) -> Tensor:
    """The U-centred Gram matrix (Székely & Rizzo, 2014): its products are unbiased, the diagonal is 0."""
    n = K.shape[0]
    K = K - torch.diag(K.diagonal())
    rows = K.sum(0) / (n - 2)
    K = K - rows[:, None] - rows[None, :] + K.sum() / ((n - 1) * (n - 2))
    return K - torch.diag(K.diagonal())


def linear_cka(X: Tensor, Y: Tensor) -> float | None:
    """Centred kernel alignment of X (n, p) and Y (n, q), row i of both being sample i.

    1: equal up to rotation and scale; about 0: nothing in common. The plain estimator (Kornblith et al., ICML 2019) grows
    with the width where samples are few; this is the unbiased one (Nguyen, Raghu & Kornblith, ICLR 2021), which may fall a
    little below 0.

    Returns:
        None for fewer than four samples, or where one side does not vary.

    >>> X = torch.arange(12.0).reshape(6, 2) ** 2
    >>> round(linear_cka(X, 3 * X @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + 1), 6)
    1.0
    """
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"row i of both is sample i, but there are {X.shape[0]} and {Y.shape[0]} rows")
    if X.shape[0] < 4:
        return None
    X64, Y64 = (M.detach().to(torch.float64) for M in (X, Y))
    # The Gram matrix of centred rows: large means would cost digits.
    K, L = (_centred((M - M.mean(0)) @ (M - M.mean(0)).T) for M in (X64, Y64))
    xx, yy, xy = float((K * K).sum()), float((L * L).sum()), float((K * L).sum())
    if xx <= 0 or yy <= 0:
        return None
    return xy / (xx * yy) ** 0.5
