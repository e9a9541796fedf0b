"""Models and tasks that the task boundary is measured on: each for both sides, at the size that is asked for (boundary.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import machine as bench
import torch
from torch import Tensor, nn

from keeplora.tuner.sampling import EndableBatches

PROMPT_TOKENS = 77


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
    device: torch.device = bench.HOST
    renew: Callable[[Any, torch.Generator], Any] = field(default=lambda batch, draw: noisy(batch, draw))


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
    return Work(make, config, batches, batches, loss, forward, lambda batch: {}, device=scale.device)


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


def chain(scale: Scale = Scale()) -> Work:
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
        "pixel_values": batch["pixel_values"]
        + 0.3 * torch.randn(batch["pixel_values"].shape, generator=draw).to(batch["pixel_values"].device),
    }


MODELS: dict[str, Callable[[Scale], Work]] = {"vit": vit, "llama": llama, "demo": demo}
SEQUENCES: dict[str, Callable[[Scale], Work]] = {"demo": demo, "chain": chain}
