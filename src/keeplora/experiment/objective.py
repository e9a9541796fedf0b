"""What a dual encoder is trained on and judged by: pictures against class prompts, and the "cls" variant's head."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.data import TaskData
from keeplora.experiment.device import Precision
from keeplora.experiment.pictures import Collate, PictureTensors, loader
from keeplora.models.dual_encoder import DualEncoder

HEAD_SCALE = 30.0
"""Scale of the class-weight cosines that the "cls" variant adds to the logits (METHOD.md)."""


def add_head(logits: Tensor, image_features: Tensor, head: Tensor) -> Tensor:
    """logits + 30 · cos(image feature, class weight): [N, C], [N, D], [C, D] -> [N, C]."""
    return logits + HEAD_SCALE * image_features.float() @ nn.functional.normalize(head.float(), dim=-1).T


class TaskObjective:
    """The loss of one task, and the batches and masks of its statistics passes.

    Args:
        head: class weights [C, D] of the "cls" variant, or None.
    """

    def __init__(self, family: DualEncoder, task: TaskData, precision: Precision, head: nn.Parameter | None = None):
        self.family = family
        self.task = task
        self.precision = precision
        self.head = head
        # Training reads one prompt per class, the first template, as the reference does; evaluation averages them all.
        prompts = family.class_prompts(task.classes, task.templates[:1])
        self.text_batch = {k: v.cpu() for k, v in family.tokenize(prompts, task.classes).items()}
        self.collate = Collate(self.text_batch)

    def _text(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: batch[key] for key in self.text_batch}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[N, C] logits of a batch of pictures against the task's class prompts, differentiable."""
        image_features = self.family.image_features(batch["pixel_values"])
        logits = self.family.logits(image_features, self.family.text_features(self._text(batch)))
        return logits if self.head is None else add_head(logits, image_features, self.head)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of each picture, [N]; ``model`` is the family's own module, adapted in place."""
        with self.precision.autocast():
            logits = self.logits(batch)
        return nn.functional.cross_entropy(logits.float(), batch["labels"].to(logits.device), reduction="none")

    def masks(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions that count in C and G, per tower (METHOD.md, point 5)."""
        masks: dict[str, Tensor] = {}
        if "input_ids" in batch:
            masks |= self.family.token_masks(self._text(batch))
        if "pixel_values" in batch:
            masks |= self.family.picture_masks(batch["pixel_values"])
        return masks

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """One step of the feature pass: pictures or prompts, whichever the batch holds."""
        with self.precision.autocast():
            if "pixel_values" in batch:
                self.family.image_features(batch["pixel_values"])
            else:
                self.family.text_features(batch)

    def feature_batches(self, pictures: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The pictures, and then every prompt of every template once (METHOD.md, M8)."""
        for batch in pictures:
            yield {"pixel_values": batch["pixel_values"]}
        prompts = self.family.class_prompts(self.task.classes, self.task.templates)
        for i in range(0, len(prompts), 256):
            yield dict(self.family.tokenize(prompts[i : i + 256]))


@torch.no_grad()
def initial_head(objective: TaskObjective, data: PictureTensors, batch_size: int) -> nn.Parameter:
    """Class weights [C, D] at the class means of the image features; a class without a picture gets its text feature."""
    family, task = objective.family, objective.task
    with family.evaluating(), objective.precision.autocast():
        total: Tensor | None = None
        counts = torch.zeros(len(task.classes))
        for batch in loader(data, batch_size, Collate()):
            features = family.image_features(batch["pixel_values"]).float().cpu()
            total = torch.zeros(len(task.classes), features.shape[1]) if total is None else total
            total.index_add_(0, batch["labels"], features)
            counts.index_add_(0, batch["labels"], torch.ones(len(batch["labels"])))
        texts = family.class_features(task.classes, task.templates).float().cpu()
    total = torch.zeros_like(texts) if total is None else total
    for label in torch.nonzero(counts == 0).flatten().tolist():
        warnings.warn(
            f"task {task.name!r}: class {task.classes[label]!r} has no training picture; its class weight starts at its "
            "text feature", stacklevel=2,
        )  # fmt: skip
        total[label] = texts[label]
    return nn.Parameter(nn.functional.normalize(total, dim=-1).to(family.device))


@torch.no_grad()
def predict(
    family: DualEncoder, classes: list[str], templates: list[str], pixel_values: Tensor, head: Tensor | None = None
) -> Tensor:
    """[N, C] logits at inference; call it inside ``family.evaluating()`` so that class features are computed once."""
    image_features = family.image_features(pixel_values)
    logits = family.logits(image_features, family.class_features(classes, templates))
    return logits if head is None else add_head(logits, image_features, head.to(logits.device))


def accuracy(
    family: DualEncoder, task: TaskData, data: PictureTensors, precision: Precision, batch_size: int,
    head: Tensor | None = None, on_batch: Any = None,
) -> float:  # fmt: skip
    """Percent of pictures whose class has the largest logit among the task's own classes."""
    right = 0
    with family.evaluating(), precision.autocast():
        for batch in loader(data, batch_size, Collate()):
            logits = predict(family, task.classes, task.templates, batch["pixel_values"], head)
            right += int((logits.argmax(dim=1).cpu() == batch["labels"]).sum())
            if on_batch is not None:
                on_batch()
    return 100.0 * right / len(data)
