"""The ledger of a run, of a saved learner, or by itself: opened, and changed under the lock that a run takes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError, LedgerError
from keeplora.evaluation.metrics import summary
from keeplora.experiment.folder_lock import FolderLock
from keeplora.experiment.results import Scores, settled_count, task_info
from keeplora.experiment.rows import Columns, add_kept_rows, add_missing_events
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.serving import TrainedModel, check_export
from keeplora.files import expand, real_path
from keeplora.methods import Method, get_method, method_names
from keeplora.models import load_model
from keeplora.report import render_report
from keeplora.transfer import refuse_address
from keeplora.tuner import ContinualLearner, Ledger
from keeplora.tuner.audit import FACTOR_LIMIT
from keeplora.tuner.chain import State
from keeplora.tuner.export import choose_records, write_adapter
from keeplora.tuner.ledger_check import Check
from keeplora.tuner.ledger_files import no_ledger
from keeplora.tuner.persistence import ADAPTERS_FOLDER, LEDGER_FOLDER, all_updates, free_weights

OPERATIONS = ("rollback", "remove", "restore", "purge")


@dataclass(frozen=True)
class LedgerPlace:
    """Where a ledger is.

    Attributes:
        root: the folder that is locked: a run directory, a saved learner, or the ledger itself.
        ledger: opened. run: whether ``root`` is a run directory.
    """

    root: Path
    ledger: Ledger
    run: bool

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LedgerPlace:
        """From any of the three kinds of folder; `LedgerError` where there is none."""
        refuse_address(path, "a ledger")
        path = expand(path)
        if not path.is_dir():
            raise LedgerError(
                f"{path} is not a folder: give a run directory, a saved learner, or a ledger's own folder"
            )
        if (path / LEDGER_FOLDER / "ledger.json").is_file():
            root, folder = path, path / LEDGER_FOLDER
        elif (path / "ledger.json").is_file():
            folder, above = path, real_path(path).parent
            whole = real_path(path).name == LEDGER_FOLDER and any(
                (above / name).exists() for name in ("config.yaml", ADAPTERS_FOLDER)
            )
            root = above if whole else path
        else:
            raise LedgerError(no_ledger(path))
        return cls(root, Ledger.open(folder), root != folder and (root / "config.yaml").is_file())

    def method(self) -> Method | None:
        """The method that wrote the ledger, where that can be told."""
        if self.run:
            return get_method(str(RunDirectory(self.root).read_config().get("method")))
        wanted = self.ledger.told.get("class")
        return next((m for m in map(get_method, method_names()) if m.learner.__name__ == wanted), None)

    def change(self, operation: str, task: int | str) -> State:
        """One of `OPERATIONS`, under the folder's lock; a run's status, results and report follow it.

        Raises:
            KeepLoraError: a run is writing to the folder; the ledger does not allow it; the method does not.
        """
        assert operation in OPERATIONS
        method = self.method()
        if operation == "remove" and method is not None and method.learner.irremovable:
            raise LedgerError(
                f"{self.root}: no task of it can be removed, for {method.name} {method.learner.irremovable}; go back to an "
                "earlier task with rollback"
            )
        with self._locked() as directory:
            results = directory.read_results() if directory is not None else None
            before = self.ledger.state().active
            if results:
                _keep_rows(self.ledger, results)
            if operation == "purge":
                chain = self.ledger.chain()
                aside = [i for i in chain.tasks() if i not in chain.state.active and i not in chain.state.purged]
                entry = chain.find(task, aside)
                state = self.ledger.purge(entry)
                for folder in self.root.glob(f"{ADAPTERS_FOLDER}/{entry:04d}-*"):
                    shutil.rmtree(folder)
            else:
                state = getattr(self.ledger, operation)(task)
            if directory is not None:
                if results and state.active != before:
                    results["audit"] = None  # of other weights; `keeplora audit` and a resumed run measure it anew
                _follow(directory, self.ledger, results)
        return state

    def open_learner(self, model: str | None) -> tuple[ContinualLearner, Any]:
        """(the learner, its model's family): a run's own model, else the base model of that name."""
        if self.run and model is None:
            trained = TrainedModel(self.root, device="cpu")
            return trained.learner, trained.family
        if model is None:
            raise KeepLoraError(f"{self.root} does not hold its base model: name it with --model")
        method = self.method()
        family = load_model(model, device="cpu")
        learner = method.learner if method is not None else ContinualLearner
        return learner.from_pretrained(self.ledger.path, family.model), family

    def check_model(self, model: str | None) -> Iterator[Check]:
        """With the base model: its hash (`LedgerError` where it is another), and both leaks of METHOD.md's point 6."""
        learner, _ = self.open_learner(model)
        yield Check("hash of the base model's target weights", learner.base_name or str(self.root))
        if not learner.protects or not learner.records:
            return
        audit = learner.audit()
        yield Check("factors: worst ‖B A U‖/‖B A‖", str(self.root), audit.factor_leak_max, FACTOR_LIMIT)
        weights = [row for row in audit.rows if row.weight_leak is not None]
        if weights:
            worst = max(weights, key=lambda row: row.weight_leak or 0.0)
            floor = f"rounding to their dtype alone leaks {worst.weight_floor or 0.0:.1e} there"
            yield Check(f"weights: worst leak; {floor}", worst.layer, worst.weight_leak)

    def export(
        self, target: str | os.PathLike[str], format: str, *, upto: str | None = None,
        tasks: Sequence[str] | None = None, model: str | None = None,
    ) -> Path:  # fmt: skip
        """`TrainedModel.export` for any ledger; an adapter needs the base model only where whole modules were trained."""
        if self.run:
            if model is not None:
                raise KeepLoraError(
                    f"{self.root} is a run directory, which names its base model itself: leave --model out"
                )
            return TrainedModel(self.root, device="cpu").export(target, format, upto=upto, tasks=tasks)
        target = check_export(target, format)
        if reason := self.ledger.told.get("unmergeable"):
            raise KeepLoraError(f"{self.root}: its method {reason}")
        chain = self.ledger.chain()
        aside = chain.names(chain.tasks())
        records = choose_records(self.ledger.records(), upto=upto, tasks=tasks, aside=aside)
        layers = self.ledger.targets
        if self.ledger.irremovable and [r.entry for r in records] != list(chain.state.active[: len(records)]):
            raise KeepLoraError(
                f"{self.root}: a selection cannot be exported, for its method {self.ledger.irremovable}"
            )
        if format == "peft" and not any(name not in layers for record in records for name in record.full):
            return write_adapter(target, records, self.ledger.head["base"].get("name") or "", layers, where=self.root)
        learner, family = self.open_learner(model)
        if format == "peft":
            return write_adapter(target, records, family.name, layers, free_weights(learner, records), where=self.root)
        learner.store.restore(all_updates(records))
        return family.save_pretrained(target)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[RunDirectory | None]:
        if self.run:
            with RunDirectory.open_existing(self.root) as directory:
                yield directory
            return
        lock = FolderLock(self.root)
        try:
            lock.acquire()
        except OSError as error:
            raise KeepLoraError(f"{self.root} cannot be written to: {error.strerror or error}") from None
        try:
            yield None
        finally:
            lock.release()


def _in_force(ledger: Ledger) -> dict[str, int]:
    """Entries of the tasks that a run need not learn any more, by name: removed ones, then active ones."""
    chain = ledger.chain()
    return {chain.steps[i - 1].name: i for i in (*chain.state.removed, *chain.state.active)}


def _keep_rows(ledger: Ledger, results: Mapping[str, Any]) -> None:
    """Before the ledger goes back: rows that only results.json has are put beside their tasks."""
    columns, entries, at = Columns.from_results(results), ledger.entries(), _in_force(ledger)
    rows = list(zip(results["accuracy"], results["probe_accuracy"], strict=False))[1:]
    seconds = {info["name"]: info["seconds"] for info in results["tasks_info"]}
    for name, (tasks, probes) in zip(columns.tasks, rows, strict=False):
        if name in at and entries[at[name] - 1].metrics() is None:
            ledger.write_metrics(at[name], columns.kept(name, tasks, probes, seconds.get(name, {})))


def _follow(directory: RunDirectory, ledger: Ledger, results: dict[str, Any] | None) -> None:
    """A run's other files say what its ledger says: as many rows as there are tasks, and which ones were removed."""
    at = _in_force(ledger)
    order = results["tasks"] if results else [e["name"] for e in directory.read_data() if e.get("kind") == "task"]
    done = next((i for i, name in enumerate(order) if name not in at), len(order))
    status = directory.read_status()
    try:
        settled_count(at, order, directory.path)
        error = status.get("error") if status.get("tasks_done") == done else None
        error = error or "not all tasks are learned; go on with `keeplora resume`"
    except KeepLoraError as found:
        error = str(found)
    directory.set_status(state="interrupted", tasks_done=done, error=error)
    if not results:
        return
    columns, entries, chain = Columns.from_results(results), ledger.entries(), ledger.chain()
    tasks = [at[name] for name in order[:done]]
    infos = []
    for name, entry in zip(order, tasks, strict=False):
        info, metrics = dict(entries[entry - 1].value["info"]), entries[entry - 1].metrics() or {}
        parts = (info.get("seconds"), metrics.get("seconds"))
        info["seconds"] = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
        infos.append((name, info))
    # Of every row but the first, the ledger's: a task that was learned again has a row of its own.
    scores = Scores(results["accuracy"][:1], results["probe_accuracy"][:1])
    if scores.tasks:
        add_kept_rows(scores, ledger, tasks, columns, upto=done - 1)
    results |= {
        "accuracy": scores.tasks, "probe_accuracy": scores.probes, "metrics": summary(scores.tasks, scores.probes),
        "tasks_info": [task_info(name, info) for name, info in infos],
        "removed": list(dict.fromkeys(n for n in chain.names(chain.state.removed) if at[n] in chain.state.removed)),
        "layers": [_layer(layer, [entries[i - 1].value["layers"] for i in tasks], [
            i in chain.state.history for i in tasks]) for layer in results["layers"]],
    }  # fmt: skip
    directory.write_results(results)
    if done == len(order) == len(scores.tasks) - 1:
        directory.set_status(state="finished", error=None)
    if scores.tasks:
        add_missing_events(directory, scores, infos, columns)
        directory.cut_events(len(scores.tasks) - 1)
    render_report(directory.path)


def _layer(layer: dict[str, Any], tasks: list[dict[str, Any]], inside: list[bool]) -> dict[str, Any]:
    used, rank = layer["used"][:1], []
    for layers, kept in zip(tasks, inside, strict=True):
        told = layers.get(layer["layer"], {}) if kept else {}
        used.append(told.get("used") if told.get("used") is not None else used[-1])
        rank.append(told.get("rank") or 0)
    return {**layer, "used": used, "rank": rank}
