"""The sections of `all.py`: what each measures, by the functions of the benchmark that has the subject to itself."""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import boundary
import data_path
import machine
import ranks
import sketch
import step
import step_works
import straightforward as plain
import torch
import works
from table import Budget, Row, attempt, number, pair

from keeplora.models.assets import embedded_path

MODELS = ("clip", "llama", "demo")
SINE = 1e-3
NOISE = 0.02
"""How far above 1.00 the median of two equal things may lie."""


class NotHere(Exception):
    """A unit of work that cannot be done here, which is no fault; why, as a sentence."""


@dataclass
class Bench:
    """What the sections are run with.

    Attributes:
        rounds: most repeats of a pair. cpu: whether seconds are the processor's. quick: narrow models. batch: of a step, None:
            each model's own.
    """

    device: torch.device
    dtype: str
    budget: Budget
    rounds: int = 5
    cpu: bool = False
    quick: bool = False
    batch: int | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def few(self, share: float = 1.0) -> Iterator[int]:
        """Repeats of a pair that takes minutes."""
        return self.budget.repeats(min(3, self.rounds), share)

    def many(self, share: float = 1.0) -> Iterator[int]:
        return self.budget.repeats(self.rounds, share)


@dataclass(frozen=True)
class Section:
    """``run(bench, model)`` for each of ``models``; what is none of `MODELS` is run whichever of them are asked for.

    weight: its seconds beside the other sections', roughly.
    """

    run: Callable[[Bench, str], list[Row]]
    models: tuple[str, ...]
    weight: float = 1.0


def need_demo(model: str) -> None:
    if model == "demo" and not embedded_path().is_dir():
        raise NotHere("the demo's model is not in the cache: run `keeplora assets fetch`")


# ---- boundary --------------------------------------------------------------------------------------------------------

WORKS = {"clip": "vit", "llama": "llama", "demo": "demo"}
STOP = {"statistics_tolerance": 0.1}
BLOCKS = 12
"""Blocks of a tower of clip and llama; the demo's model is what it is."""


def scale_of(bench: Bench, model: str) -> works.Scale:
    """On a GPU more samples and larger batches, which fill it."""
    if bench.quick:
        return works.Scale(samples=16, batch=8, layers=1, small=True, device=bench.device)
    scale = works.Scale(device=bench.device)
    if bench.cuda:
        scale = replace(scale, samples=128, batch=32)  # ends after 64 at the earliest
    return scale


def trial(bench: Bench, model: str, scale: works.Scale) -> tuple[int, boundary.Compared | None]:
    """Of 12 blocks, as many as one repeat has time for, by a run of one block. Where even that has no time to be run again: 1,
    and what the run found."""
    if model == "demo" or bench.quick or bench.budget.left is None:
        return scale.layers, None
    work = works.MODELS[WORKS[model]](replace(scale, layers=1))
    warm_up(work)
    started = time.perf_counter()
    found = boundary.compared(f"{model}, one block", work, [0], {})
    took = time.perf_counter() - started
    # A part of what is left is for the row of the stop: another of our sides, or of both with more samples and fewer blocks.
    blocks = int(0.6 * bench.budget.left / took)
    return max(1, min(BLOCKS, blocks)), None if blocks else found


def run_boundary(bench: Bench, model: str) -> list[Row]:
    need_demo(model)
    boundary.CPU = bench.cpu
    scale = scale_of(bench, model)
    layers, tried = trial(bench, model, scale)
    scale = replace(scale, layers=layers)
    work = works.MODELS[WORKS[model]](scale)
    warm_up(work)
    shared = scale.samples >= 128  # then the stop has something to save in this work, too
    note = f"{scale.samples} samples" + ("" if model == "demo" else f", blocks a tower: {scale.layers}")
    if bench.cuda:
        note += "; float32"
    found = tried or boundary.Compared()
    stopped: list[boundary.Side] = []
    for n in bench.few(0.9 if shared else 0.6) if tried is None else (0,):
        if tried is None:
            boundary.compared(model, work, [n], {}, found)
        if shared:
            stopped.append(lean(boundary.ours(work, STOP)))
    rows = []
    for phase, what, aim, told in (
        (boundary.ALGEBRA, "linear algebra", 1 / 6, "≤ 1/6"),
        (boundary.PASSES, "passes over the data", 0.4, "≤ 0.4"),
        (boundary.WHOLE, "whole", 0.25, "≤ 0.25"),
    ):
        rows.append(pair("boundary", model, what, *found.seconds(phase), aim=aim, told=told, note=note))
    if bench.cuda:
        apart, other = "linear algebra, ours on the CPU's cores", found.seconds(boundary.ALGEBRA)[1]
        rows.append(attempt("boundary", model, apart, lambda: on_the_cpu(work, model, apart, other, note)))
    rows.append(pair("boundary", model, "peak memory", *found.peaks(), unit="GiB", note=note))
    rows += [
        Row("boundary", model, f"largest sine, {kind}", SINE, "≤ 1e-3", [sine], note="no ratio")
        for kind, sine in found.distance.items()
    ]
    what = "whole, with the stop"
    return [*rows, attempt("boundary", model, what, lambda: with_the_stop(bench, model, what, scale, found, stopped))]


def with_the_stop(
    bench: Bench, model: str, what: str, scale: works.Scale, found: boundary.Compared,
    stopped: Sequence[boundary.Side],
) -> Row:  # fmt: skip
    """Of the same work where that has samples enough, else of more: a pass can stop after 64 at the earliest."""
    plain_seconds = found.seconds(boundary.WHOLE)[1]
    if not stopped:
        more = 96 if bench.quick else 128
        layers = scale.layers if bench.budget.left is None else max(1, scale.layers * scale.samples // (2 * more))
        scale = replace(scale, samples=more, layers=layers)
        work = works.MODELS[WORKS[model]](scale)
        stopped, plain_seconds = [], []
        for _ in bench.few():
            gc.collect()
            stopped.append(lean(boundary.ours(work, STOP)))
            gc.collect()
            plain_seconds.append(lean(boundary.straightforward(work, {})).seconds[boundary.WHOLE])
    used = stopped[0].used
    note = f"{scale.samples} samples, tolerance {STOP['statistics_tolerance']}: used {used}"
    note += "" if model == "demo" else f"; blocks a tower: {scale.layers}"
    seconds = [side.seconds[boundary.WHOLE] for side in stopped]
    return pair("boundary", model, what, seconds, plain_seconds, aim=0.1, told="≤ 0.1", note=note)


def lean(side: boundary.Side) -> boundary.Side:
    """Without its subspaces: only its figures are looked at again."""
    side.U0, side.A, side.added = {}, {}, {}
    return side


def warm_up(work: works.Work) -> None:
    """What a GPU loads at first use is loaded, and its kernels are chosen; a CPU needs the like of its pages."""
    M = torch.randn(128, 128, device=work.device)
    for dtype in (torch.float32, torch.float64):
        torch.linalg.svd(M.to(dtype))
        torch.linalg.qr(M.to(dtype))
        torch.linalg.eigh((M + M.T).to(dtype))
    if work.device.type == "cuda":
        model = work.make()
        plain.gradients(model, [], work.narrow[:1], work.loss)
        plain.gradients(model, [], work.wide[:1], work.loss)
        machine.synchronise()


def on_the_cpu(work: works.Work, model: str, what: str, other: Sequence[float], note: str) -> Row:
    """The same boundary with the layers of a model on a GPU decomposed on the CPU's cores."""
    sides = [lean(boundary.ours(work, {"linear_algebra": "cpu"})) for _ in other]
    seconds = [side.seconds[boundary.ALGEBRA] for side in sides]
    return pair("boundary", model, what, seconds, other, note="linear_algebra: cpu; " + note)


# ---- step and inference ----------------------------------------------------------------------------------------------

ARMS = ("floor", "lora", "ours")
PEAK, KEPT = "peak memory, to stock LoRA", "kept for the backward pass, to stock LoRA"


@contextmanager
def step_work(bench: Bench, model: str) -> Iterator[tuple[step_works.Work, argparse.Namespace]]:
    need_demo(model)
    options = argparse.Namespace(
        device=bench.device,
        dtype=bench.dtype,
        threads=torch.get_num_threads(),
        rank=None,
        layers=None,
        batch=bench.batch,
    )
    if bench.quick:
        options.layers, options.batch, options.tokens = 1, bench.batch or 2, 16
    elif bench.cuda:
        options.batch = bench.batch or {"clip": 256, "llama": 64, "demo": 256}[model]
        options.tokens = 512
    random.seed(0)
    yield step_works.prepared(model, options), options
    gc.collect()


def rate(work: step_works.Work, seconds: Mapping[str, Sequence[float]], arms: Mapping[str, str]) -> str:
    """Tokens or pictures a second of every arm."""
    told = ", ".join(f"{name} {work.count / median(seconds[arm]):,.0f}" for arm, name in arms.items())
    return f"{work.unit} a second: {told}"


def run_step(bench: Bench, model: str) -> list[Row]:
    with step_work(bench, model) as (work, options):
        steps = 1 if bench.quick else 6 if bench.cuda else 3
        taken = step.times(work, ARMS, bench.many(0.7), steps, bench.device, bench.cpu)
        tokens = f" of {options.tokens} tokens" if model == "llama" and hasattr(options, "tokens") else ""
        note = f"{bench.dtype}, rank {work.targets[0].r}" + (
            f", batch {options.batch}{tokens}" if options.batch else ""
        )
        ours, lora, floor = taken["ours"], taken["lora"], taken["floor"]
        speed = "; " + rate(work, taken, {"ours": "ours", "lora": "LoRA", "floor": "floor"}) if bench.cuda else ""
        memory: dict[str, Any] = {"aim": 0.8, "told": "≤ 0.80", "unit": "GiB", "note": note}

        def peak_row() -> Row:
            if bench.cuda or bench.quick:
                peaks = {arm: step.peak_bytes(work, arm, bench.device) for arm in ("lora", "ours")}
            else:  # resident memory is told from a process that has done nothing else
                peaks = step.peaks(work, ("lora", "ours"), options)
            return pair("step", model, PEAK, [peaks["ours"]], [peaks["lora"]], **memory)

        def kept_row() -> Row:
            kept = {}
            for arm in ("lora", "ours"):
                with step.opened(arm, work):
                    kept[arm] = machine.kept_bytes(work.loss, work.model)
            return pair("step", model, KEPT, [kept["ours"]], [kept["lora"]], **memory)

        return [
            pair("step", model, "time, to stock LoRA", ours, lora, aim=1.0, told="≤ 1.00", note=note + speed),
            pair("step", model, "time, to the floor", ours, floor, aim=1.25, told="≤ 1.25", note=note),
            attempt("step", model, PEAK, peak_row),
            attempt("step", model, KEPT, kept_row),
        ]


def run_inference(bench: Bench, model: str) -> list[Row]:
    with step_work(bench, model) as (work, _):
        found = step.serving(work, bench.many(), bench.device, bench.cpu)
        speed = rate(work, found, {"merged": "merged", "lora": "LoRA beside", "base": "base"}) if bench.cuda else ""
        note = "; ".join(filter(None, (f"{bench.dtype}, the same modules and no hook", speed)))
        return [
            pair("inference", model, "merged, to the base model", found["merged"], found["base"], aim=1 + NOISE,
                 told=f"1.00 (± {NOISE})", note=note),
            pair("inference", model, "merged, to LoRA left beside", found["merged"], found["lora"], note=bench.dtype),
        ]  # fmt: skip


# ---- data ------------------------------------------------------------------------------------------------------------


def run_data(bench: Bench, model: str) -> list[Row]:
    family = data_path.clip(bench.quick, device=bench.device)
    count = 4 if bench.quick else bench.batch or (64 if bench.cuda else data_path.PICTURES)
    classes = data_path.CLASSES
    full = data_path.objective_of(family, classes, data_path.PROMPT_TOKENS, bench.dtype)
    needed = data_path.objective_of(family, classes, None, bench.dtype)
    pixels = torch.randn(count, 3, 224, 224, device=bench.device)
    ways: dict[str, Callable[[], object]] = {
        "needed": data_path.step_of(family, needed, pixels, data_path.StepFeatures(family, None)),
        "full": data_path.step_of(family, full, pixels, None),
    }
    found = data_path.in_turn(ways, bench.many(), cpu=bench.cpu)
    note = f"{bench.dtype}, {count} pictures"
    return [
        pair("data", model, f"step with {classes} classes, to prompts of 77 tokens", found["needed"], found["full"],
             aim=0.5, told="≤ 1/2", note=note)
    ]  # fmt: skip


# ---- sketch ----------------------------------------------------------------------------------------------------------


def run_sketch(bench: Bench, model: str) -> list[Row]:
    width, tokens = (256, 32) if bench.quick else (4096, 8192 if bench.cuda else 512)
    rows = []
    for rank in (16,) if bench.quick else (16, 64):
        (cost,) = sketch.costs(width, (rank,), tokens, bench.many(0.5), device=bench.device)
        note = f"r {cost.rank}, l {cost.rows}: Z and Ψ, which layers of one height share; Z alone {number(cost.Z / cost.G)}"
        rows += [
            pair("sketch", f"{width} wide", f"memory of the gradient, r {cost.rank}", [cost.Z + cost.Psi], [cost.G],
                 aim=0.1, told="≤ 1/10", unit="GiB", note=note),
            pair("sketch", f"{width} wide", f"time of the pass, r {cost.rank}", cost.sketched, cost.exact,
                 note=f"{tokens} tokens a batch"),
        ]  # fmt: skip
    return rows


# ---- state -----------------------------------------------------------------------------------------------------------


def run_state(bench: Bench, model: str) -> list[Row]:
    """Two tasks are learned, and what `save_pretrained` then writes is weighed."""
    if bench.cuda:
        raise NotHere("bytes on the disk are the same whatever the device: measured with --device cpu")
    need_demo(model)
    scale = works.Scale(samples=8, batch=8, layers=1, small=True, device=bench.device)
    if not bench.quick:  # the ranks of what features add depend on the samples, hence as many as the boundary has
        scale = works.Scale(device=bench.device)
    work = works.MODELS[WORKS[model]](scale)
    with tempfile.TemporaryDirectory() as folder:
        base, whole, task = boundary.state_bytes(work, Path(folder) / "saved")
    note = f"{scale.samples} samples a task, r 16"
    return [
        pair("state", model, "ledger and adapters after two tasks, to the base model", [whole], [base], unit="GiB", note=note),
        pair("state", model, "what the second task added", [task], [base], unit="GiB", note=note),
    ]  # fmt: skip


# ---- ranks -----------------------------------------------------------------------------------------------------------


def run_ranks(bench: Bench, model: str) -> list[Row]:
    if bench.cuda:
        raise NotHere("processes meet by gloo on the CPU, whatever the device: measured with --device cpu")
    work = (8, 64, 1) if bench.quick else (64, 256, 4)
    one, two = [], []
    for _ in bench.few():
        two.append(ranks.measured(2, 1, work))
        one.append(ranks.measured(1, 2, work))
    names = {"before": "statistics before", "training": "training", "after": "statistics after", "the task": "the task"}
    return [
        pair("ranks", model, f"2 processes, to 1 of two threads: {told}", [r[phase] for r in two], [r[phase] for r in one],
             note=f"gloo, {work[0]} pictures")
        for phase, told in names.items()
    ]  # fmt: skip


# ---- fifty -----------------------------------------------------------------------------------------------------------


def run_fifty(bench: Bench, model: str) -> list[Row]:
    need_demo(model)
    boundary.CPU = bench.cpu
    count = 12 if bench.quick else 50
    if model == "demo":
        work = works.demo(works.Scale(samples=8 if bench.quick else 32, device=bench.device))
    else:
        work = works.vit(works.Scale(samples=16, batch=16, layers=2, small=True, device=bench.device))
    warm_up(work)
    found = boundary.sequence(work, count)
    note = f"protected dimensions of {found.total}: {found.dims[1]} and {found.dims[-1]}"
    return [
        pair("fifty", model, f"boundary of tasks {count - 4} to {count}, to tasks 2 to 6", found.late,
             [median(found.early)] * len(found.late), aim=1.1, told="≤ 1.1", note=note)
    ]  # fmt: skip


SECTIONS: dict[str, Section] = {
    "boundary": Section(run_boundary, MODELS, 12.0),
    "step": Section(run_step, MODELS, 3.0),
    "inference": Section(run_inference, MODELS),
    "data": Section(run_data, ("CLIP",)),
    "sketch": Section(run_sketch, ("one layer",)),
    "state": Section(run_state, MODELS, 2.0),
    "ranks": Section(run_ranks, ("a small tower",)),
    "fifty": Section(run_fifty, ("a small CLIP", "demo"), 3.0),
}
