"""What merging leaks in each precision: ten tasks in one layer, merged one by one or rounded once, at three sizes of update.

    python benchmarks/audit_dtypes.py [--width 1024] [--protected 512] [--tasks 10] [--rank 16] [--seed 0] [--json]

One layer W₀ (width × width) of normal entries as the base of each precision stores it, a random protected U, and tasks with
A = M4's factor of a random gradient and a random B, scaled so that the sum of all updates has the named size against W₀.
Printed: ‖(W − W₀) U‖_F / ‖W − W₀‖_F after all tasks, and what rounding W₀ + Σ sBA once causes by itself. Seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from keeplora.math import factor_leak, lora_delta, residual_factor, rounding_floor, weight_leak

SIZES = (0.12, 0.006, 0.001)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def factors(width: int, U: Tensor, tasks: int, rank: int, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """(B, A) per task: any B, and A in the residual space of U."""
    out = []
    for _ in range(tasks):
        A = residual_factor(torch.randn(width, width, generator=rng), U, rank)
        out.append((torch.randn(width, len(A), generator=rng), A))
    return out


def measure(width: int, protected: int, tasks: int, rank: int, seed: int) -> dict[str, object]:
    """The table's rows: per precision and size, leaks of successive merges and of one rounding, and the floor."""
    rng = torch.Generator().manual_seed(seed)
    W = torch.randn(width, width, generator=rng)
    U = torch.linalg.qr(torch.randn(width, protected, generator=rng, dtype=torch.float64)).Q.to(torch.float32)
    pairs = factors(width, U, tasks, rank, rng)
    deltas = [lora_delta(1.0, B, A) for B, A in pairs]
    size = float(sum(deltas).norm())  # type: ignore[union-attr]
    rows = []
    for name, dtype in DTYPES.items():
        W0 = W.to(dtype)
        for relative in SIZES:
            scale = relative * float(W0.float().norm()) / size
            step, total = W0, torch.zeros_like(W)
            for delta in deltas:
                step = (step.float() + scale * delta).to(dtype)
                total = total + scale * delta
            rows.append(
                {
                    "dtype": name, "relative": relative, "successive": weight_leak(step, W0, U),
                    "once": weight_leak((W0.float() + total).to(dtype), W0, U),
                    "floor": rounding_floor(W0, total, U, dtype),
                }
            )  # fmt: skip
    B, A = torch.cat([b for b, _ in pairs], dim=1), torch.cat([a for _, a in pairs])
    rounded = {name: factor_leak(B.to(dtype), A.to(dtype), U) for name, dtype in DTYPES.items()}
    return {"rows": rows, "adapter": rounded}


def main() -> None:
    """Measure and print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("width", 1024), ("protected", 512), ("tasks", 10), ("rank", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    started = time.perf_counter()
    found = measure(**options)
    if as_json:
        print(json.dumps(found))
        return
    print("| merged in | ‖ΔW‖/‖W₀‖ | ten merges, each rounded | W₀ + Σ sBA, rounded once | floor of one rounding |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in found["rows"]:  # type: ignore[attr-defined]
        figures = " | ".join(f"{row[key]:.2g}" for key in ("successive", "once", "floor"))
        print(f"| {row['dtype']} | {100 * row['relative']:g} % | {figures} |")
    adapter = ", ".join(f"{leak:.1g} in {name}" for name, leak in found["adapter"].items())  # type: ignore[attr-defined]
    print(f"\nThe adapter of all tasks, not merged: {adapter}. ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
