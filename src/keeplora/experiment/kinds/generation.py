"""Answering questions about pictures with a generative model: loss on the answers' tokens, scores of generated answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from keeplora.data.conversations import ConversationSet, ConversationTask
from keeplora.data.streams import SampleStream
from keeplora.errors import KeepLoraError
from keeplora.evaluation.judges import Judge, make_judge
from keeplora.evaluation.scorers import JUDGED, score
from keeplora.experiment.config import ExperimentConfig, TrainingConfig
from keeplora.experiment.conversations import (
    ConversationTensors,
    Parts,
    chosen_loader,
    ordered_loader,
    split_conversations,
    training_loader,
    training_order,
)
from keeplora.experiment.device import Precision
from keeplora.experiment.environment import memory_bytes
from keeplora.experiment.kinds.base import Sets
from keeplora.experiment.pictures import TaskBatches, worker_caches
from keeplora.experiment.samples import write_samples
from keeplora.experiment.streams import ConversationItems, StreamOrder, StreamTensors, split_joined, streamed_loader
from keeplora.files import atomic_write_text
from keeplora.methods import Method
from keeplora.models.generative import Generative
from keeplora.models.vision_cache import VisionCache
from keeplora.tuner import ContinualLearner, KeepLoraConfig, ranks
from keeplora.tuner.memory import Pieces
from keeplora.tuner.sampling import to_device
from keeplora.tuner.sharding import going_through, in_step, is_sharded
from keeplora.tuner.shares import share

IGNORED = -100


def _cache_bytes(device: str) -> int:
    """What the outputs of a frozen vision tower may take: 2 GiB of a GPU, else 4 GiB, or a quarter of the memory if less."""
    if device != "cpu":
        return 2 << 30
    memory = memory_bytes()
    return 2 << 30 if memory is None else min(4 << 30, memory // 4)


class GenerationObjective:
    """The loss of one task: cross-entropy of each answer token (M2), whatever else is in the conversation."""

    kind: ClassVar[str] = "generation"
    head: nn.Parameter | None = None

    def __init__(
        self, family: Generative, task: ConversationTask, precision: Precision, weights: Mapping[str, float]
    ) -> None:
        self.family, self.task, self.precision, self.weights = family, task, precision, dict(weights)
        self.join = family.join

    def token_losses(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        """Cross-entropy of each answer token of the batch, 1-D float32, differentiable."""
        batch = to_device(batch, self.family.device)
        with self.precision.autocast():
            return self.family.token_losses(batch, model)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """`token_losses`; ``model`` is the family's own module, adapted in place."""
        return self.token_losses(batch)

    def training(self) -> AbstractContextManager[object]:
        return nullcontext()

    def parts(self, batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        return batch["parts"]

    def count(self, part: Mapping[str, Any]) -> int:
        # The first position predicts nothing: no loss belongs to it.
        return int((part["labels"][:, 1:] != IGNORED).sum())

    def part_loss(self, part: Mapping[str, Any], total: int) -> tuple[Tensor, None]:
        return self.token_losses(part).sum() / max(total, 1), None

    def right(self, logits: Tensor, part: Mapping[str, Any]) -> int:
        raise TypeError("answers are generated, not chosen among classes: there is no such count in training")

    def masks(self, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Positions that count in C and G, by kind of token."""
        return self.family.masks(batch, self.weights)

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        with self.precision.autocast():
            self.family.forward(to_device(batch, self.family.device))


class Generation:
    """A `Kind`."""

    name: ClassVar[str] = "generation"

    def __init__(
        self, config: ExperimentConfig, family: Generative, precision: Precision, method: Method,
        tasks: Sequence[ConversationTask], probes: Sequence[ConversationTask],
    ) -> None:  # fmt: skip
        self.config, self.family, self.precision, self.method = config, family, precision, method
        self.tasks, self.probes = tasks, probes
        self._cache, self._frames = worker_caches(config)
        self._components: dict[str, dict[str, float]] = {}
        self._notes: dict[tuple[str, str], str] = {}
        self._folder: Path | None = None
        judged = any(task.scorer in JUDGED for task in [*tasks, *probes])
        self._judge: Judge | None = make_judge(config.judge.settings) if judged else None
        for task in [*tasks, *probes]:
            score(task.scorer, [], [], [])  # refuses an unknown scorer, now

    # -- data ------------------------------------------------------------------------------------------------------

    def sets(self, task: ConversationTask) -> Sets:
        validation = self.data_set(task.validation) if task.validation is not None else None
        return Sets(self._tensors(task.train, answers=True), self.data_set(task.test), validation)

    def data_set(self, samples: ConversationSet) -> ConversationTensors:
        return self._tensors(samples, answers=False)

    def _tensors(self, samples: ConversationSet | SampleStream, *, answers: bool) -> Any:
        sampling = self.config.video.sampling_of()
        if isinstance(samples, SampleStream):
            items = ConversationItems(self.family, samples.spec.max_pixels)
            return StreamTensors(samples, items, self.config.seed, sampling)
        return ConversationTensors(
            samples, self.family, self._cache, answers=answers, sampling=sampling, frames=self._frames
        )

    def default_targets(self) -> Mapping[str, Any]:
        parts = self.config.tuner.parts
        wanted = {part: state for part, state in parts.model_dump().items() if part in self.family.towers}
        protected = [part for part, state in wanted.items() if state == "protected"]
        free = [part for part, state in wanted.items() if state == "free"]
        targets: dict[str, Any] = {"target_modules": self.family.target_modules(protected)}
        return targets | ({"free_modules": self.family.target_modules(free)} if free else {})

    def info(self, task: ConversationTask) -> dict[str, Any]:
        return {
            "classes": [], "templates": [], "scorer": task.scorer, "max_new_tokens": task.max_new_tokens,
            "prompt": task.prompt, **({"video": self.config.video.model_dump()} if self._videos else {}),
        }  # fmt: skip

    # -- training --------------------------------------------------------------------------------------------------

    def objective(self, task: ConversationTask) -> GenerationObjective:
        weights = self.config.tuner.token_weights.model_dump()
        return GenerationObjective(self.family, task, self.precision, weights)

    def prepare_head(self, objective: GenerationObjective, data: Any, training: TrainingConfig) -> None: ...

    def statistics(
        self, objective: GenerationObjective, data: ConversationTensors | StreamTensors, training: TrainingConfig,
        config: KeepLoraConfig,
        seed: int,
    ) -> dict[str, Any]:  # fmt: skip
        size = training.micro_batch or training.batch_size
        singles = ordered_loader(data, 1, self.family.join, training.workers)  # what is replayed is as it was taught
        fewer = data.sampled(self.config.video.sampling_of(statistics=True))
        return {
            "batches": ordered_loader(fewer, size, self.family.join, training.workers),
            "loss_fn": objective.loss, "labels": data.labels, "objective": objective, "mask_fn": objective.masks,
            "forward_fn": objective.forward, "single_batches": singles,
        }  # fmt: skip

    def batches(
        self,
        objective: GenerationObjective,
        data: ConversationTensors | StreamTensors,
        training: TrainingConfig,
        seed: int,
    ) -> TaskBatches:
        if isinstance(data, StreamTensors):
            stream = StreamOrder(data.stream, training.batch_size, seed, grouped=training.group_by_length)
            parts = Parts(self.family.join, training.micro_batch)
            return TaskBatches(
                data, stream, streamed_loader(data, stream, parts, workers=training.workers), split_joined
            )
        order = training_order(data, training.batch_size, seed=seed, grouped=training.group_by_length)
        collate = Parts(self.family.join, training.micro_batch)
        loader = training_loader(data, order, collate, workers=training.workers)
        return TaskBatches(data, order, loader, partial(split_conversations, data, self.family.join))

    def first_batch(
        self, objective: GenerationObjective, data: ConversationTensors | StreamTensors, training: TrainingConfig
    ) -> tuple[Any, int]:
        n = min(len(data), training.micro_batch or training.batch_size)
        items = data.first(n) if isinstance(data, StreamTensors) else [data[i] for i in range(n)]
        return self.family.join(items), n

    # -- scoring ---------------------------------------------------------------------------------------------------

    def _answers(self, task: ConversationTask, data: ConversationTensors, on_batch: Callable[[], object]) -> list[str]:
        settings, size = self.config.generation, self.config.training.eval_batch_size
        lengths = data.lengths
        order = sorted(range(len(data)), key=lambda i: (lengths[i], i))
        answers = [""] * len(data)
        model = self.family.model
        with going_through(model, "evaluation"), self.family.evaluating(), self.precision.autocast():
            batches = list(share([order[start : start + size] for start in range(0, len(order), size)]))
            collate = partial(self.family.join, side="left")
            pieces = None if is_sharded(model) else Pieces(f"evaluation of {task.name!r}")
            read = chosen_loader(data, batches, collate, self.config.training.workers)
            for batch, mine in in_step(model, read, "evaluation"):
                indices = batch["index"].tolist()

                def answered(start: int, end: int, batch: Any = batch, indices: list[int] = indices) -> list[str]:
                    if end - start < len(indices):
                        batch = collate([data[i] for i in indices[start:end]])
                    return self.family.generate(
                        to_device(batch, self.family.device), max_new_tokens=task.max_new_tokens, sample=settings.sample,
                        temperature=settings.temperature, top_p=settings.top_p, seed=self.config.seed,
                    )  # fmt: skip

                found = [answered(0, len(indices))] if pieces is None else pieces(len(indices), answered)
                if not mine:
                    continue
                for i, answer in zip(indices, chain.from_iterable(found), strict=True):
                    answers[i] = answer
                on_batch()
        for given in ranks.exchange("evaluation", {i: answer for i, answer in enumerate(answers) if answer}):
            for i, answer in given.items():
                answers[i] = answer
        return answers

    def score(
        self, task: ConversationTask, data: ConversationTensors, learner: ContinualLearner, *, head: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None, keep: Path | None = None,
    ) -> float | None:  # fmt: skip
        with learner.serving(task.name):
            answers = self._answers(task, data, on_batch)
        asked, skipped = data.conversations.conversations, data.conversations.skipped
        # On rank 0 alone: a judge is asked, and paid, once.
        scored = ranks.first(
            "scoring",
            lambda: score(
                task.scorer, answers, [c.references for c in asked], [c.question for c in asked], judge=self._judge
            ),
        )
        if scored.missing:
            self._notes[task.name, "missing"] = f"{task.name}: {scored.missing}"
        if unparsable := int(scored.components.get("unparsable", 0)):
            self._notes[task.name, "judge"] = (
                f"{task.name}: the judge's words held no rating for {unparsable} of {len(asked)} answers, which count 0"
            )
        share = len(asked) / (len(asked) + len(skipped))  # a question whose file cannot be read scores 0
        if keep is not None and ranks.is_first():
            # The other components are of the questions that could be asked.
            counted = {"skipped": float(len(skipped))} if skipped else {}
            self._components[task.name] = dict(scored.components) | counted
            given = [*zip(asked, answers, scored.per_sample, strict=True), *((c, None, 0.0) for c in skipped)]
            rows = (
                {
                    "key": c.key, "question": c.question, "references": list(c.references), "prediction": answer,
                    "score": value,
                }
                for c, answer, value in given
            )  # fmt: skip
            keep.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(keep, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return None if scored.value is None else scored.value * share

    def per_sample(
        self, task: ConversationTask, data: ConversationTensors, learner: ContinualLearner, *, head: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None,
    ) -> list[float]:  # fmt: skip
        """Of a score that is of the whole set (CIDEr, BLEU), what its scorer gives each answer by itself."""
        with learner.serving(task.name):
            answers = self._answers(task, data, on_batch)
        asked = data.conversations.conversations
        references, questions = [c.references for c in asked], [c.question for c in asked]
        scored = score(task.scorer, answers, references, questions, judge=self._judge)
        if scored.value is None:
            raise KeepLoraError(f"{task.name}: {scored.missing}")
        return [100.0 * value for value in scored.per_sample] + [0.0] * len(data.conversations.skipped)

    def evaluation(self, learner: ContinualLearner) -> AbstractContextManager[object]:
        return nullcontext()

    def steps(self, data: ConversationTensors) -> int:
        return len(share(range(-(-len(data) // self.config.training.eval_batch_size))))

    # -- what is told ------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[ConversationTask]:
        yield from self.tasks
        yield from self.probes

    def results(self) -> dict[str, Any]:
        return {"chance": {}, "scorers": {t.name: t.scorer for t in self._all()}, "components": self._components}

    def comparison(self) -> list[Any]:
        settings = [[t.name, t.scorer, t.max_new_tokens] for t in self._all()]
        told: list[Any] = ["generation", settings, self.config.generation.model_dump()]
        told += [{"video": self.config.video.told}] if self._videos else []
        return told + ([{"judge": dict(self._judge.identity)}] if self._judge is not None else [])

    @property
    def _videos(self) -> bool:
        return any(task.test.has_videos or task.train.has_videos for task in self._all())

    @contextmanager
    def running(self, learner: ContinualLearner) -> Iterator[None]:
        """With gradient checkpointing where asked for, and a vision tower that nothing moves answered from memory."""
        training, family = self.config.training, self.family
        towers = [prefix for part, prefix in family.towers.items() if part.startswith("vision")]
        with ExitStack() as stack:
            if self._judge is not None:
                stack.callback(self._judge.close)
            if training.gradient_checkpointing:
                self.family.gradient_checkpointing(True)
                stack.callback(self.family.gradient_checkpointing, False)
            moved = tuple(f"{tower}." for tower in towers)
            if training.cache_vision and towers and not any(name.startswith(moved) for name in learner.store.names):
                modules = [family.model.get_submodule(tower) for tower in towers]
                most = _cache_bytes(family.device.type)
                stack.enter_context(VisionCache(*modules, max_bytes=most).active())
            yield

    def begin(self, folder: Path, earlier: Mapping[str, Any] | None) -> None:
        self._folder = folder
        self._components = dict((earlier or {}).get("components", {}))
        if not ranks.is_first():
            return
        if self._judge is not None:
            self._judge = make_judge(self.config.judge.settings, folder / "judgements.jsonl")
        for task in self._all():
            write_samples(folder, task.name, task.test, self.config.seed, self.config.video.sampling_of())

    def repeat(self, after: int) -> None:
        assert self._folder is not None
        before = self._folder / "predictions" / f"after-{after - 1}"
        if before.is_dir() and ranks.is_first():
            shutil.copytree(before, before.with_name(f"after-{after}"), dirs_exist_ok=True)

    def warnings(self) -> list[str]:
        return list(self._notes.values())
