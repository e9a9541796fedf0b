"""What a training step pays for its class prompts and its data: ratios of two ways, run in turn in one process.

    python benchmarks/data_path.py            # all tables, CLIP ViT-B/16 at random weights: half an hour on two cores
    python benchmarks/data_path.py step --rounds 5
    python benchmarks/data_path.py --small    # the same with small towers: a minute or two

step: an MTIL-like step, 16 pictures against 100 class prompts, LoRA of rank 16 on q, k, v and o of both towers with A frozen;
prompts padded to 77 tokens, to the longest, in batches of like length, and of a text tower that does not train.
classes: the text tower alone, forward and backward, with 397 prompts, whole and within a bound of tokens; what the backward
pass holds is the growth of the peak of resident memory, each way in a process of its own (Linux).
prefix: the most that sharing the five first tokens of "a photo of a" could save: the same prompts without them.
vision: new pictures for `VisionCache`, one by one and eight at a time.
wait: the share of an epoch's time in which the step waits for its pictures (JPEG, 640 x 480), by workers and by what is kept.

Seconds are the process's own (all threads, user and system), which the machine's other load changes less than the time of day;
those of `wait` are of the clock. A name has 1 to 6 tokens, drawn with the shares of SHARES, which are about those of MTIL's
class names in CLIP's tokens; which tokens does not matter to the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import machine as bench
import numpy as np
import torch
from machine import machine
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from keeplora.data import load_task
from keeplora.experiment.device import Precision
from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.order import ShuffledBatches
from keeplora.experiment.pictures import PictureTensors, TaskBatches, TensorCache, shuffled_loader
from keeplora.experiment.step_features import StepFeatures
from keeplora.models.clip import CLIP
from keeplora.models.prompts import PromptBatches
from keeplora.models.vision_cache import VisionCache

SHARES = {1: 0.5, 2: 0.32, 3: 0.12, 4: 0.04, 6: 0.02}
"""Tokens of a class name: the share of the classes."""
PICTURES, CLASSES, MANY = 16, 100, 397
PROMPT_TOKENS = 77
BOUND = 1024
"""Tokens of `training.prompt_tokens` in `classes`."""
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


class Words:
    """A tokenizer of one token for each word, which CLIP's is not; ids are arbitrary, and the end token is the highest."""

    model_max_length, padding_side, eos_token_id, pad_token_id = 77, "right", 49407, 49407

    def __call__(
        self, texts: str | list[str], padding: str | bool = False, max_length: int = 77, **_: Any
    ) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts)}
        rows = [self._ids(text) for text in texts]
        longest = max_length if padding == "max_length" else max(map(len, rows))
        return {
            "input_ids": [row + [self.pad_token_id] * (longest - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        }

    def _ids(self, text: str) -> list[int]:
        words = text.replace(".", " .").split()
        return [49406, *(sum(map(ord, word)) % 49000 for word in words), self.eos_token_id]


def names(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    sizes = generator.choice(list(SHARES), size=count, p=list(SHARES.values()))
    return [" ".join(f"{i}x{k}" for k in range(size)) for i, size in enumerate(sizes)]


def clip(small: bool, *, towers: tuple[str, ...] = ("vision", "text"), device: torch.device = bench.HOST) -> CLIP:
    """CLIP at random weights, with LoRA as KeepLoRA++ trains it in ``towers``."""
    torch.manual_seed(0)
    sizes = (SMALL, SMALL) if small else ({}, {})
    vision = {"patch_size": 16, "image_size": 224, **sizes[0]}
    config = CLIPConfig(text_config={"eos_token_id": 49407, **sizes[1]}, vision_config=vision)
    images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    with device:
        model = CLIPModel(config)
    family = CLIP(model, Words(), images)
    family.model.requires_grad_(False)
    chosen = "|".join(family.towers[tower] for tower in towers)
    lora = LoraConfig(r=16, target_modules=rf"({chosen}).*self_attn\.(q|k|v|out)_proj", init_lora_weights=True)
    inject_adapter_in_model(lora, family.model)
    for name, p in family.model.named_parameters():
        p.requires_grad_("lora_B" in name)
    return family


def objective_of(family: CLIP, count: int, width: int | None = None, precision: str = "fp32") -> TaskObjective:
    """Of ``count`` classes; ``width``: prompts padded to so many tokens, none of which is cut off."""
    task: Any = SimpleNamespace(name="classes", classes=names(count), templates=["a photo of a {}."])
    objective = TaskObjective(family, task, Precision(precision, family.device))
    if width is not None:
        rows = Words()(family.class_prompts(task.classes, task.templates), padding="max_length", max_length=width)
        objective.text_batch = {key: torch.tensor(value) for key, value in rows.items()}
    return objective


def in_turn(
    ways: dict[str, Callable[[], object]], rounds: int | Iterable[int], *, cpu: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way (of the processor, or ``cpu`` false: of the clock), one after another, ``rounds`` times after one that
    is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for n in range(rounds) if isinstance(rounds, int) else rounds:
        for name, way in ways.items():
            took, _ = bench.timed(way, cpu=cpu)
            print(f"round {n + 1} {name}: {took:.2f} s", file=sys.stderr, flush=True)
            seconds[name].append(took)
    return seconds


def table(title: str, seconds: dict[str, list[float]], unit: float = 1.0, per: str = "CPU s") -> None:
    """Medians, and of the ratios to the first way in the same round: median, least and largest."""
    base = next(iter(seconds))
    print(f"\n### {title}\n\n| way | {per} | ratio | least | largest |\n|--|--:|--:|--:|--:|")
    for name, values in seconds.items():
        ratios = [value / first for value, first in zip(values, seconds[base], strict=True)]
        print(
            f"| {name} | {median(values) * unit:.3g} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |",
            flush=True,
        )


# ---- step --------------------------------------------------------------------------------------------------------------


def step_of(family: CLIP, objective: TaskObjective, pixels: Tensor, steps: Any) -> Callable[[], None]:
    labels = torch.arange(len(pixels), device=pixels.device)
    batch = {"pixel_values": pixels, "labels": labels, **objective.text_batch}

    def step() -> None:
        objective._step = steps
        family.model.zero_grad(set_to_none=True)
        objective.part_loss(batch, len(pixels))[0].backward()

    return step


def step(small: bool, rounds: int) -> None:
    both, vision = clip(small), clip(small, towers=("vision",))
    pixels = torch.randn(PICTURES, 3, 224, 224)
    full, needed, fixed = objective_of(both, CLASSES, 77), objective_of(both, CLASSES), objective_of(vision, CLASSES)
    once = StepFeatures(vision, None)
    ways = {
        "prompts of 77 tokens": step_of(both, full, pixels, None),
        "padded to the longest": step_of(both, needed, pixels, None),
        "batches of like length": step_of(both, needed, pixels, StepFeatures(both, None)),
        "text tower does not train": step_of(vision, fixed, pixels, once),
    }
    found = in_turn(ways, rounds)
    lengths = both.text_lengths(needed.text_batch)
    cut = PromptBatches(needed.text_batch, lengths, both.device).batches
    computed = sum(part["input_ids"].numel() for _, part in cut)
    table(
        f"A step of {PICTURES} pictures and {CLASSES} prompts: {77 * CLASSES}, {max(lengths) * CLASSES} and {computed} tokens "
        f"in 1, 1 and {len(cut)} batches", found,
    )  # fmt: skip


# ---- classes -----------------------------------------------------------------------------------------------------------


def text_pass(family: CLIP, way: str) -> Callable[[], None]:
    batch = objective_of(family, MANY, 77 if way == "77" else None).text_batch
    lengths = [batch["input_ids"].shape[1]] * MANY if way in ("77", "whole") else family.text_lengths(batch)
    prompts = PromptBatches(batch, lengths, family.device, BOUND if way == "bound" else None)

    def run() -> None:
        family.model.zero_grad(set_to_none=True)
        prompts.features(family).sum().backward()

    return run


WAYS = {
    "77": "prompts of 77 tokens", "whole": "padded to the longest", "grouped": "batches of like length",
    "bound": f"at most {BOUND} tokens held, the rest again",
}  # fmt: skip


def resident(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its highest (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def growth(small: bool, way: str) -> float:
    run = text_pass(clip(small), way)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def classes(small: bool, rounds: int) -> None:
    family = clip(small)
    table(
        f"The text tower, forward and backward, {MANY} prompts",
        in_turn({told: text_pass(family, way) for way, told in WAYS.items()}, rounds),
    )
    print("\n| way | MiB held | ratio |\n|--|--:|--:|")
    first = 0.0
    for way, told in WAYS.items():
        command = [sys.executable, __file__, "--growth", way, *(["--small"] if small else [])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        first = first or found
        print(f"| {told} | {found:.0f} | {found / first:.2f} |", flush=True)


# ---- prefix ------------------------------------------------------------------------------------------------------------


def prefix(small: bool, rounds: int) -> None:
    family = clip(small)
    batch = objective_of(family, CLASSES).text_batch

    def through(text_batch: dict[str, Tensor]) -> Callable[[], None]:
        prompts = PromptBatches(text_batch, family.text_lengths(text_batch), family.device)

        def run() -> None:
            family.model.zero_grad(set_to_none=True)
            prompts.features(family).sum().backward()

        return run

    short = {key: value[:, 5:] for key, value in batch.items()}
    table(
        f"The text tower, {CLASSES} prompts: what a shared prefix could save at most",
        in_turn({"whole prompts": through(batch), "without the first 5 tokens": through(short)}, rounds),
    )


# ---- vision ------------------------------------------------------------------------------------------------------------


class OneByOne(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Any:
        return [self.tower(row) for row in pixel_values.split(1)]


def new_pictures(width: int, side: int, rounds: int) -> tuple[bool, dict[str, list[float]]]:
    """(whether eight together have the bits of each alone, seconds of eight new pictures)."""
    torch.manual_seed(0)
    own = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    tower: Any = CLIPModel(CLIPConfig(vision_config={"patch_size": 16, "image_size": side, **own})).vision_model.eval()
    cache, alone = VisionCache(tower), OneByOne(tower)
    with cache.active(), torch.no_grad():
        tower(torch.randn(8, 3, side, side))  # the trial
        ways: dict[str, Callable[[], object]] = {
            "one by one": lambda: alone(torch.randn(8, 3, side, side)),
            "eight at a time": lambda: tower(torch.randn(8, 3, side, side)),
        }
        return all(cache.memory._together.values()), in_turn(ways, rounds)


def vision(small: bool, rounds: int) -> None:
    sizes = {"a tower of 12 x 192, 64-pixel frames": (192, 64), "ViT-B/16, 224-pixel pictures": (768, 224)}
    for told, (width, side) in list(sizes.items())[: 1 if small else 2]:
        same, found = new_pictures(width, side, rounds)
        table(f"8 new pictures, {told} (same bits: {same})", found, 125.0, "CPU ms a picture")


# ---- wait --------------------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        (folder / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"class{i % 4}" / f"{i}.jpg", quality=90)


def epoch(batches: TaskBatches, step: Callable[[Tensor], None]) -> tuple[float, float]:
    """(seconds, share of them spent waiting)."""
    start, waited = time.perf_counter(), 0.0
    stream = iter(batches)
    while True:
        asked = time.perf_counter()
        batch = next(stream, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        step(batch["pixel_values"])
    seconds = time.perf_counter() - start
    return seconds, waited / seconds


def wait(small: bool, rounds: int) -> None:
    family = clip(True, towers=("vision",))  # a step that takes little more than its pictures do

    def step(pixels: Tensor) -> None:
        family.model.zero_grad(set_to_none=True)
        family.image_features(pixels).sum().backward()

    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), 64 if small else 256)
        task: Any = load_task({"name": "photographs", "source": "folder", "path": folder, "test": 0.1}, Path(folder))
        ways = {
            "no workers": (0, 2 << 30), "1 worker": (1, 2 << 30), "2 workers": (2, 2 << 30),
            "no workers, no room": (0, 0), "2 workers, no room": (2, 0),
        }  # fmt: skip
        found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (workers, room) in ways.items():
                data = PictureTensors(task.train, family, TensorCache(room))
                order = ShuffledBatches(len(data), PICTURES, 0)
                objective = objective_of(family, 4)
                brought = shuffled_loader(data, order, objective.collate, workers=workers)
                batches = TaskBatches(data, order, brought, objective.split)
                found[name].append([epoch(batches, step) for _ in range(2)])
    print(f"\n### Waiting for {len(task.train)} pictures, 16 a step\n")
    print("| way | first epoch, s | waiting | second epoch, s | waiting |\n|--|--:|--:|--:|--:|")
    for name, runs in found.items():
        parts = [f"{median(r[e][0] for r in runs):.2f} | {100 * median(r[e][1] for r in runs):.0f} %" for e in range(2)]
        print(f"| {name} | {' | '.join(parts)} |")


TABLES = {"step": step, "classes": classes, "prefix": prefix, "vision": vision, "wait": wait}


@contextlib.contextmanager
def told() -> Iterator[None]:
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}")
    yield
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all of them if none is named"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--growth", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.tables) - set(TABLES)):
        parser.error(f"no table {unknown[0]!r}: choose from {', '.join(TABLES)}")
    if options.growth:
        print(json.dumps(growth(options.small, options.growth)))
    else:
        with told():
            for name in options.tables or TABLES:
                TABLES[name](options.small, options.rounds)
