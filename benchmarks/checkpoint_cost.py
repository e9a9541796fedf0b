"""What a checkpoint of the task under way costs: seconds to write and to read it, and bytes.

    python benchmarks/checkpoint_cost.py

Of adapters by their sizes alone, no model is loaded: the tests' tiny CLIP (rank 4), CLIP ViT-B/16 with q, k, v and o of both
towers at rank 16 (B trains; and A and B as in plain LoRA), and the same with the best epoch's copy. Prints the
median of five writes and reads.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from keeplora.experiment.checkpoint import Checkpoints, Identity
from keeplora.experiment.training_state import LoopState, take_snapshot

REPEATS = 5
TINY = [(32, 4, 8)]
"""(width, rank, linears)."""
CLIP_B16 = [(768, 16, 4 * 12), (512, 16, 4 * 12)]


def adapter(shapes: list[tuple[int, int, int]], trains_A: bool) -> tuple[list[str], list[torch.nn.Parameter], dict]:
    """Names, trained parameters and A of a model whose linears are square."""
    names, parameters, A = [], [], {}
    for width, rank, count in shapes:
        for i in range(count):
            name = f"tower{width}.layers.{i}.q_proj"
            A[f"learner/A/{name}"] = torch.randn(rank, width)
            for factor, shape in [("A", (rank, width))] * trains_A + [("B", (width, rank))]:
                names.append(f"{name}.lora_{factor}.default.weight")
                parameters.append(torch.nn.Parameter(torch.randn(shape)))
    return names, parameters, A


def measure(label: str, shapes: list[tuple[int, int, int]], *, trains_A: bool = False, best: bool = False) -> None:
    names, parameters, A = adapter(shapes, trains_A)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = LoopState(best=[p.detach().clone() for p in parameters] if best else None)
    who = Identity("task", 1, "", "", "", {}, "cpu")
    writes, reads, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for step in range(REPEATS):
            started = time.perf_counter()
            tensors, values = take_snapshot(state, names, parameters, optimizer)
            path = checkpoints.write(who, step, ({**tensors, **A}, values))
            writes.append(time.perf_counter() - started)
            started = time.perf_counter()
            assert checkpoints.read(who) is not None
            reads.append(time.perf_counter() - started)
            size = sum(file.stat().st_size for file in path.iterdir())
    trained = sum(p.numel() for p in parameters)
    print(
        f"{label:<34} {trained:>10,} trained {size / 1e6:>8.2f} MB   write {statistics.median(writes) * 1e3:>7.1f} ms   "
        f"read {statistics.median(reads) * 1e3:>7.1f} ms"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    measure("tiny CLIP of the tests, r 4", TINY)
    measure("CLIP ViT-B/16, r 16, B", CLIP_B16)
    measure("CLIP ViT-B/16, r 16, B, best epoch", CLIP_B16, best=True)
    measure("CLIP ViT-B/16, r 16, A and B", CLIP_B16, trains_A=True)
