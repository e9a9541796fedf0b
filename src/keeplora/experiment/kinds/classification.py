"""Naming pictures or videos with a dual encoder: against class prompts, and the "cls" variant's head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from keeplora.data import PictureSet, TaskData
from keeplora.data.streams import SampleStream
from keeplora.data.video import Sampling
from keeplora.errors import ConfigError
from keeplora.experiment.candidates import Candidates, candidates_for
from keeplora.experiment.config import ExperimentConfig, TrainingConfig
from keeplora.experiment.device import Precision
from keeplora.experiment.kinds.base import Sets
from keeplora.experiment.objective import TaskObjective, accuracy, initial_head, rightly_named
from keeplora.experiment.order import ShuffledBatches
from keeplora.experiment.pictures import (
    Collate,
    DrawnPictures,
    PictureTensors,
    TaskBatches,
    TensorCache,
    loader,
    shuffled_loader,
    worker_caches,
)
from keeplora.experiment.streams import PictureItems, StreamOrder, StreamTensors, streamed_loader
from keeplora.methods import Method
from keeplora.models.dual_encoder import DualEncoder
from keeplora.tuner import ContinualLearner, KeepLoraConfig
from keeplora.tuner.sampling import statistics_batches
from keeplora.tuner.shares import share


class Classification:
    """A `Kind`."""

    name: ClassVar[str] = "classification"

    def __init__(
        self, config: ExperimentConfig, family: DualEncoder, precision: Precision, method: Method,
        tasks: Sequence[TaskData], probes: Sequence[TaskData],
    ) -> None:  # fmt: skip
        self.config, self.family, self.precision, self.method = config, family, precision, method
        self.tasks, self.probes = tasks, probes
        self._cache = TensorCache()
        self._clips, self._frames = worker_caches(config)

    @property
    def _pin(self) -> bool:
        """Whether batches lie in pinned memory, from which they are copied to a GPU while it computes."""
        return self.family.device.type == "cuda"

    @property
    def _videos(self) -> bool:
        return any(task.medium == "video" for task in [*self.tasks, *self.probes])

    def sampling(self, *, statistics: bool = False) -> Sampling:
        """Which frames of a video are read; a model that reads one number of frames gets as many in the statistics."""
        found = self.config.video.sampling_of(statistics=statistics)
        return found if self.family.clip_frames is None else replace(found, frames=self.family.clip_frames)

    def _check_medium(self, samples: PictureSet) -> None:
        """Refuse what the model cannot read, now."""
        wanted, video = self.family.clip_frames, self.config.video
        if wanted is None or not len(samples):
            return
        model = self.config.model.name
        if samples.medium != "video":
            raise ConfigError(
                f"{samples.where(0)} is a picture, but {model} reads videos alone, of {wanted} frames; choose CLIP or another "
                "model for pictures"
            )
        if video.frames != wanted or video.sampling == "fps":
            raise ConfigError(
                f"video: {model} reads {wanted} frames of every video, no more and no fewer; set `frames: {wanted}` and "
                "`sampling: uniform` (or segment)"
            )

    def sets(self, task: TaskData) -> Sets:
        if self.config.training.micro_batch is not None:
            raise ConfigError(
                "training.micro_batch: a dual encoder compares the pictures of a batch with all class prompts at once; "
                "lower training.batch_size instead"
            )
        # refuses prompts that are too long, now
        self.family.tokenize(self.family.class_prompts(task.classes, task.templates))
        return Sets(
            self.data_set(task.train), self.data_set(task.test),
            self.data_set(task.validation) if task.validation is not None else None,
        )  # fmt: skip

    def data_set(self, samples: PictureSet | SampleStream) -> Any:
        if isinstance(samples, SampleStream):
            if self.family.clip_frames is not None:
                raise ConfigError(
                    f"{samples.name}: a stream brings pictures, but {self.config.model.name} reads videos alone; choose CLIP or "
                    "another model for pictures"
                )
            items = PictureItems(self.family, samples.spec.max_pixels)
            return StreamTensors(samples, items, self.config.seed, self.sampling())
        self._check_medium(samples)
        cache = self._clips if samples.medium == "video" else self._cache
        return PictureTensors(samples, self.family, cache, sampling=self.sampling(), frames=self._frames)

    def default_targets(self) -> Mapping[str, Any]:
        return {"target_modules": self.family.default_target_modules}

    def info(self, task: TaskData) -> dict[str, Any]:
        video = {"video": self.config.video.model_dump()} if task.medium == "video" else {}
        return {"classes": task.classes, "templates": task.templates} | video

    def objective(self, task: TaskData) -> TaskObjective:
        return TaskObjective(self.family, task, self.precision, prompt_tokens=self.config.training.prompt_tokens)

    def prepare_head(
        self, objective: TaskObjective, data: PictureTensors | StreamTensors, training: TrainingConfig
    ) -> None:
        if self.method.classifier:
            objective.head = initial_head(objective, data, training.eval_batch_size)

    def statistics(
        self,
        objective: TaskObjective,
        data: PictureTensors | StreamTensors,
        training: TrainingConfig,
        config: KeepLoraConfig,
        seed: int,
    ) -> dict[str, Any]:
        fewer = data.sampled(self.sampling(statistics=True))
        source = data if self.method.learns_from_batches else fewer
        pictures = loader(fewer, training.eval_batch_size, Collate(), workers=training.workers, pin=self._pin)
        general = loader(DrawnPictures(self.family), training.eval_batch_size, Collate(), pin=self._pin)
        endable = config.statistics_tolerance is not None
        pictures = statistics_batches(pictures, config.feature_samples, config.seed, data.labels, endable=endable)
        return {
            "batches": loader(source, training.batch_size, objective.collate, workers=training.workers, pin=self._pin),
            "loss_fn": objective.loss, "labels": data.labels, "objective": objective, "mask_fn": objective.masks,
            "feature_batches": objective.feature_batches(pictures), "forward_fn": objective.forward,
            "general_batches": general,
        }  # fmt: skip

    def batches(
        self, objective: TaskObjective, data: PictureTensors | StreamTensors, training: TrainingConfig, seed: int
    ) -> TaskBatches:
        if isinstance(data, StreamTensors):
            stream = StreamOrder(data.stream, training.batch_size, seed)
            read = streamed_loader(data, stream, objective.collate, workers=training.workers)
            return TaskBatches(data, stream, read, objective.split)
        order = ShuffledBatches(len(data), training.batch_size, seed)
        brought = shuffled_loader(data, order, objective.collate, workers=training.workers, pin=self._pin)
        return TaskBatches(data, order, brought, objective.split)

    def first_batch(self, objective: TaskObjective, data: Any, training: TrainingConfig) -> tuple[Any, int]:
        n = min(len(data), training.batch_size)
        items = data.first(n) if isinstance(data, StreamTensors) else [data[i] for i in range(n)]
        return objective.collate(items), n

    def _candidates(self, task: TaskData, learner: ContinualLearner) -> Candidates:
        learned = {record.name for record in learner.records}
        if learner._open is not None:
            learned.add(learner._open.name)
        seen = [t for t in self.tasks if t.name in learned]
        return candidates_for(task, {"own": [], "seen": seen, "all": self.tasks}[self.config.candidates])

    @staticmethod
    def _heads(learner: ContinualLearner) -> dict[tuple[str, ...], Tensor]:
        """Trained class weights by the class list they belong to."""
        return {
            tuple(record.info["classes"]): record.tensors["head"]
            for record in learner.records if "head" in record.tensors
        }  # fmt: skip

    def score(
        self, task: TaskData, data: PictureTensors, learner: ContinualLearner, *, head: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None, keep: Path | None = None,
    ) -> float:  # fmt: skip
        """Percent of pictures or videos named rightly; single answers are not kept."""
        with learner.serving(task.name):
            return accuracy(*self._asked(task, data, learner, head, on_batch))

    def per_sample(
        self, task: TaskData, data: PictureTensors, learner: ContinualLearner, *, head: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None,
    ) -> list[float]:  # fmt: skip
        with learner.serving(task.name):
            right = rightly_named(*self._asked(task, data, learner, head, on_batch))
        return [100.0 * one for one in right] + [0.0] * data.pictures.skipped

    def _asked(
        self, task: TaskData, data: PictureTensors, learner: ContinualLearner, head: Tensor | None, on_batch: Any
    ) -> tuple[Any, ...]:
        """The arguments of `accuracy` and `rightly_named`."""
        if head is None:
            head = self._heads(learner).get(tuple(task.classes))
        return (
            self.family, self._candidates(task, learner), data, self.precision, self.config.training.eval_batch_size,
            head, on_batch, learner.readout, self.config.training.workers if data.videos else 0,
        )  # fmt: skip

    def evaluation(self, learner: ContinualLearner) -> AbstractContextManager[object]:
        """Class features that several sets have among their candidates are computed once; but not where a method answers
        for each task with a model of its own."""
        same = type(learner).serving is ContinualLearner.serving
        return self.family.evaluating() if same else nullcontext()

    def steps(self, data: PictureTensors) -> int:
        return -(-len(share(range(len(data)))) // self.config.training.eval_batch_size)

    def results(self) -> dict[str, Any]:
        rivals = self.tasks if self.config.candidates != "own" else ()  # with "seen": in the end
        return {
            "chance": {
                t.name: 100.0 / len(candidates_for(t, rivals).classes) for t in [*self.tasks, *self.probes]
            }
        }  # fmt: skip

    def comparison(self) -> list[Any]:
        told: list[Any] = [] if self.config.candidates == "own" else [self.config.candidates]
        return told + ([{"video": self.config.video.told}] if self._videos else [])

    def running(self, learner: ContinualLearner) -> AbstractContextManager[object]:
        return nullcontext()

    def begin(self, folder: Path, earlier: Mapping[str, Any] | None) -> None: ...

    def repeat(self, after: int) -> None: ...

    def warnings(self) -> list[str]:
        return []
