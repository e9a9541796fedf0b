"""Which tower's updates cost the probes: the final models of the study with one tower's ΔW taken out.

    python benchmarks/tower_blame.py runs/study-demo-small/tuned/lora-seed* runs/study-demo-small/tuned/keeplora++-seed*

ΔW is summed over all tasks, and kept in both towers, in the vision tower alone, in the text tower alone, or in none.
Prints the mean over runs of each method: accuracy over the tasks (Last) and over the probes, in percent, and how far each
tower's target weights moved, ‖ΔW‖_F / ‖W₀‖_F.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from keeplora.data import TaskData
from keeplora.experiment import TrainedModel
from keeplora.experiment.config import load_config
from keeplora.experiment.objective import accuracy
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import Setup, prepare

KEPT = {"both": ("vision", "text"), "vision": ("vision",), "text": ("text",), "none": ()}


def mean_accuracy(model: TrainedModel, setup: Setup, group: list[TaskData]) -> float:
    values = [accuracy(model.family, t, setup.sets[t.name].test, setup.precision, 64) for t in group]
    return sum(values) / len(values)


def movement(model: TrainedModel, tower: str) -> float:
    """‖ΔW‖_F / ‖W₀‖_F over all targets of a tower, in percent."""
    store = model.learner.store
    names = [layer for layer in store.delta if layer.startswith(tower)]
    moved = sum(float(store.delta[layer].square().sum()) for layer in names)
    return 100 * (moved / sum(float(store.W0[layer].float().square().sum()) for layer in names)) ** 0.5


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    moved: dict[str, list[tuple[float, float]]] = {}
    setup = None
    for path in paths:
        model = TrainedModel(path, device="cpu")
        if setup is None:  # the pictures are the same for all runs of a study
            setup = prepare(load_config(RunDirectory(Path(path)).read_config()))
        store = model.learner.store
        full = store.snapshot()
        moved.setdefault(model.config.method, []).append((movement(model, "vision"), movement(model, "text")))
        for name, towers in KEPT.items():
            store.restore({layer: d for layer, d in full.items() if layer.split("_")[0] in towers})
            row = (mean_accuracy(model, setup, setup.tasks), mean_accuracy(model, setup, setup.probes))
            found.setdefault((model.config.method, name), []).append(row)
            print(f"{path} {name}: last {row[0]:.1f}, probe {row[1]:.1f}", flush=True)
    print("\n| method | ΔW kept in | n | last | probe |\n|--|--|--|--|--|")
    for (method, name), rows in found.items():
        last, probe = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        print(f"| {method} | {name} | {len(rows)} | {last:.1f} | {probe:.1f} |")
    print("\n| method | vision tower moved by | text tower moved by |\n|--|--|--|")
    for method, rows in moved.items():
        vision, text = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        print(f"| {method} | {vision:.2f} % | {text:.2f} % |")


if __name__ == "__main__":
    main(sys.argv[1:])
