"""The task boundary: ours against a straightforward one (straightforward.py), in turn, in one process, on the same work.

    python benchmarks/boundary.py                          # ViT-B/16, a 100 M decoder, the demo model; three repeats each
    python benchmarks/boundary.py --models vit --repeats 1 -o statistics_tolerance=0.1

Prints one table per model: seconds of every phase on both sides, the ratio (median, least and most over the repeats), peak
memory above what was resident before, and how far the subspaces lie apart (largest sine of a principal angle over the targets:
A's rows, U₀, what the features add; the smaller of the two inside the larger).

- vit: CLIP ViT-B/16 at random weights, 32 random pictures of 224² in two batches, 100 class prompts of 6 to 12 tokens; q, k, v
  and o of both towers, ε_w 0.85 / 0.2, ε_f 0.99, r 16 (preset mtil).
- llama: a LLaMA of 12 blocks, width 768 (100 M), random weights; 32 texts of 128 random tokens in two batches; the 7 linears of
  each block, ε_w 0.6, ε_f 0.99, r 16.
- demo: the embedded default on the first task of demo-small, 32 of its pictures.

``--tasks 50`` learns that many tasks one after another, on the demo model or, with ``--sequence chain``, on one so small that
nothing hides what grows; ``--floor`` has our passes beside the model's own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import machine as bench
import straightforward as plain
import torch
from machine import machine, ratios, spread
from torch import Tensor
from works import MODELS, SEQUENCES, Scale, Work

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.math.leak import spectral_norm
from keeplora.tuner import sketching as sketching_module
from keeplora.tuner import statistics as statistics_module
from keeplora.tuner.observers import quiet_model

CPU = False
"""Whether processor seconds are counted (--cpu)."""
ALGEBRA, PASSES, WHOLE = "linear algebra", "passes over data", "whole boundary"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    return bench.timed(work, cpu=CPU)


@dataclass
class Side:
    """What one run of one side took and found."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    U0: dict[str, Tensor] = field(default_factory=dict)
    A: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    used: str = "all samples"

    def close(self, algebra: Sequence[str], passes: Sequence[str]) -> Side:
        self.seconds[ALGEBRA] = sum(self.seconds[name] for name in algebra)
        self.seconds[PASSES] = sum(self.seconds[name] for name in passes)
        self.seconds[WHOLE] = self.seconds[ALGEBRA] + self.seconds[PASSES]
        return self


PHASES = ("weight subspaces", "gradient pass", "A", "feature pass", "feature subspaces")


@contextlib.contextmanager
def watched_passes() -> Iterator[dict[str, float]]:
    """Seconds in the gradient and in the feature pass of what is done inside."""
    passes = dict.fromkeys(("collect_gradients", "collect_features"), 0.0)

    def watched(name: str, take: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seconds, found = timed(lambda: take(*args, **kwargs))
            passes[name] += seconds
            return found

        return call

    with contextlib.ExitStack() as stack:
        for module, name in ((sketching_module, "collect_gradients"), (statistics_module, "collect_features")):
            stack.enter_context(mock.patch.object(module, name, watched(name, getattr(module, name))))
        yield passes


def ours(work: Work, options: Mapping[str, Any]) -> Side:
    model, side = work.make(), Side()
    before = bench.begin_peak(work.device)
    learner = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **{**work.config, **options}))
    side.seconds["weight subspaces"], U = timed(lambda: learner.U)
    with watched_passes() as passes:
        extra = {"feature_batches": work.feature_batches} if work.feature_batches is not None else {}
        opened, _ = timed(
            lambda: learner.start_task(
                "one", work.narrow, work.loss, forward_fn=work.forward, mask_fn=work.masks, **extra
            )
        )
        closed, record = timed(learner.finish_task)
    assert record is not None
    side.peak = bench.peak_since(before, work.device)
    if "statistics" in record.info:
        side.used = ", ".join(f"{told['samples']} for the {what}" for what, told in record.info["statistics"].items())
    side.seconds |= {
        "gradient pass": passes["collect_gradients"], "A": opened - passes["collect_gradients"],
        "feature pass": passes["collect_features"], "feature subspaces": closed - passes["collect_features"],
    }  # fmt: skip
    side.U0 = {t.name: U.start[t.name].basis() for t in learner.targets}
    side.A = {name: factors.A for name, factors in record.factors.items()}
    side.added = {name: record.basis[name] for name in record.basis}
    return side.close(("weight subspaces", "A", "feature subspaces"), ("gradient pass", "feature pass"))


def straightforward(work: Work, options: Mapping[str, Any]) -> Side:
    model, side = work.make(), Side()
    probe = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **work.config))
    targets = [t.name for t in probe.targets]
    energies = {t.name: probe.config.for_tower("energy_weights", t.tower) for t in probe.targets}
    kept = {t.name: probe.config.for_tower("energy_features", t.tower) for t in probe.targets}
    del probe
    before = bench.begin_peak(work.device)
    side.seconds["weight subspaces"], side.U0 = timed(lambda: plain.weight_subspaces(model, energies))
    side.seconds["gradient pass"], G = timed(lambda: plain.gradients(model, targets, work.wide, work.loss))
    side.seconds["A"], side.A = timed(lambda: plain.factors(G, side.U0, 16))
    side.seconds["feature pass"], X = timed(
        lambda: plain.features(model, targets, work.wide, work.forward, work.masks, work.once)
    )
    side.seconds["feature subspaces"], side.added = timed(lambda: plain.feature_subspaces(X, side.U0, kept))
    side.peak = bench.peak_since(before, work.device)
    return side.close(("weight subspaces", "A", "feature subspaces"), ("gradient pass", "feature pass"))


def largest_sine(one: Tensor, other: Tensor) -> float:
    """Of the largest principal angle between the spans of the columns, the smaller inside the larger."""
    device = other.device if one.device.type == "cpu" else one.device
    small, large = sorted((one.to(device).double(), other.to(device).double()), key=lambda M: M.shape[1])
    if small.shape[1] == 0:
        return 0.0
    return spectral_norm(small - large @ (large.T @ small))


def apart(one: Side, other: Side) -> dict[str, float]:
    """Per kind of subspace the largest sine over the targets."""
    return {
        "U₀": max(largest_sine(one.U0[n], other.U0[n]) for n in one.U0),
        "A": max(largest_sine(one.A[n].T, other.A[n].T) for n in one.A),
        "what the features add": max(largest_sine(one.added[n], other.added[n]) for n in one.added),
    }


@dataclass
class Compared:
    """Both sides run by run, without their subspaces, and how far those of the first runs lie apart."""

    ours: list[Side] = field(default_factory=list)
    plain: list[Side] = field(default_factory=list)
    distance: dict[str, float] = field(default_factory=dict)

    def seconds(self, phase: str) -> tuple[list[float], list[float]]:
        return [side.seconds[phase] for side in self.ours], [side.seconds[phase] for side in self.plain]

    def peaks(self) -> tuple[list[float], list[float]]:
        """Bytes."""
        return [float(side.peak) for side in self.ours], [float(side.peak) for side in self.plain]


def compared(
    name: str, work: Work, repeats: Iterable[int], options: Mapping[str, Any], found: Compared | None = None
) -> Compared:
    """Both sides of one model, in turn; added to ``found``, where that is given."""
    found = Compared() if found is None else found
    for repeat in repeats:
        for label, run, sides in (("ours", ours, found.ours), ("plain", straightforward, found.plain)):
            gc.collect()
            sides.append(run(work, options))
            told = f"{name}, repeat {repeat + 1}, {label}: {sides[-1].seconds[WHOLE]:.1f} s"
            print(told, file=sys.stderr, flush=True)
        if not found.distance:
            found.distance = apart(found.ours[0], found.plain[0])
        for side in (found.ours[-1], found.plain[-1]):  # only the times of a run are looked at again
            side.U0, side.A, side.added = {}, {}, {}
    return found


def compare(name: str, repeats: int, options: Mapping[str, Any]) -> str:
    """The table of one model."""
    found = compared(name, MODELS[name](Scale()), range(repeats), options)
    lines = ["", f"**{name}**", "", "| phase | ours, s | straightforward, s | ratio |", "|--|--|--|--|"]
    for phase in (*PHASES, ALGEBRA, PASSES, WHOLE):
        a, b = found.seconds(phase)
        lines.append(f"| {phase} | {spread(a)} | {spread(b)} | {spread(ratios(a, b), 3)} |")
    a, b = ([n / 2**30 for n in side] for side in found.peaks())
    lines.append(f"| peak memory, GiB | {spread(a)} | {spread(b)} | {spread(ratios(a, b), 3)} |")
    lines += ["", "largest sine of a principal angle: " + ", ".join(f"{k} {v:.1e}" for k, v in found.distance.items())]
    return "\n".join(lines)


def floors(name: str, repeats: int) -> str:
    """Our passes beside what they cannot go below: the model's own forward and backward pass, nothing collected. One batch."""
    work = MODELS[name](Scale())
    model = work.make()
    learner = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **work.config))
    batches = work.narrow[:1]
    shown = list(work.feature_batches or batches)[:1]
    first = {t.tower: t.name for t in reversed(learner.targets)}.values()  # where the backward pass may end

    def alone(backward: bool) -> None:
        handles = []
        if backward:
            leaf = lambda module, args, y: y.detach().requires_grad_(True).clone()  # noqa: E731
            handles = [learner.store.module(n).register_forward_hook(leaf) for n in first]
        with quiet_model(model), torch.set_grad_enabled(backward):
            for batch in batches if backward else shown:
                found = work.loss(model, batch) if backward else work.forward(model, batch)
                if backward:
                    found.sum().backward()
        for handle in handles:
            handle.remove()

    def gradient() -> Any:
        return sketching_module.collect_gradients(model, learner.targets, learner.store, batches, work.loss, work.masks)

    def features() -> Any:
        seen = [t for t in learner.targets if work.feature_batches is None or not work.once(t.name)]
        return statistics_module.collect_features(model, seen, learner.store, shown, work.forward, work.masks)

    lines = [
        "",
        f"**{name}: passes over one batch beside their floor**",
        "",
        "| pass | s | floor, s | ratio |",
        "|--|--|--|--|",
    ]
    for what, take, floor in (
        ("gradient", gradient, lambda: alone(True)), ("features (first batch's tower)", features, lambda: alone(False)),
    ):  # fmt: skip
        a, b = [], []
        for _ in range(repeats):
            a.append(timed(take)[0])
            b.append(timed(floor)[0])
        lines.append(f"| {what} | {spread(a)} | {spread(b)} | {spread(ratios(a, b), 3)} |")
    return "\n".join(lines)


@dataclass
class ManyTasks:
    """Boundaries of one task after another.

    Attributes:
        seconds: of each task's. passes: of it those over the data. dims: protected dimensions over all targets after each
            task, of ``total``.
    """

    seconds: list[float]
    passes: list[float]
    dims: list[int]
    total: int

    @property
    def early(self) -> list[float]:
        """Tasks 2 to 6."""
        return self.seconds[1:6]

    @property
    def late(self) -> list[float]:
        """The last five."""
        return self.seconds[-5:]


def sequence(work: Work, count: int, ledger: str | None = None) -> ManyTasks:
    """``count`` tasks on one model, each on inputs of its own.

    Args:
        ledger: a folder for the tasks, as every run has one; None: they stay in memory.
    """
    model = work.make()
    learner = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **work.config), ledger=ledger)
    seconds, sizes, phases = [], [], []
    draw = torch.Generator().manual_seed(2)
    for i in range(count):
        narrow = [work.renew(b, draw) for b in work.narrow]
        extra: dict[str, Any] = {}
        if work.feature_batches is not None:
            pictures = [{"pixel_values": b["pixel_values"]} for b in narrow]
            extra = {
                "feature_batches": [
                    *pictures,
                    {k: v for k, v in narrow[0].items() if k not in ("pixel_values", "labels")},
                ]
            }

        def before(i: int = i, narrow: Any = narrow, extra: Any = extra) -> Any:
            return learner.start_task(
                f"task {i}", narrow, work.loss, forward_fn=work.forward, mask_fn=work.masks, **extra
            )

        with warnings.catch_warnings(), watched_passes() as passes:
            warnings.simplefilter("ignore")  # that layers fill up
            opened, peft_model = timed(before)
            with torch.no_grad():  # as if B had been trained
                for p in peft_model.parameters():
                    if p.requires_grad:
                        p.copy_(1e-3 * torch.randn(p.shape, generator=draw).to(p.device))
            closed, _ = timed(learner.finish_task)
        seconds.append(opened + closed)
        phases.append(sum(passes.values()))
        sizes.append(sum(learner.U.dims().values()))
        print(f"task {i + 1}: {seconds[-1]:.2f} s, passes {phases[-1]:.2f}, U {sizes[-1]}", file=sys.stderr, flush=True)
    return ManyTasks(seconds, phases, sizes, sum(n for n, _ in learner.U.start_dims().values()))


def state_bytes(work: Work, folder: Path) -> tuple[int, int, int]:
    """Bytes of the base model, of ledger and adapters after two tasks, and of what the second of them added.

    Args:
        folder: new; they are written there.
    """
    model = work.make()
    base = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    learner = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **work.config))
    extra = {"feature_batches": work.feature_batches} if work.feature_batches is not None else {}
    sizes = []
    for name in ("one", "two"):
        learner.start_task(name, work.narrow, work.loss, forward_fn=work.forward, mask_fn=work.masks, **extra)
        learner.finish_task()
        saved = learner.save_pretrained(folder / name)
        sizes.append(sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()))
    return base, sizes[1], sizes[1] - sizes[0]


def many_tasks(name: str, count: int, ledger: str | None = None) -> str:
    """The table of a sequence: what the boundary of the last tasks takes beside that of the first."""
    found = sequence(SEQUENCES[name](Scale()), count, ledger)
    lines = [
        "", f"**{count} tasks on the {name} model, {'with a ledger' if ledger else 'in memory'}**", "",
        "| | tasks 2 to 6 | last five | ratio |", "|--|--|--|--|",
    ]  # fmt: skip
    rest = [whole - passes for whole, passes in zip(found.seconds, found.passes, strict=True)]
    for what, values in (("boundary", found.seconds), ("of it passes over data", found.passes), ("all else", rest)):
        late, early = statistics.median(values[-5:]), statistics.median(values[1:6])
        lines.append(f"| {what}, s (median) | {early:.2f} | {late:.2f} | {late / early:.2f} |")
    lines.append(f"| protected dimensions of {found.total} | {found.dims[1]} | {found.dims[-1]} | |")
    return "\n".join(lines)


def option(text: str) -> tuple[str, Any]:
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=50, help="length of the sequence; 0: none")
    parser.add_argument("--sequence", choices=sorted(SEQUENCES), default="demo", help="the model of --tasks")
    parser.add_argument("--floor", action="store_true", help="our passes beside the model's own, and nothing else")
    parser.add_argument("--ledger", action="store_true", help="the sequence of --tasks writes a ledger, as a run does")
    parser.add_argument(
        "-o", "--option", type=option, action="append", default=[], help="a setting of KeepLoraConfig, for ours"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="processor seconds: on a busy machine, with OMP_NUM_THREADS=1"
    )
    args = parser.parse_args(argv)
    global CPU
    CPU = args.cpu
    os.environ["KEEPLORA_NO_CACHE"] = "1"  # the bases of the weights are to be computed, on both sides
    print(machine() + (", processor seconds" if CPU else ""), flush=True)
    for name in args.models if args.floor else ():
        print(floors(name, args.repeats), flush=True)
    for name in () if args.floor else args.models:
        print(compare(name, args.repeats, dict(args.option)), flush=True)
    if args.tasks and not args.floor:
        with tempfile.TemporaryDirectory() as folder:
            print(many_tasks(args.sequence, args.tasks, f"{folder}/ledger" if args.ledger else None), flush=True)


if __name__ == "__main__":
    main()
