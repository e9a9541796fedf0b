"""Where B starts (M5): at zero, from the residual gradient, or at random.

    python benchmarks/b_start.py --suite demo-small --seeds 0 1 2 3 4 --output runs/b-start
    python benchmarks/differences.py docs/evidence/statistics.json runs/b-start/numbers.json     # beside B = 0

A start that is taken off W again (W − s B₀ A with B₀, as LoRA-GA does with A and B both trained) is no third way: A is frozen, so
the loss is the same function of s (B − B₀) A, and every optimiser that looks at gradients alone goes the same way from either
(`tests/math/test_theorems.py`). What is left to try moves the model before the first step:

- gradient: B₀ = −c G Aᵀ, a step of steepest descent in the residual (Prop 3.1);
- random: B₀ of independent normal numbers, what an arbitrary start does.

Both have entries of the same root mean square in every layer, --steps learning rates: as far as AdamW goes in so many steps.
Everything else is KeepLoRA++ as the suite has it. Runs go on where they were interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import study_runs
import torch
from study_runs import METRICS  # the sibling script: this folder is sys.path[0]
from torch import nn

from keeplora.experiment import Experiment, load_config
from keeplora.methods import get_method, method_names, register
from keeplora.tuner import ContinualLearner
from keeplora.tuner.options import option
from keeplora.tuner.statistics import task_gradients
from keeplora.tuner.task import OpenTask

BASE = "keeplora++"
STARTS = ("gradient", "random")


@dataclass(frozen=True)
class StartOptions:
    size: float = option(0.0, "Root mean square of B's entries before the first step.")


class FromGradient(ContinualLearner):
    """B₀ = −c G Aᵀ."""

    Options = StartOptions

    def _attach(self, task: OpenTask) -> nn.Module:
        model = super()._attach(task)
        if task.saved is None:  # a task that goes on has its B in its checkpoint
            adapter = task.adapter
            assert adapter is not None
            for name, direction in self.directions(task).items():
                rms = direction.square().mean().sqrt().clamp(min=1e-30)
                with torch.no_grad():
                    adapter.weights(name)[1].copy_(direction * (self.options.size / rms))
        return model

    def directions(self, task: OpenTask) -> dict[str, torch.Tensor]:
        """Per target that is adapted, where its B₀ points, (out, r')."""
        assert task.adapter is not None
        A = task.adapter.A0
        G = task_gradients(self, task)
        return {name: -G[name].to(torch.float32).cpu() @ A[name].T for name in A}


class AtRandom(FromGradient):
    """B₀ ~ N(0, 1), scaled alike."""

    def directions(self, task: OpenTask) -> dict[str, torch.Tensor]:
        assert task.adapter is not None
        draw = torch.Generator().manual_seed(self.config.seed * 10_007 + len(self.history))
        return {
            name: torch.randn(task.adapter.weights(name)[1].shape, generator=draw)
            for name in sorted(task.adapter.targets)
        }


LEARNERS = {"gradient": FromGradient, "random": AtRandom}


def run(values: Mapping[str, Any], start: str, steps: float, seed: int, output: Path) -> dict[str, Any]:
    """The results of a run as ``values`` have KeepLoRA++, with another start of B; begun, gone on with, or read."""
    name = f"{BASE}-b-{start}"
    register(replace(get_method(BASE), name=name, title=f"KeepLoRA++, B {start}", learner=LEARNERS[start]))
    if (output / "config.yaml").is_file():
        return Experiment.resume(output, quiet=True)
    own = load_config({**values, "method": BASE}, known_methods=method_names())  # a suite's own settings of this method
    changes = {
        **{f"tuner.{key}": value for key, value in own.tuner.model_dump(exclude={"options"}).items()},
        "tuner.options.size": steps * own.training.learning_rate, "training.learning_rate": own.training.learning_rate,
        "seed": seed, "output": str(output),
    }  # fmt: skip
    return Experiment(load_config({**values, "method": name}, changes, known_methods=method_names()), quiet=True).run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", default="demo-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=float, default=5.0, help="how far B starts, in learning rates an entry")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--output", type=Path, default=Path("runs/b-start"))
    given = parser.parse_args(arguments)
    cells: dict[tuple[str], dict[str, dict[str, float]]] = {}
    for seed in given.seeds:
        for start in given.starts:
            results = run({"suite": given.suite}, start, given.steps, seed, given.output / f"{start}-seed{seed}")
            metrics = {name: value for name in METRICS if (value := results["metrics"][name]) is not None}
            cells.setdefault((f"B {start}",), {})[f"{seed} 1"] = metrics
            study_runs.write(given.output / "numbers.json", ("variant",), cells)
            told = ", ".join(f"{METRICS[name]} {value:.1f}" for name, value in metrics.items())
            print(f"B {start}, seed {seed}: {told}", flush=True)


if __name__ == "__main__":
    main()
