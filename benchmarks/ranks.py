"""One process of two threads against two processes of one thread each: the same task, the same batches, in turn.

    python benchmarks/ranks.py             # some three minutes on two cores
    python benchmarks/ranks.py --rounds 5

A vision transformer at random weights learns one task: statistics before (M2–M4), training steps, statistics after (M7, M8).
Seconds are of the slowest process. Printed are medians over the rounds, their spread, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.tuner import ranks

PHASES = ("before", "training", "after")
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class Classifier(nn.Module):
    """A CLIP vision tower with a linear read-out."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.manual_seed(0)
        self.tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, num_attention_heads=width // 64,
                image_size=112, patch_size=16,
            )
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(pixel_values=pixels).pooler_output)


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def learn(samples: int, width: int, blocks: int) -> dict[str, float]:
    """Seconds of each phase in this process."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(samples, 3, 112, 112, generator=generator), torch.arange(samples) % 10
    learner = ContinualLearner(Classifier(width, blocks), KeepLoraConfig(r=16, target_modules=TARGETS))
    _ = learner.U
    times = [time.perf_counter()]
    model = learner.start_task("task", DataLoader(TensorDataset(x, y), batch_size=16), losses)
    times.append(time.perf_counter())
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapped = DistributedDataParallel(model) if ranks.active() else model
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for start in range(0, samples, 16):
        mine = slice(start + ranks.rank(), min(start + 16, samples), ranks.size())
        optimizer.zero_grad()
        (losses(wrapped, (x[mine], y[mine])).sum() * ranks.size() / 16).backward()
        optimizer.step()
    times.append(time.perf_counter())
    learner.finish_task()
    times.append(time.perf_counter())
    return dict(zip(PHASES, (b - a for a, b in itertools.pairwise(times)), strict=True))


def member(rank: int, size: int, threads: int, folder: str, work: tuple[int, int, int]) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    Path(folder, f"{rank}.json").write_text(json.dumps(learn(*work)))
    if size > 1:
        dist.destroy_process_group()


def measured(size: int, threads: int, work: tuple[int, int, int]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(member, (size, threads, folder, work), nprocs=size)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    slowest = {phase: max(one[phase] for one in found) for phase in PHASES}
    return slowest | {"the task": sum(slowest.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    given = parser.parse_args()
    work = (given.samples, given.width, given.blocks)
    one, two = [], []
    for _ in range(given.rounds):
        one.append(measured(1, 2, work))
        two.append(measured(2, 1, work))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads by default, torch {torch.__version__}, {work=}\n")
    print("| | 1 process, 2 threads, s | 2 processes, 1 thread, s | ratio |\n| --- | ---: | ---: | ---: |")
    for phase in (*PHASES, "the task"):
        a, b = [r[phase] for r in one], [r[phase] for r in two]
        shown = [f"{statistics.median(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in (a, b)]
        print(f"| {phase} | {shown[0]} | {shown[1]} | {statistics.median(b) / statistics.median(a):.2f} |")


if __name__ == "__main__":
    main()
