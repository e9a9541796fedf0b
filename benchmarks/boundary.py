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
from typing import Any
from unittest import mock

import machine as bench
import straightforward as plain
import torch
from machine import machine, ratios, reset_peak, resident, spread
from torch import Tensor, nn

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.tuner import sketching as sketching_module
from keeplora.tuner import statistics as statistics_module
from keeplora.tuner.observers import quiet_model

PROMPT_TOKENS = 77
CPU = False
"""Whether processor seconds are counted (--cpu)."""
ALGEBRA, PASSES, WHOLE = "linear algebra", "passes over data", "whole boundary"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    return bench.timed(work, cpu=CPU)


@dataclass
class Work:
    """One model and one task for both sides.

    Attributes:
        make: a new model, the same every time. narrow, wide: the batches that ours, and the straightforward side, go through.
        loss: (model, batch) to one loss per sample. forward: of the feature pass. feature_batches: ours.
        masks: which positions count. once: targets whose inputs are the same in every batch (class prompts). renew: a
            batch of another task.
    """

    make: Callable[[], nn.Module]
    config: dict[str, Any]
    narrow: list[Any]
    wide: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    forward: Callable[[nn.Module, Any], Any]
    masks: Callable[[Any], Mapping[str, Tensor]]
    feature_batches: Iterable[Any] | None = None
    once: Callable[[str], bool] = field(default=lambda name: False)
    renew: Callable[[Any, torch.Generator], Any] = field(default=lambda batch, draw: noisy(batch, draw))


def vit() -> Work:
    from transformers import CLIPConfig, CLIPModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = CLIPConfig(projection_dim=512, vision_config={"patch_size": 16})
        return CLIPModel(config).eval()

    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(32, 3, 224, 224, generator=draw)
    labels = torch.randint(100, (32,), generator=draw)
    lengths = torch.randint(6, 13, (100,), generator=draw).tolist()
    end = CLIPConfig().text_config.eos_token_id
    words = [[end - 1, *torch.randint(1, end - 1, (n - 2,), generator=draw).tolist(), end] for n in lengths]

    def prompts(width: int) -> dict[str, Tensor]:
        ids = torch.tensor([w + [end] * (width - len(w)) for w in words])
        mask = torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in words])
        return {"input_ids": ids, "attention_mask": mask}

    def batches(width: int) -> list[dict[str, Tensor]]:
        parts = [slice(0, 16), slice(16, 32)]
        return [{"pixel_values": pixels[p], "labels": labels[p], **prompts(width)} for p in parts]

    def loss(model: Any, batch: Any) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return nn.functional.cross_entropy(model(**inputs).logits_per_image, batch["labels"], reduction="none")

    def forward(model: Any, batch: Any) -> None:
        if "pixel_values" in batch:
            model.get_image_features(pixel_values=batch["pixel_values"])
        if "input_ids" in batch:
            model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def masks(batch: Any) -> dict[str, Tensor]:
        return {"text_model": batch["attention_mask"].bool()} if "attention_mask" in batch else {}

    narrow = batches(max(lengths))
    return Work(
        make, {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "energy_weights": {"vision": 0.85, "text": 0.2}},
        narrow, batches(PROMPT_TOKENS), loss, forward, masks,
        [*({"pixel_values": b["pixel_values"]} for b in narrow), prompts(max(lengths))], lambda name: "text" in name,
    )  # fmt: skip


def llama() -> Work:
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=8000,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    ids = torch.randint(8000, (32, 128), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids[:16]}, {"input_ids": ids[16:]}]

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")

    def forward(model: Any, batch: Any) -> None:
        model.model(input_ids=batch["input_ids"], use_cache=False)

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"target_modules": modules, "energy_weights": 0.6}
    return Work(make, config, batches, batches, loss, forward, lambda batch: {})


def demo() -> Work:
    from keeplora.experiment import load_config
    from keeplora.experiment.objective import TaskObjective
    from keeplora.experiment.setup import prepare
    from keeplora.methods import method_names

    setup = prepare(load_config({"suite": "demo-small", "method": "keeplora++"}, known_methods=method_names()))
    task, family = setup.tasks[0], setup.family
    data, objective = setup.sets[task.name].train, TaskObjective(family, task, setup.precision)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:32].tolist()
    items = [data[i] for i in chosen]
    pixels = torch.stack([item["pixel_values"] for item in items])
    labels = torch.tensor([int(item["labels"]) for item in items])

    def batches(width: int | None) -> list[dict[str, Tensor]]:
        text = dict(objective.text_batch)
        if width is not None:
            text = {k: nn.functional.pad(v, (0, width - v.shape[1])) for k, v in text.items()}
        return [
            {"pixel_values": pixels[p], "labels": labels[p], **text} for p in (slice(0, 16), slice(16, 32))
        ]  # fmt: skip

    start = {k: v.clone() for k, v in family.model.state_dict().items()}

    def make() -> nn.Module:
        family.model.load_state_dict(start)
        return family.model

    def forward(model: nn.Module, batch: Any) -> None:
        if "pixel_values" in batch:
            family.image_features(batch["pixel_values"])
        if "input_ids" in batch:
            family.text_features({k: v for k, v in batch.items() if k in objective.text_batch})

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = family.logits(
            family.image_features(batch["pixel_values"]),
            family.text_features({k: v for k, v in batch.items() if k in objective.text_batch}),
        )
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    def masks(batch: Any) -> dict[str, Tensor]:
        return {"text_model": batch["attention_mask"].bool()} if "attention_mask" in batch else {}

    narrow = batches(None)
    text = {k: narrow[0][k] for k in objective.text_batch}
    return Work(
        make, {"target_modules": family.default_target_modules, "energy_weights": {"vision": 0.85, "text": 0.2}}, narrow,
        batches(PROMPT_TOKENS), loss, forward, masks, [*({"pixel_values": b["pixel_values"]} for b in narrow), text],
        lambda name: "text" in name,
    )  # fmt: skip


def chain() -> Work:
    """Twelve linears of width 256 and 32 inputs of three dimensions that are new with every task, so that U fills up: what a
    boundary takes beside its passes and decompositions, which are small here."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Chain()

    config = {"target_modules": [f"layers.{i}" for i in range(12)], "energy_weights": 0.3}
    batch = {"x": torch.zeros(32, 256)}
    return Work(
        make, config, [batch], [batch], lambda m, b: m(b["x"]).square().mean(1), lambda m, b: m(b["x"]), lambda b: {},
        renew=lambda b, draw: {"x": torch.randn(32, 3, generator=draw) @ torch.randn(3, 256, generator=draw)},
    )  # fmt: skip


def noisy(batch: Any, draw: torch.Generator) -> Any:
    """Other pictures: noise on top, so that each task brings directions of its own."""
    return {
        **batch,
        "pixel_values": batch["pixel_values"] + 0.3 * torch.randn(batch["pixel_values"].shape, generator=draw),
    }


MODELS = {"vit": vit, "llama": llama, "demo": demo}
SEQUENCES = {"demo": demo, "chain": chain}


@dataclass
class Side:
    """What one run of one side took and found."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    U0: dict[str, Tensor] = field(default_factory=dict)
    A: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

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
    before = resident() if reset_peak() else 0
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
    side.peak = resident("VmHWM") - before
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
    before = resident() if reset_peak() else 0
    side.seconds["weight subspaces"], side.U0 = timed(lambda: plain.weight_subspaces(model, energies))
    side.seconds["gradient pass"], G = timed(lambda: plain.gradients(model, targets, work.wide, work.loss))
    side.seconds["A"], side.A = timed(lambda: plain.factors(G, side.U0, 16))
    side.seconds["feature pass"], X = timed(
        lambda: plain.features(model, targets, work.wide, work.forward, work.masks, work.once)
    )
    side.seconds["feature subspaces"], side.added = timed(lambda: plain.feature_subspaces(X, side.U0, kept))
    side.peak = resident("VmHWM") - before
    return side.close(("weight subspaces", "A", "feature subspaces"), ("gradient pass", "feature pass"))


def largest_sine(one: Tensor, other: Tensor) -> float:
    """Of the largest principal angle between the spans of the columns, the smaller inside the larger."""
    small, large = sorted((one.double(), other.double()), key=lambda M: M.shape[1])
    if small.shape[1] == 0:
        return 0.0
    rest = small - large @ (large.T @ small)
    return float(torch.linalg.matrix_norm(rest, ord=2))


def apart(one: Side, other: Side) -> dict[str, float]:
    """Per kind of subspace the largest sine over the targets."""
    return {
        "U₀": max(largest_sine(one.U0[n], other.U0[n]) for n in one.U0),
        "A": max(largest_sine(one.A[n].T, other.A[n].T) for n in one.A),
        "what the features add": max(largest_sine(one.added[n], other.added[n]) for n in one.added),
    }


def compare(name: str, repeats: int, options: Mapping[str, Any]) -> str:
    """The table of one model."""
    work = MODELS[name]()
    sides: dict[str, list[Side]] = {"ours": [], "plain": []}
    distance: dict[str, float] = {}
    for repeat in range(repeats):
        for label, run in (("ours", ours), ("plain", straightforward)):
            gc.collect()
            sides[label].append(run(work, options))
            print(
                f"{name} {repeat + 1}/{repeats} {label}: {sides[label][-1].seconds[WHOLE]:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        if not distance:
            distance = apart(sides["ours"][0], sides["plain"][0])
        for side in (sides["ours"][-1], sides["plain"][-1]):  # only the times of a run are looked at again
            side.U0, side.A, side.added = {}, {}, {}
    lines = ["", f"**{name}**", "", "| phase | ours, s | straightforward, s | ratio |", "|--|--|--|--|"]
    for phase in (*PHASES, ALGEBRA, PASSES, WHOLE):
        a, b = ([side.seconds[phase] for side in sides[label]] for label in ("ours", "plain"))
        lines.append(f"| {phase} | {spread(a)} | {spread(b)} | {spread(ratios(a, b), 3)} |")
    a, b = ([side.peak / 2**30 for side in sides[label]] for label in ("ours", "plain"))
    lines.append(f"| peak memory, GiB | {spread(a)} | {spread(b)} | {spread(ratios(a, b), 3)} |")
    lines += ["", "largest sine of a principal angle: " + ", ".join(f"{k} {v:.1e}" for k, v in distance.items())]
    return "\n".join(lines)


def floors(name: str, repeats: int) -> str:
    """Our passes beside what they cannot go below: the model's own forward and backward pass, nothing collected. One batch."""
    work = MODELS[name]()
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


def many_tasks(name: str, count: int, ledger: str | None = None) -> str:
    """What the boundary of the last task takes beside that of the second.

    Args:
        ledger: a folder for the tasks, as every run has one; None: they stay in memory.
    """
    work = SEQUENCES[name]()
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
                        p.copy_(1e-3 * torch.randn(p.shape, generator=draw))
            closed, _ = timed(learner.finish_task)
        seconds.append(opened + closed)
        phases.append(sum(passes.values()))
        sizes.append(sum(learner.U.dims().values()))
        print(f"task {i + 1}: {seconds[-1]:.2f} s, passes {phases[-1]:.2f}, U {sizes[-1]}", file=sys.stderr, flush=True)
    total = sum(n for n, _ in learner.U.start_dims().values())
    rest = [whole - passes for whole, passes in zip(seconds, phases, strict=True)]
    lines = [
        "", f"**{count} tasks on the {name} model, {'with a ledger' if ledger else 'in memory'}**", "",
        "| | tasks 2 to 6 | last five | ratio |", "|--|--|--|--|",
    ]  # fmt: skip
    for what, values in (("boundary", seconds), ("of it passes over data", phases), ("all else", rest)):
        late, early = statistics.median(values[-5:]), statistics.median(values[1:6])
        lines.append(f"| {what}, s (median) | {early:.2f} | {late:.2f} | {late / early:.2f} |")
    lines.append(f"| protected dimensions of {total} | {sizes[1]} | {sizes[-1]} | |")
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
