"""Leaks of weights as they are stored, and how far they moved the answers to protected inputs, in every precision.

For a precision q and a moment t (before the first task, after it, …) let W_t = round_q(W₀ + Σ_{i≤t} s_i B_i A_i) and
D = W_T − W_t, what the tasks since then did to the weights that q stores. D = Δ + E with Δ = Σ_{i>t} s_i B_i A_i exact and E
what rounding did. So the leak ‖D V‖/‖D‖ stands beside the floor ‖E V‖/‖Δ‖.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.math import factor_leak, forward_change
from keeplora.tuner.adapter import Factors, concatenate
from keeplora.tuner.leaks.rows import ExportRow
from keeplora.tuner.leaks.state import LayerState, as_factors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp32", "bf16", "fp16"; any other by torch's name.

    >>> dtype_name(torch.bfloat16), dtype_name(torch.float64)
    ('bf16', 'float64')
    """
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Depth:
    """How much of a layer is measured: against U₀ alone or every task's increment, with or without forward stability."""

    every_basis: bool = False
    stability: bool = False

    def moments(self, state: LayerState) -> list[int]:
        found = state.moments()
        return found if self.every_basis else [t for t in found if t == 0]


def merged_rows(
    state: LayerState, names: list[str | None], W0: Tensor, dtype: torch.dtype, depth: Depth, *, export: str,
    W: Tensor | None = None,
) -> list[ExportRow]:  # fmt: skip
    """Rows of weights in one dtype.

    Args:
        names: what each moment is called, as `Audit.bases`. W0: (out, in), as the base stores it.
        W: the weights in question; None: round(W₀ + Σ sBA), as a merged export has them.
    """
    moments = depth.moments(state)
    if not moments:
        return []
    last = _last(state)
    final = _rounded(W0, last, dtype)
    ours = final if W is None else W.detach().cpu().to(torch.float64)
    as_rounded = W is None or torch.equal(ours, final)
    answers = _Answers(state, W0) if depth.stability else None
    rows = []
    for t, total in enumerate(state.sums()):  # one sum at a time: each is as large as the weight
        if t not in moments:
            continue
        U, width = state.guarded(t)
        if not (depth.stability or width):
            continue
        U = (U if depth.stability else _tail(U, width)).to(torch.float64)
        now = _rounded(W0, total, dtype)
        D, change = ours - now, _minus(last, total)
        if not torch.isfinite(D).all():
            rows.append(ExportRow(export, dtype_name(dtype), state.name, names[t], None, None))
            continue
        DU = D @ U
        error = DU if as_rounded else (final - now) @ U
        error = error - change @ U
        random = worst = None
        if answers is not None:
            random, worst = forward_change(DU, answers.at(t))
        rows.append(
            ExportRow(
                export, dtype_name(dtype), state.name, names[t], _share(_tail(DU, width), D),
                _share(_tail(error, width), change), random, worst,
            )
        )  # fmt: skip
    return rows


def adapter_rows(
    state: LayerState, names: list[str | None], W0: Tensor, depth: Depth, *, export: str = "adapter",
    dtype: torch.dtype = torch.float32, held: Factors | None = None,
) -> list[ExportRow]:  # fmt: skip
    """Rows of an adapter beside the untouched base: nothing is rounded but s B, unless it is stored in fewer bits.

    Args:
        held: the adapter in question, s = 1; None: what an export holds, A stacked and s·B side by side.
    """
    answers = _Answers(state, W0) if depth.stability else None
    rows = []
    for t in depth.moments(state):
        U, width = state.guarded(t)
        if not (depth.stability or width):
            continue
        f = state.later_factors(t)
        assert f is not None
        rounded = Factors(f.A.to(dtype), f.B.to(dtype), 1.0)
        floor = None if dtype == torch.float32 else _adapter_leak(rounded, _tail(U, width))
        if held is not None:  # what it holds, less what had been learned until then
            before = concatenate([as_factors(u) for u in state.updates[:t] if u is not None])
            rounded = held if before is None else _without(held, Factors(before.A.to(dtype), before.B.to(dtype), 1.0))
        random = worst = None
        if answers is not None:
            random, worst = forward_change(_product(rounded, U), answers.at(t))
        leak = _adapter_leak(rounded, _tail(U, width))
        rows.append(
            ExportRow(
                export,
                dtype_name(dtype),
                state.name,
                names[t],
                leak,
                floor if leak is not None else None,
                random,
                worst,
            )
        )
    return rows


class _Answers:
    """W_t U of exact weights, without forming W_t: one whole product, then low-rank ones."""

    def __init__(self, state: LayerState, W0: Tensor) -> None:
        self.state = state
        self._base = W0.to(torch.float64)

    def at(self, t: int) -> Tensor:
        """(out, k) with U as it was at moment ``t``."""
        U, _ = self.state.guarded(t)
        return self._base @ U.to(torch.float64) + sum(
            _product(as_factors(u), U) for u in self.state.updates[:t] if u is not None
        )


def _without(held: Factors, before: Factors) -> Factors:
    A = torch.cat([held.A.to(torch.float64), before.A.to(torch.float64)])
    return Factors(A, torch.cat([held.B.to(torch.float64), -before.B.to(torch.float64)], dim=1), 1.0)


def _product(f: Factors, U: Tensor) -> Tensor:
    return f.s * (f.B.to(torch.float64) @ (f.A.to(torch.float64) @ U.to(torch.float64)))


def _adapter_leak(f: Factors, V: Tensor) -> float | None:
    return factor_leak(f.B, f.A, V) if V.shape[1] else None


def _last(state: LayerState) -> Tensor | float:
    total: Tensor | float = 0.0
    for value in state.sums():
        total = value
    return total


def _rounded(W0: Tensor, total: Tensor | float, dtype: torch.dtype) -> Tensor:
    """round(W₀ + Σ) in float64; without updates, the base as it would be stored in ``dtype``."""
    exact = W0.to(torch.float32) + total if isinstance(total, Tensor) else W0
    return exact.to(dtype).to(torch.float64)


def _minus(total: Tensor | float, before: Tensor | float) -> Tensor:
    assert isinstance(total, Tensor)
    return total.to(torch.float64) - (before.to(torch.float64) if isinstance(before, Tensor) else before)


def _tail(M: Tensor, width: int) -> Tensor:
    return M[:, M.shape[1] - width :]


def _share(part: Tensor, whole: Tensor) -> float | None:
    if part.shape[1] == 0:
        return None
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else 0.0
