"""Linear CKA: what it must not see, what it must, and that wide features do not make it large."""

from __future__ import annotations

import pytest
import torch

from keeplora.analysis.likeness import linear_cka


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_rotation_scale_and_shift_are_no_drift():
    X = rows(40, 12, 0)
    Q = torch.linalg.qr(rows(12, 12, 1)).Q
    assert linear_cka(X, 5 * X @ Q + 1000) == pytest.approx(1.0, abs=1e-6)


def test_independent_features_are_unlike_however_wide_they_are():
    found = [linear_cka(rows(32, 2048, 2 * i), rows(32, 2048, 2 * i + 1)) for i in range(8)]
    assert abs(sum(found) / len(found)) < 0.05  # the biased estimate is near 1 here


def test_the_more_noise_the_less_alike():
    X = rows(64, 16, 0)
    found = [linear_cka(X, X + scale * rows(64, 16, 1)) for scale in (0.0, 0.5, 2.0, 8.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1.0)
    assert found[-1] < 0.3


def test_too_few_samples_or_no_variation_is_no_number():
    assert linear_cka(rows(3, 4, 0), rows(3, 4, 1)) is None
    assert linear_cka(torch.ones(8, 4), rows(8, 4, 1)) is None


def test_rows_must_be_the_same_samples():
    with pytest.raises(ValueError, match="row i of both"):
        linear_cka(rows(5, 2, 0), rows(6, 2, 0))
