"""Two small tasks for any tiny dual encoder: noise around one picture per class, against the classes' prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.models.dual_encoder import DualEncoder
from tests.models import tiny

TASKS = {"one": ["cat", "large red car"], "two": ["square", "yellow triangle"]}


class FamilyTask:
    """The loss, batches and masks of a task, as an experiment gives them to the learner."""

    def __init__(self, encoder: DualEncoder, name: str) -> None:
        self.encoder = encoder
        self.name = name
        classes = TASKS[name]
        self.text = dict(encoder.tokenize([f"a photo of a {c}." for c in classes], classes))
        pictures = torch.stack([encoder.preprocess(p) for p in tiny.pictures(2, seed=len(name) + ord(name[0]))])
        generator = torch.Generator().manual_seed(1)
        pixels = pictures.repeat_interleave(4, 0)
        if encoder.family == "siglip2":  # the last two columns are the grid, not colours
            noise = torch.cat([torch.randn(*pixels.shape[:-1], pixels.shape[-1] - 2, generator=generator),
                               torch.zeros(*pixels.shape[:-1], 2)], dim=-1)  # fmt: skip
        else:
            noise = torch.randn(pixels.shape, generator=generator)
        pixels = pixels + 0.1 * noise
        labels = torch.arange(2).repeat_interleave(4)
        self.batches = [
            {"pixel_values": pixels[i::2], "labels": labels[i::2], **self.text} for i in (0, 1)
        ]  # fmt: skip

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        text = {key: batch[key] for key in self.text}
        logits = self.encoder.logits(
            self.encoder.image_features(batch["pixel_values"]), self.encoder.text_features(text)
        )
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    # What `keeplora.tuner.objective.Objective` asks for; `model` is a copy of the encoder's.

    classes = property(lambda self: TASKS[self.name])
    templates = property(lambda self: ["a photo of a {}."])
    text_batch = property(lambda self: self.text)

    def _encoder(self, model: nn.Module | None) -> DualEncoder:
        return self.encoder if model is None or model is self.encoder.model else self.encoder.around(model)

    def image_features(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        return self._encoder(model).image_features(batch["pixel_values"])

    def text_features(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        return self._encoder(model).text_features({key: batch[key] for key in self.text})

    def logits_of(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return self.encoder.logits(image_features, text_features)

    def logits(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        return self.logits_of(self.image_features(batch, model), self.text_features(batch, model)).float()

    def masks(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        if "input_ids" in batch:
            masks |= self.encoder.token_masks({key: batch[key] for key in self.text})
        if "pixel_values" in batch:
            masks |= self.encoder.picture_masks(batch["pixel_values"])
        return masks

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        if "pixel_values" in batch:
            self.encoder.image_features(batch["pixel_values"])
        else:
            self.encoder.text_features(batch)

    def feature_batches(self) -> Iterator[dict[str, Tensor]]:
        """Pictures, then every prompt once."""
        for batch in self.batches:
            yield {"pixel_values": batch["pixel_values"]}
        yield self.text

    def start(self, learner: Any, name: str, **kwargs: Any) -> nn.Module:
        return learner.start_task(
            name, self.batches, self.loss, objective=self, feature_batches=list(self.feature_batches()), forward_fn=self.forward,
            mask_fn=self.masks, info={"classes": TASKS[self.name]}, **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def mean_loss(self) -> float:
        self.encoder.model.eval()
        return float(torch.cat([self.loss(self.encoder.model, batch) for batch in self.batches]).mean())
