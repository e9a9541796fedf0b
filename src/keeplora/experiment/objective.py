"""What a dual encoder is trained on and judged by: pictures or videos against class prompts, and the "cls" variant's head."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keeplora.data import TaskData
from keeplora.experiment.candidates import Candidates
from keeplora.experiment.device import Precision
from keeplora.experiment.pictures import Collate, PictureTensors, loader, own_part
from keeplora.experiment.step_features import StepFeatures
from keeplora.experiment.streams import StreamTensors
from keeplora.models.dual_encoder import DualEncoder
from keeplora.tuner import ranks
from keeplora.tuner.memory import Pieces, halved
from keeplora.tuner.sampling import to_device
from keeplora.tuner.sharding import going_through, in_step, is_sharded
from keeplora.tuner.shares import share

HEAD_SCALE = 30.0
"""Scale of the class-weight cosines that the "cls" variant adds to the logits (METHOD.md)."""


def add_head(logits: Tensor, image_features: Tensor, head: Tensor) -> Tensor:
    """logits + 30 · cos(image feature, class weight): [N, C], [N, D], [C, D] -> [N, C]."""
    return logits + HEAD_SCALE * image_features.float() @ nn.functional.normalize(head.float(), dim=-1).T


class TaskObjective:
    """The loss of one task, and the batches and masks of its statistics passes.

    Args:
        head: class weights [C, D] of the "cls" variant, or None.
        prompt_tokens: most tokens of class prompts whose activations a training step holds; None: all.
    """

    _step: StepFeatures | None = None

    def __init__(
        self, family: DualEncoder, task: TaskData, precision: Precision, head: nn.Parameter | None = None,
        prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.family = family
        self.prompt_tokens = prompt_tokens
        self.task = task
        self.precision = precision
        self.head = head
        # Training reads one prompt per class, the first template, as the reference does; evaluation averages them all.
        prompts = family.class_prompts(task.classes, task.templates[:1])
        self.text_batch = {k: v.cpu() for k, v in family.tokenize(prompts, task.classes).items()}
        self.collate = Collate(self.text_batch)
        self.classes, self.templates = task.classes, task.templates

    def _text(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: batch[key] for key in self.text_batch}

    def _family(self, model: nn.Module | None) -> DualEncoder:
        if model is None or model is self.family.model:
            return self.family
        return self.family.around(model)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around a task's training loop: a step computes no more of the towers than it must (`StepFeatures`).

        What requires a gradient must not change inside.
        """
        self._step = StepFeatures(self.family, self.prompt_tokens)
        try:
            yield
        finally:
            self._step = None

    def _steps(self, model: nn.Module | None) -> StepFeatures | None:
        return self._step if model is None or model is self.family.model else None

    def image_features(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """[N, D] float32, unit norm; ``model``: a copy of the family's module to use instead of it."""
        with self.precision.autocast():
            return self._family(model).image_features(batch["pixel_values"])

    def text_features(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """[C, D] float32, unit norm (X-CLIP's keep their length), of the prompts in ``batch``."""
        steps = self._steps(model)
        with self.precision.autocast():
            if steps is not None:
                return steps.texts(self._text(batch))
            return self._family(model).text_features(self._text(batch))

    def logits_of(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """[N, C] from [N, D] and [C, D]."""
        return self.family.logits(image_features, text_features)

    def logits(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """[N, C] float32 logits of a batch of pictures against the class prompts in it, differentiable."""
        with self.precision.autocast():
            texts = self.text_features(batch, model)
            steps = self._steps(model)
            if steps is not None and steps.pictures_fixed:
                image_features = steps.pictures(batch["pixel_values"])
                logits = self.family.logits(image_features, texts)
            else:
                logits, image_features = self._family(model).compare(batch["pixel_values"], texts)
        return (logits if self.head is None else add_head(logits, image_features, self.head)).float()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of each picture, [N]; ``model`` is the family's own module, adapted in place."""
        logits = self.logits(batch)
        return nn.functional.cross_entropy(logits, batch["labels"].to(logits.device), reduction="none")

    def parts(self, batch: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """The batch as one part, with pictures and labels on the model's device: they are copied there once a step.

        The prompts stay: in most steps of a task whose text tower does not train, nothing reads them.
        """
        read = {key: batch[key] for key in ("pixel_values", "labels")}
        return [{**batch, **to_device(read, self.family.device)}]

    def count(self, part: Mapping[str, Tensor]) -> int:
        return len(part["labels"])

    def split(self, part: Mapping[str, Tensor], size: int) -> list[Mapping[str, Tensor]]:
        """The batch as batches of at most ``size`` pictures, each against all the prompts."""
        n = len(part["labels"])
        own = {k for k, v in part.items() if isinstance(v, Tensor) and k not in self.text_batch and len(v) == n}
        return [{k: v[i : i + size] if k in own else v for k, v in part.items()} for i in range(0, n, size)]

    def part_loss(self, part: Mapping[str, Tensor], total: int) -> tuple[Tensor, Tensor]:
        """(Σ cross-entropy / ``total``, logits [N, C]); of a batch that is whole, its mean."""
        logits = self.logits(part)
        labels = part["labels"].to(logits.device)
        if total == len(labels):
            return nn.functional.cross_entropy(logits, labels), logits
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / total, logits

    def right(self, logits: Tensor, part: Mapping[str, Tensor]) -> int:
        return int((logits.argmax(dim=1) == part["labels"].to(logits.device)).sum())

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

    def feature_batches(self, pictures: Iterable[Mapping[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
        """The pictures, and then every prompt of every template once (METHOD.md, M8); can be gone through again."""
        return _FeatureBatches(self, pictures)


class _FeatureBatches:
    def __init__(
        self, objective: TaskObjective, pictures: Iterable[Mapping[str, Tensor]], prompts_at_once: int = 256
    ) -> None:
        self._objective, self._pictures, self._prompts = objective, pictures, prompts_at_once

    def halved(self) -> _FeatureBatches | None:
        """Half as many pictures, and prompts, at once; None where there is but one of each."""
        pictures = halved(self._pictures)
        if pictures is None and self._prompts == 1:
            return None
        fewer = self._pictures if pictures is None else pictures
        return _FeatureBatches(self._objective, fewer, max(1, self._prompts // 2))

    def __getattr__(self, name: str) -> Any:
        if name in ("samples", "classes", "open", "end"):  # it is the pictures that may end early; every prompt counts
            return getattr(self._pictures, name)
        raise AttributeError(name)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._pictures:
            yield {"pixel_values": batch["pixel_values"]}
        family, task = self._objective.family, self._objective.task
        prompts = share(family.class_prompts(task.classes, task.templates))
        for i in range(0, len(prompts), self._prompts):
            yield dict(family.tokenize(prompts[i : i + self._prompts]))


@torch.no_grad()
def initial_head(objective: TaskObjective, data: PictureTensors | StreamTensors, batch_size: int) -> nn.Parameter:
    """Class weights [C, D] at the class means of the image features; a class without a picture gets its text feature."""
    family, task = objective.family, objective.task
    with family.evaluating(), objective.precision.autocast():
        total: Tensor | None = None
        counts = torch.zeros(len(task.classes))
        for batch, mine in in_step(family.model, loader(own_part(data), batch_size, Collate()), "class means"):
            features = family.image_features(batch["pixel_values"]).float().cpu()
            if not mine:
                continue
            total = torch.zeros(len(task.classes), features.shape[1]) if total is None else total
            total.index_add_(0, batch["labels"], features)
            counts.index_add_(0, batch["labels"], torch.ones(len(batch["labels"])))
        texts = family.class_features(task.classes, task.templates).float().cpu()
    if ranks.active():
        found = {"counts": counts} | ({} if total is None else {"total": total})
        found = ranks.summed("class means", found, ["counts", "total"])
        total, counts = found.get("total"), found["counts"]
    total = torch.zeros_like(texts) if total is None else total
    for label in torch.nonzero(counts == 0).flatten().tolist():
        warnings.warn(
            f"task {task.name!r}: class {task.classes[label]!r} has no training picture; its class weight starts at its "
            "text feature", stacklevel=2,
        )  # fmt: skip
        total[label] = texts[label]
    return nn.Parameter(nn.functional.normalize(total, dim=-1).to(family.device))


class Readout(Protocol):
    """How a method turns features and the model's own logits into final ones (`ContinualLearner.readout`)."""

    def __call__(self, image_features: Tensor, logits: Tensor, classes: Sequence[str]) -> Tensor: ...


@torch.no_grad()
def predict(
    family: DualEncoder, candidates: Candidates, pixel_values: Tensor, head: Tensor | None = None,
    readout: Readout | None = None,
) -> Tensor:  # fmt: skip
    """[N, C] logits at inference; call it inside ``family.evaluating()`` so that class features are computed once."""
    texts = [family.class_features(classes, templates) for classes, templates in candidates.groups]
    logits, image_features = family.compare(pixel_values, torch.cat(texts))
    if head is not None:
        logits = add_head(logits, image_features, head.to(logits.device))
    return logits if readout is None else readout(image_features, logits, candidates.classes)


def rightly_named(
    family: DualEncoder, candidates: Candidates, data: PictureTensors, precision: Precision, batch_size: int,
    head: Tensor | None = None, on_batch: Any = None, readout: Readout | None = None, workers: int = 0,
) -> list[bool]:  # fmt: skip
    """Of each picture or video of this process's part of ``data``: whether its class has the largest logit."""
    right: list[bool] = []
    workers = 0 if data.kept else workers
    own, pieces = torch.tensor(candidates.own), None if is_sharded(family.model) else Pieces("evaluation")
    pin = family.device.type == "cuda"
    with going_through(family.model, "evaluation"), family.evaluating(), precision.autocast():
        brought = loader(own_part(data), batch_size, Collate(), workers=workers, pin=pin)
        for batch, mine in in_step(family.model, brought, "evaluation"):
            if workers and mine:
                data.keep(batch)
            batch = {**batch, "pixel_values": to_device(batch["pixel_values"], family.device)}
            pixels, wanted = batch["pixel_values"], own[batch["labels"]]

            def named(start: int, end: int, pixels: Tensor = pixels, wanted: Tensor = wanted) -> list[bool]:
                logits = predict(family, candidates, pixels[start:end], head, readout)
                return (logits.argmax(dim=1).cpu() == wanted[start:end]).tolist()

            # A sharded model goes through no batch in parts, for another process's may not come in as many.
            found = [named(0, len(wanted))] if pieces is None else pieces(len(wanted), named)
            if mine:
                right += [one for part in found for one in part]
            if on_batch is not None:
                on_batch()
    return right


def accuracy(
    family: DualEncoder, candidates: Candidates, data: PictureTensors, precision: Precision, batch_size: int,
    head: Tensor | None = None, on_batch: Any = None, readout: Readout | None = None, workers: int = 0,
) -> float:  # fmt: skip
    """Percent of pictures or videos whose class has the largest logit among the candidates.

    Those that were skipped as unreadable count as wrong. ``workers``: processes that decode what is not in memory.
    """
    right = sum(rightly_named(family, candidates, data, precision, batch_size, head, on_batch, readout, workers))
    right = int(ranks.totals("evaluation", right)[0])
    return 100.0 * right / (len(data) + data.pictures.skipped)
