"""Using a finished (or half-finished) run: predictions, exports, audits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from keeplora.data.conversations import asked
from keeplora.data.sets import FileBytes
from keeplora.data.video import Clip, decode_clip
from keeplora.errors import ConfigError, KeepLoraError, did_you_mean
from keeplora.experiment.candidates import ClassList, candidates_for
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.experiment.device import choose_device
from keeplora.experiment.objective import predict
from keeplora.experiment.results import check_infos
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.setup import open_model
from keeplora.files import expand
from keeplora.methods import get_method
from keeplora.tuner import ContinualLearner, TaskRecord
from keeplora.tuner.export import choose_records, write_adapter
from keeplora.tuner.persistence import all_updates, free_weights, merge_into
from keeplora.tuner.sampling import to_device

EXPORT_FORMATS = ("peft", "merged")
DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Prediction:
    """One candidate class: its name, the task that taught it (None for a class named by the user), its probability."""

    label: str
    task: str | None
    probability: float


class TrainedModel:
    """The model of a run with every learned task merged.

    Args:
        path: a run directory.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "auto") -> None:
        self.path = expand(path)
        if not (self.path / "config.yaml").is_file():
            raise KeepLoraError(
                f"{self.path} is not a run directory (no config.yaml); give the folder that `keeplora run` printed (a "
                "repository on the hub is opened in Python, by the lines on its card)"
            )
        self.config: ExperimentConfig = load_config(RunDirectory(self.path).read_config())
        self.family = open_model(self.config, choose_device(device))
        learner_class = get_method(self.config.method).learner
        self.learner: ContinualLearner = learner_class.from_pretrained(self.path, self.family.model)
        check_infos([*self.learner.records, *self.learner.removed], self.path, self.family.kind)

    @property
    def tasks(self) -> list[str]:
        """Names of the learned tasks, in order; one that `accept` undid is not among them."""
        return [record.name for record in self._learned]

    @property
    def _learned(self) -> list[TaskRecord]:
        return [record for record in self.learner.records if not record.info.get("undone")]

    def _groups(self, classes: list[str] | None, task: str | None, template: str | None) -> list[dict[str, Any]]:
        if classes is not None and task is not None:
            raise ConfigError("give --classes or --task, not both")
        if classes is not None:
            if not classes or len(set(classes)) != len(classes):
                raise ConfigError(f"the classes {classes!r} must be different names, at least one")
            return [{"classes": classes, "templates": [template or DEFAULT_TEMPLATE], "head": None, "task": None}]
        records = self._learned
        if task is not None:
            if task not in self.tasks:
                raise ConfigError(f"no learned task is named {task!r}{did_you_mean(task, self.tasks)}")
            records = [record for record in records if record.name == task]
        if not records:
            raise KeepLoraError(f"{self.path} has learned no task yet; name the candidates with --classes a,b,c")
        return [
            {
                "classes": record.info["classes"], "templates": [template] if template else record.info["templates"],
                "head": record.tensors.get("head"), "task": record.name,
            }
            for record in records
        ]  # fmt: skip

    def predict(
        self, picture: Image | str | os.PathLike[str], *, classes: list[str] | None = None, task: str | None = None,
        template: str | None = None,
    ) -> list[Prediction]:  # fmt: skip
        """Candidates by falling probability: the named classes, one task's classes, or every class learned so far.

        A class that several tasks share is one candidate, at its best logit.

        Args:
            picture: a picture, or the path of a video, of which the run's ``video:`` settings say which frames are read.
        """
        if self.family.kind != "classification":
            raise ConfigError(f"{self.path}: {self.config.model.name} answers in words; ask it a --question")
        groups = self._groups(classes, task, template)
        if not self.learner.accumulates and task is None and classes is None:
            raise ConfigError(
                f"method {self.config.method!r} must be told which task a picture belongs to: give --task NAME"
            )
        pixels = self._pixels(picture).unsqueeze(0)
        best: dict[str, tuple[float, str | None]] = {}
        with self.learner.serving(task), self.family.evaluating():
            for group in groups:
                candidates = candidates_for(ClassList(group["classes"], group["templates"]))
                logits = predict(self.family, candidates, pixels, group["head"])[0]
                for label, logit in zip(group["classes"], logits.tolist(), strict=True):
                    if label not in best or logit > best[label][0]:
                        best[label] = (logit, group["task"])
            names = list(best)
            # One read-out over all candidates: a method may weigh them against each other.
            merged = torch.tensor([[best[n][0] for n in names]], device=self.family.device)
            logits = self.learner.readout(self.family.image_features(pixels), merged, names)[0]
        probabilities = logits.softmax(0).tolist()
        out = [Prediction(n, best[n][1], p) for n, p in zip(names, probabilities, strict=True)]
        return sorted(out, key=lambda item: -item.probability)

    def _pixels(self, picture: Image | str | os.PathLike[str]) -> torch.Tensor:
        if not isinstance(picture, str | os.PathLike):
            return self.family.preprocess(picture)
        return self.family.preprocess_clip(self._clip(picture).frames, self.config.video.frames)

    def _clip(self, video: str | os.PathLike[str]) -> Clip:
        return decode_clip(FileBytes(Path(video)), str(video), self.config.video.sampling_of())

    def answer(
        self, pictures: Sequence[Image], question: str, *, task: str | None = None, max_new_tokens: int | None = None,
        videos: Sequence[str | os.PathLike[str]] = (),
    ) -> str:  # fmt: skip
        """The answer of a generative model to a question about any number of pictures and videos, greedily decoded.

        Args:
            question: text; ``<image>`` marks where a picture goes and ``<video>`` where a video goes, else they come first.
            videos: files, of which the run's ``video:`` settings say which frames are read.
            task: the learned task that the question belongs to: its instruction is added, and a method that keeps one
                model per task needs it.
            max_new_tokens: None: the task's own, or 64.
        """
        if self.family.kind != "generation":
            raise ConfigError(
                f"{self.path}: {self.config.model.name} names pictures among classes; leave the question out, and give "
                "--classes or --task"
            )
        if task is not None and task not in self.tasks:
            raise ConfigError(f"no learned task is named {task!r}{did_you_mean(task, self.tasks)}")
        if not self.learner.accumulates and task is None:
            raise ConfigError(
                f"method {self.config.method!r} must be told which task a question belongs to: give --task NAME"
            )
        info = next((record.info for record in self._learned if record.name == task), {})
        turns = asked(question, len(pictures), info.get("prompt"), videos=len(videos))
        clips = [self._clip(video) for video in videos]
        with self.learner.serving(task), self.family.evaluating():
            item = self.family.encode(turns, list(pictures), clips, where="the question", answers=False)
            batch = to_device(self.family.join([item], side="left"), self.family.device)
            tokens = max_new_tokens or info.get("max_new_tokens") or 64
            return self.family.generate(batch, max_new_tokens=tokens)[0]

    def export(
        self,
        target: str | os.PathLike[str],
        format: str,
        *,
        upto: str | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Path:
        """Write the trained model: ``peft``, one stock adapter for the untouched base, or ``merged``, a whole checkpoint.

        The adapter holds all tasks: A stacked, s·B side by side, alpha = rank, so that every server reads it alike. It is
        free of rounding whatever the base's precision; a merged checkpoint in bf16 is not (`keeplora audit` tells).

        Args:
            upto: the last task to be in it. tasks: names of those to be in it, in place of all.
        """
        target = check_export(target, format)
        if reason := get_method(self.config.method).unmergeable:
            raise KeepLoraError(f"{self.path}: method {self.config.method} {reason}")
        learner = self.learner
        aside = learner._chain.names(learner._chain.tasks())
        records = choose_records(learner.records, upto=upto, tasks=tasks, aside=aside)
        prefix = [record.name for record in learner.records[: len(records)]]
        if learner.irremovable and [record.name for record in records] != prefix:
            raise KeepLoraError(
                f"{self.path}: a selection cannot be exported, for {self.config.method} {learner.irremovable}"
            )
        if format == "merged":
            if self.config.model.quantize is None:
                present = learner.store.snapshot()
                try:
                    learner.store.restore(all_updates(records))
                    return self.family.save_pretrained(target)
                finally:
                    learner.store.restore(present)
            # A quantised base is never merged: the tasks go into the base as it was before it was quantised.
            whole = self.config.model_copy(update={"model": self.config.model.model_copy(update={"quantize": None})})
            family = open_model(whole, choose_device("cpu"))
            merge_into(records, family.model)
            return family.save_pretrained(target)
        layers = {t.name: (t.n_in, t.n_out) for t in learner.targets}
        free = free_weights(learner, records)
        where = f"{self.path} (method {self.config.method})"
        return write_adapter(target, records, self.family.name, layers, free, where=where)


def check_export(target: str | os.PathLike[str], format: str) -> Path:
    """The folder to be, or an error before anything is computed."""
    target = expand(target)
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"--format: unknown format {format!r}{did_you_mean(format, EXPORT_FORMATS)}")
    if target.exists():
        raise KeepLoraError(f"{target} exists already; choose a new folder")
    return target
