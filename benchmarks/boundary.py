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
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import machine as bench
import straightforward as plain
import torch
from machine import machine, ratios, spread
from torch import Tensor, nn

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.math.leak import spectral_norm
from keeplora.tuner import sketching as sketching_module
from keeplora.tuner import statistics as statistics_module
from keeplora.tuner.sampling import EndableBatches

PROMPT_TOKENS = 77
CPU = False
"""Whether processor seconds are counted (--cpu)."""
ALGEBRA, PASSES, WHOLE = "linear algebra", "passes over data", "whole boundary"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    return bench.timed(work, cpu=CPU)


@dataclass(frozen=True)
class Scale:
    """How large the work is, and where it is done.

    Attributes:
        samples, batch: pictures or texts, in all and at once. layers: blocks of each tower. small: narrow models and few classes,
            for a trial.
    """

    samples: int = 32
    batch: int = 16
    layers: int = 12
    small: bool = False
    device: torch.device = bench.HOST

    def parts(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, self.samples, self.batch)]


SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


class PicturesThenPrompts(EndableBatches):
    """Batches of pictures, which a pass may end early, and then the prompts, which all count."""

    def __init__(self, pictures: Sequence[Any], prompts: Any, samples: int) -> None:
        super().__init__(pictures, samples)
        self._prompts = prompts

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        yield self._prompts


@dataclass
class Work:
    """One model and one task for both sides.

    Attributes:
        make: a new model, the same every time. narrow, wide: the batches that ours, and the straightforward side, go through.
        loss: (model, batch) to one loss per sample. forward: of the feature pass. feature_batches: ours.
        masks: which positions count. once: targets whose inputs are the same in every batch (class prompts).
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
    device: torch.device = bench.HOST


def vit(scale: Scale = Scale()) -> Work:
    from transformers import CLIPConfig, CLIPModel

    classes, side = (10, 64) if scale.small else (100, 224)
    blocks = {"num_hidden_layers": scale.layers, **(SMALL if scale.small else {})}

    def make() -> nn.Module:
        torch.manual_seed(0)
        vision = {"patch_size": 16, "image_size": side, **blocks}
        with scale.device:
            return CLIPModel(CLIPConfig(projection_dim=512, vision_config=vision, text_config=dict(blocks))).eval()

    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(scale.samples, 3, side, side, generator=draw).to(scale.device)
    labels = torch.randint(classes, (scale.samples,), generator=draw).to(scale.device)
    lengths = torch.randint(6, 13, (classes,), generator=draw).tolist()
    end = CLIPConfig().text_config.eos_token_id
    words = [[end - 1, *torch.randint(1, end - 1, (n - 2,), generator=draw).tolist(), end] for n in lengths]

    def prompts(width: int) -> dict[str, Tensor]:
        ids = torch.tensor([w + [end] * (width - len(w)) for w in words])
        mask = torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in words])
        return {"input_ids": ids.to(scale.device), "attention_mask": mask.to(scale.device)}

    def batches(width: int) -> list[dict[str, Tensor]]:
        text = prompts(width)
        return [{"pixel_values": pixels[p], "labels": labels[p], **text} for p in scale.parts()]

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
        PicturesThenPrompts([{"pixel_values": b["pixel_values"]} for b in narrow], prompts(max(lengths)), scale.samples),
        lambda name: "text" in name, scale.device,
    )  # fmt: skip


def llama(scale: Scale = Scale()) -> Work:
    from transformers import LlamaConfig, LlamaForCausalLM

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = SMALL if scale.small else {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
        config = LlamaConfig(num_hidden_layers=scale.layers, vocab_size=8000, **sizes)
        with scale.device:
            return LlamaForCausalLM(config).eval()

    tokens = 16 if scale.small else 128
    ids = torch.randint(8000, (scale.samples, tokens), generator=torch.Generator().manual_seed(1)).to(scale.device)
    batches = [{"input_ids": ids[p]} for p in scale.parts()]

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")

    def forward(model: Any, batch: Any) -> None:
        model.model(input_ids=batch["input_ids"], use_cache=False)

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"target_modules": modules, "energy_weights": 0.6}
    return Work(make, config, batches, batches, loss, forward, lambda batch: {})


def demo(scale: Scale = Scale()) -> Work:
    from keeplora.experiment import load_config
    from keeplora.experiment.objective import TaskObjective
    from keeplora.experiment.setup import prepare
    from keeplora.methods import method_names

    changes = {"device": scale.device.type, "training": {"precision": "fp32"}}
    setup = prepare(load_config({"suite": "demo-small", "method": "keeplora++"}, changes, known_methods=method_names()))
    task, family = setup.tasks[0], setup.family
    data, objective = setup.sets[task.name].train, TaskObjective(family, task, setup.precision)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[: scale.samples].tolist()
    items = [data[i] for i in chosen]
    pixels = torch.stack([item["pixel_values"] for item in items]).to(scale.device)
    labels = torch.tensor([int(item["labels"]) for item in items]).to(scale.device)

    def batches(width: int | None) -> list[dict[str, Tensor]]:
        text = {k: v.to(scale.device) for k, v in objective.text_batch.items()}
        if width is not None:
            text = {k: nn.functional.pad(v, (0, width - v.shape[1])) for k, v in text.items()}
        return [{"pixel_values": pixels[p], "labels": labels[p], **text} for p in scale.parts() if len(labels[p])]

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
        batches(PROMPT_TOKENS), loss, forward, masks,
        PicturesThenPrompts([{"pixel_values": b["pixel_values"]} for b in narrow], text, len(labels)),
        lambda name: "text" in name, scale.device,
    )  # fmt: skip


MODELS: dict[str, Callable[[Scale], Work]] = {"vit": vit, "llama": llama, "demo": demo}


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


def ours(work: Work, options: Mapping[str, Any]) -> Side:
    model, side = work.make(), Side()
    before = bench.begin_peak(work.device)
    learner = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **{**work.config, **options}))
    passes = dict.fromkeys(("collect_gradients", "collect_features"), 0.0)

    def watched(name: str, take: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seconds, found = timed(lambda: take(*args, **kwargs))
            passes[name] += seconds
            return found

        return call

    side.seconds["weight subspaces"], U = timed(lambda: learner.U)
    with (
        mock.patch.object(
            sketching_module, "collect_gradients", watched("collect_gradients", sketching_module.collect_gradients)
        ),
        mock.patch.object(
            statistics_module, "collect_features", watched("collect_features", statistics_module.collect_features)
        ),
    ):
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


@dataclass
class ManyTasks:
    """Boundaries of one task after another.

    Attributes:
        seconds: of each task's. dims: protected dimensions over all targets after each task, of ``total``.
    """

    seconds: list[float]
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


def sequence(work: Work, count: int) -> ManyTasks:
    """``count`` tasks on one model, each on pictures of its own."""
    model = work.make()
    learner = ContinualLearner(model, KeepLoraConfig(r=16, energy_features=0.99, **work.config))
    seconds, sizes = [], []
    draw = torch.Generator().manual_seed(2)
    for i in range(count):
        # Other pictures for every task: noise on top, so that each task brings directions of its own.
        narrow = [
            {
                **b,
                "pixel_values": b["pixel_values"]
                + 0.3 * torch.randn(b["pixel_values"].shape, generator=draw).to(b["pixel_values"].device),
            }
            for b in work.narrow
        ]
        batches = [
            *({"pixel_values": b["pixel_values"]} for b in narrow),
            {k: v for k, v in narrow[0].items() if k not in ("pixel_values", "labels")},
        ]

        def boundary(i: int = i, narrow: Any = narrow, batches: Any = batches) -> None:
            learner.start_task(
                f"task {i}", narrow, work.loss, forward_fn=work.forward, mask_fn=work.masks, feature_batches=batches
            )
            learner.finish_task()

        seconds.append(timed(boundary)[0])
        sizes.append(sum(learner.U.dims().values()))
    return ManyTasks(seconds, sizes, sum(n for n, _ in learner.U.start_dims().values()))


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


def many_tasks(count: int) -> str:
    """What the boundary of the last task takes beside that of the second, on the demo model's first pictures."""
    found = sequence(demo(), count)
    late, early = statistics.median(found.late), statistics.median(found.early)
    return "\n".join([
        "", f"**{count} tasks on the demo model**", "",
        "| | tasks 2 to 6 | last five | ratio |", "|--|--|--|--|",
        f"| boundary, s (median) | {early:.2f} | {late:.2f} | {late / early:.2f} |",
        f"| protected dimensions of {found.total} | {found.dims[1]} | {found.dims[-1]} | |",
    ])  # fmt: skip


def option(text: str) -> tuple[str, Any]:
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=50, help="length of the sequence; 0: none")
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
    for name in args.models:
        print(compare(name, args.repeats, dict(args.option)), flush=True)
    if args.tasks:
        print(many_tasks(args.tasks), flush=True)


if __name__ == "__main__":
    main()
