"""The learner: one task after another on one model, with what was learned before protected."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.tuner import ranks
from keeplora.tuner.acceptance import Acceptance
from keeplora.tuner.adapter import TaskAdapter
from keeplora.tuner.adapter_store import make_store
from keeplora.tuner.basis import Bases
from keeplora.tuner.basis_cache import weight_subspace
from keeplora.tuner.capacity import frozen_targets, warn_before_full
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.free import FreeModules
from keeplora.tuner.inspection import Inspection
from keeplora.tuner.joining import join
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.linear_algebra import LinearAlgebra
from keeplora.tuner.objective import Objective
from keeplora.tuner.observers import LossFn, MaskFn, attention_masks
from keeplora.tuner.options import make_options
from keeplora.tuner.persistence import apply_records, create_ledger, ledger_config, open_ledger
from keeplora.tuner.protect import check_budget, protect, same_update
from keeplora.tuner.rank_warning import warn_of_rank
from keeplora.tuner.sampling import check_repeatable
from keeplora.tuner.statistics import report_capacity, task_factors, task_features, task_gradients
from keeplora.tuner.targets import Target, resolve_targets
from keeplora.tuner.task import OpenTask, TaskState
from keeplora.tuner.unlabelled import TaskStream
from keeplora.tuner.weights import Snapshot, WeightStore
from keeplora.tuner.wrapping import unwrap, wrapping_of


class ContinualLearner(Inspection):
    """Teach ``model`` one task after another (KeepLoRA++, arXiv 2606.16256).

    Args:
        model: any `nn.Module` whose targets are `nn.Linear`, bitsandbytes' 8- and 4-bit ones among them. It is changed in
            place, target weights (and free modules) alone; beside quantised targets, past tasks run as an adapter.
        config: a `KeepLoraConfig`; its ``target_modules`` must be set.
        ledger: a folder that does not exist yet; if given, every finished task is written there at once.
        base_name, base_revision: how the base model is called in the ledger.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> learner = ContinualLearner(model, KeepLoraConfig(r=1, target_modules=["0"], energy_weights=0.5))
    >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
    >>> loss = lambda m, batch: torch.nn.functional.cross_entropy(m(batch[0]), batch[1])
    >>> with learner.task("first", [(x, y)], loss) as peft_model:
    ...     trainable = [p for p in peft_model.parameters() if p.requires_grad]
    ...     optimizer = torch.optim.SGD(trainable, lr=0.1)
    ...     loss(peft_model, (x, y)).backward()
    ...     optimizer.step()
    >>> [record.name for record in learner.records]
    ['first']
    """

    def __init__(
        self, model: nn.Module, config: KeepLoraConfig, *, ledger: str | Path | None = None, base_name: str = "",
        base_revision: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        # torch.compile wraps the module; under the wrapper's names the ledger would belong to compiled models alone.
        model = getattr(model, "_orig_mod", model)
        self.model = model
        self.config = config
        self.base_name, self.base_revision = base_name, base_revision
        self.options = make_options(self.Options, config.options)
        if (type(self)._initial_A, type(self)._attach) != (ContinualLearner._initial_A, ContinualLearner._attach):
            config.refuse_choices_of_A(type(self).__name__)
        self.targets: list[Target] = resolve_targets(model, config)
        self.free = FreeModules(model, config, self.targets)
        self.store = self._make_store()
        self.algebra = LinearAlgebra(config.linear_algebra)
        join(self)
        if ledger is not None:
            self.keep_in(ledger)

    def keep_in(self, ledger: str | Path) -> None:
        """Make a new ledger in the folder ``ledger``, and write every task into it from here on."""
        check_budget(self)
        ranks.first("making the ledger", lambda: self._write_to(create_ledger(self, ledger)))

    # ---- the state of the method -------------------------------------------------------------------------------

    @property
    def U(self) -> Bases:
        """The protected subspace of each target, (in, k) float32 on the CPU, made when asked for; starts as M1's basis of W₀.

        `Bases.subspace` is what projections are made with: U, or where it passes half the width its complement.
        """
        if self._U is None:
            energy = {t.name: self.config.for_tower("energy_weights", t.tower) for t in self.targets if self.protects}
            self._U = Bases.of(
                self.store.per_weight(
                    "the bases of the weights",
                    list(energy),
                    lambda n, W0, device: weight_subspace(W0, energy[n], device),
                    self.algebra,
                )
            )
        return self._U

    # ---- tasks -------------------------------------------------------------------------------------------------

    def start_task(
        self,
        name: str,
        batches: Iterable[Any],
        loss_fn: LossFn,
        *,
        labels: Sequence[int] | None = None,
        feature_batches: Iterable[Any] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        mask_fn: MaskFn | None = None,
        accept: Mapping[str, Any] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        info: Mapping[str, Any] | None = None,
        objective: Objective | None = None,
        reference: Iterable[Any] | None = None,
        single_batches: Iterable[Any] | None = None,
        general_batches: Iterable[Any] | None = None,
        saved: TaskState | None = None,
    ) -> PeftModel | nn.Module:
        """Take the statistics of a new task and return the model to train.

        Args:
            name: unique among the learned tasks.
            batches: the task's training data, a `DataLoader` or any iterable that can be gone through more than once.
            loss_fn: ``loss_fn(model, batch)``, the loss that the task trains with: a scalar (mean over the batch),
                a 1-D tensor (one loss per sample or answer token), or a pair (sum, count).
            labels: class of each sample of the loader's dataset, to stratify ``gradient_samples`` / ``feature_samples``.
            feature_batches, forward_fn: data and forward call of the feature pass (M8) where they differ from
                ``batches`` and ``loss_fn``: a dual encoder feeds pictures first and each class prompt once. They are
                taken whole: ``feature_samples`` caps ``batches`` alone.
            mask_fn: per tower, which positions count (METHOD.md point 5); default: the batch's ``attention_mask``.
            accept: ``{"max_drop": points, "action": "warn" | "undo"}``: how far what ``evaluate`` returns may fall.
            evaluate: returns a number per old task or probe, higher is better; called now and after the merge.
            info: JSON values to keep in the task's record.
            objective: the task's features and logits, for the methods that need more than a loss (`Objective`).
            reference: batches of other pictures and texts, for the methods that ask for them (zscl).
            single_batches: the data as batches of one sample, re-iterable, for the methods that need samples one by one
                where a batch cannot be cut by itself (ewc, replay on generative models).
            general_batches: samples of no task, as ``forward_fn`` takes them, for ``energy_general`` (ε_g): drawn pictures, or
                unlabelled ones of your own. They may feed some towers alone.
            saved: what `task_state` gave while this task was open in another process: it is opened again without taking
                its statistics anew. Trained parameters are the caller's to put back.

        Returns:
            A stock `peft.PeftModel` around the same model: A set and frozen, B = 0, an alpha per layer.
        """
        self._require_none_open()
        if any(record.name == name for record in self.records):
            raise KeepLoraError(f"a task named {name!r} was learned already: choose another name")
        check_budget(self)
        if self.protects and (feature_batches is None or self.config.memory == "gradients"):
            check_repeatable(batches, f"task {name!r}: batches")
        frozen = frozen_targets(self, name)
        acceptance = Acceptance.begin(accept, evaluate, saved.values.get("before") if saved else None)
        if acceptance is not None:
            acceptance.before = ranks.agreed("what `evaluate` returned", acceptance.before)
        task = OpenTask(
            name, batches, loss_fn, labels, feature_batches, forward_fn, mask_fn or attention_masks, acceptance,
            objective, reference, single_batches, general_batches, frozen=frozen, info=dict(info or {}), saved=saved,
        )  # fmt: skip
        try:
            if ranks.active():
                self.store.keep()  # wrappers for several processes write rank 0's weights into all the others'
            model = self._attach(task)
            self.free.open(task, self.store)
            task.wrapping = wrapping_of(model)
            if saved is not None:
                self.load_task_state(task, saved)
        except BaseException:
            self._release(task)
            raise
        self._open = task
        return model

    def finish_task(
        self, *, tensors: Mapping[str, Tensor] | None = None, info: Mapping[str, Any] | None = None
    ) -> TaskRecord | None:
        """Merge what was trained (M7), protect the task's features (M8), and enter it into the ledger.

        Returns:
            The record; None if ``accept`` undid the task. Whatever raises in here undoes the task before it leaves.
        """
        task = self._require_open()
        task.tensors.update({k: v.detach().cpu() for k, v in (tensors or {}).items()})
        task.info.update(info or {})
        before = self.store.snapshot()
        U_before = self._U
        try:
            unwrap(task.wrapping, keep_trained=True)
            with ranks.together("taking the adapter out"):
                record = self._detach(task)
                record.full = {**self.free.updates(task, self.store), **record.full}
            same_update(record)
            with ranks.together("merging"):
                self._release(task)
                if self.accumulates:
                    self.store.add(record.updates)
                else:
                    self.store.write(record.updates)
            record.info = task.info
            record.tensors = {**record.tensors, **task.tensors}
            if task.acceptance is not None:
                passes = ranks.agreed("what `evaluate` returned", task.acceptance.passes(task.name))
                if not passes:
                    self._undo(before, U_before)
                    return None
            started = time.perf_counter()
            if self.protects:
                self._protect(task, record)
            self._remember(task, record)
            task.statistics_seconds += time.perf_counter() - started
            record.info.setdefault("statistics_seconds", round(task.statistics_seconds, 3))
            if (cost := self.store.serving_cost()).layers:
                record.info["serving_cost"] = cost.to_dict()
            self._enter(record)
        except BaseException:
            self._undo(before, U_before)
            raise
        self._open = None
        self._leave_factors_on_disk()
        if self.protects:
            warn_before_full(self)
        return record

    def abort_task(self) -> None:
        """Drop the open task: adapter, hooks and gradients go, weights are bit-identical to before it started."""
        self._require_open()
        self._undo(self.store.snapshot(), self._U)

    @contextlib.contextmanager
    def task(self, name: str, batches: Iterable[Any], loss_fn: LossFn, **kwargs: Any) -> Iterator[Any]:
        """`start_task` … `finish_task` as a block; an exception inside undoes everything and goes on upwards."""
        model = self.start_task(name, batches, loss_fn, **kwargs)
        try:
            yield model
        except BaseException as error:
            self.abort_task()
            if (cause := ranks.blame(error)) is not error:
                raise cause from error
            raise
        self.finish_task()

    def unlabelled(self, batches: Iterable[Any], loss_fn: LossFn, **options: Any) -> TaskStream:
        """The tasks of a stream without task labels: ``for task in learner.unlabelled(...): with task as peft_model: ...``.

        ``batches`` is gone through once. ``options`` are those of `keeplora.tuner.unlabelled.TaskStream`: ``alarm_rate`` (false
        alarms per sample), ``warmup`` (samples a task is told from), and more; see docs/analyze-tasks.md.
        """
        return TaskStream(self, batches, loss_fn, **options)

    def sit_out(self, name: str, info: Mapping[str, Any] | None = None) -> TaskRecord:
        """Enter a task that could not be learned (no capacity left) as a record without factors, so that counts agree."""
        record = self._enter(TaskRecord(name, used=self.U.dims(), info=dict(info or {})))
        self._U = self.U.extended(record)  # adds nothing, but U counts tasks
        return record

    def _undo(self, snapshot: Snapshot, U: Bases | None) -> None:
        task, self._open = self._open, None
        if task is not None:
            self._release(task)
        self.store.restore(snapshot)
        self._U = U

    @staticmethod
    def _release(task: OpenTask) -> None:
        unwrap(task.wrapping, keep_trained=False)
        release, task.release = task.release, None
        if release is not None:
            release()

    # ---- what a training loop and whoever serves the model call ---------------------------------------------------

    def task_state(self) -> TaskState:
        """What the open task has that neither the ledger nor the trained parameters hold (`start_task(saved=...)`).

        A method whose `penalty` or `after_step` remembers something between steps adds it here and takes it back in
        `load_task_state`.
        """
        task = self._require_open()
        A = {} if task.adapter is None else task.adapter.A0
        values = {"info": dict(task.info), "statistics_seconds": task.statistics_seconds}
        if task.acceptance is not None:
            values["before"] = task.acceptance.before
        return TaskState({f"A/{name}": a for name, a in A.items()}, values)

    def load_task_state(self, task: OpenTask, saved: TaskState) -> None:
        """Take back what `task_state` gave, into a task that `_attach` has just opened."""
        task.info |= saved.values["info"]
        task.statistics_seconds = saved.values["statistics_seconds"]

    # ---- what a method decides: overridden by the baselines ------------------------------------------------------

    def _make_store(self) -> WeightStore:
        """The weights that the method moves: those of the targets, and the free modules'."""
        return make_store(self.model, [t.name for t in self.targets], self.free.parameters)

    def _initial_A(self, task: OpenTask) -> dict[str, Tensor]:
        """A per target: the top directions of the residual gradient (M2–M4)."""
        started = time.perf_counter()
        A = task_factors(self, task)
        task.statistics_seconds += time.perf_counter() - started
        report_capacity(
            task, self.targets, A, "lower energy_features, energy_weights or energy_general, or add targets"
        )
        return A

    def _attach(self, task: OpenTask) -> nn.Module:
        warn_of_rank(self, task)
        A = self._initial_A(task) if task.saved is None else task.saved.group("A")
        A = ranks.agreed("A", A)  # from one process: its bits are what the ledger will hold
        task.adapter = TaskAdapter(self.model, self.targets, A, trainable_A=self.trains_A, shard=self.shards_B)
        task.release = task.adapter.remove
        task.info["trained_parameters"] = sum(p.numel() for p in task.adapter.trainable_parameters())
        return task.adapter.peft_model

    def _detach(self, task: OpenTask) -> TaskRecord:
        assert task.adapter is not None
        return TaskRecord(task.name, factors=task.adapter.factors())

    def _protect(self, task: OpenTask, record: TaskRecord) -> None:
        """The task's features (M8) or gradients (M8g) join U."""
        if self.config.memory == "gradients":
            protect(self, record, task_gradients(self, task).pop)
        else:
            features = task_features(self, task)
            protect(self, record, features.C, features.leader)

    # ---- keeping -------------------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish what was learned as a repository on the hub; ``options`` are `keeplora.publish`'s."""
        # Upwards, for whoever has only the learner; pyproject.toml allows this one.
        from keeplora.experiment.publish import publish

        return ranks.first("publishing", lambda: publish(self, repo_id, **options))

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], model: nn.Module, *, append: bool = False, revision: str | None = None
    ) -> ContinualLearner:
        """Open a saved learner on the untouched base ``model``.

        Args:
            directory: a folder, or "owner/name" on the hub. append: write further tasks into the same ledger, a folder's.
            revision: branch, tag or commit on the hub.
        """
        with ranks.together("opening the ledger"):
            ledger = open_ledger(directory, revision, append=append)
            base, config = ledger.head["base"], ledger_config(ledger)
        learner = cls(model, config, base_name=str(base.get("name") or ""))
        learner.base_revision = base.get("revision")
        with ranks.together("reading the ledger"):
            apply_records(learner, ledger)
            learner._recall(learner.records)
        if append:
            ranks.first("opening the ledger for more tasks", lambda: learner._write_to(ledger))
        return learner
