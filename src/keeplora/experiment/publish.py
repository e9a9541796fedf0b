"""A run, a saved learner or a learner as a repository on the hub: stock adapter, ledger, model card."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from keeplora.errors import HubError
from keeplora.experiment.card_facts import Source, Told, base_of, collect, open_source
from keeplora.experiment.portable import check_clean, write_portable
from keeplora.files import atomic_dir, atomic_write_text
from keeplora.hub import Upload, check_repo_id, is_repo_id, upload
from keeplora.report.card import CardFacts, Contents, render_card, write_figure
from keeplora.tuner import ContinualLearner
from keeplora.tuner.ledger import slug
from keeplora.tuner.persistence import (
    ADAPTERS_FOLDER,
    LEDGER_FOLDER,
    concatenated,
    free_weights,
    write_peft_adapter,
)

CARD = "README.md"
NAMELESS = "user/name"
"""Stands in a card for the repository where it is written before there is one."""


def publish(
    source: str | os.PathLike[str] | ContinualLearner, repo_id: str, *, private: bool | None = None,
    revision: str | None = None, licence: str | None = None, languages: Sequence[str] = (), base_model: str | None = None,
    title: str | None = None, merged: bool = False, adapters: bool = False, with_samples: bool = False,
    token: str | None = None, message: str | None = None,
) -> Upload:  # fmt: skip
    """Make a repository on the Hugging Face hub hold what was learned, by one commit.

    At its root lies every task as one stock PEFT adapter, beside it the ledger, from which another machine can go on, and
    a model card. Predictions, samples, configurations and paths stay here; so does whatever training data a method keeps.

    Args:
        source: a run directory, a folder that `save_pretrained` wrote, or a `ContinualLearner`.
        repo_id: "owner/name"; made if it is not there.
        private: True: readable by nobody else. None: as the hub makes new repositories.
        revision: a branch; made if it is not there.
        licence: of what was learned here, as the card tells it; None: not told.
        languages: of the data, such as "en".
        base_model: the base model's name on the hub, where it was opened from a folder.
        title: heading of the card; None: the repository's name.
        merged: put the whole merged model beside the adapter.
        adapters: put each task's own adapter beside it as well.
        with_samples: publish also what a method keeps of its training data (replay, rail-dual).
        token: None: the one that ``hf auth login`` or HF_TOKEN left.
        message: of the commit.

    Raises:
        HubError: what cannot be published, and why; whether anything was.

    >>> publish("runs/demo-small-keeplora++-seed0", "me/three-tasks", licence="mit")  # doctest: +SKIP
    """
    check_repo_id(repo_id)
    told = Told(licence, tuple(languages), base_model, title)
    with tempfile.TemporaryDirectory(prefix="keeplora-push-") as scratch:
        folder = Path(scratch, "repository")
        facts = write_repository(
            source,
            folder,
            repo_id,
            told,
            merged=merged,
            adapters=adapters,
            with_samples=with_samples,
            token=token,
            online=True,
        )
        tasks = len(facts.learned)
        return upload(
            folder, repo_id, private=private, revision=revision, token=token,
            message=message or f"{tasks} task{'' if tasks == 1 else 's'}, with keeplora",
        )  # fmt: skip


def write_repository(
    source: str | os.PathLike[str] | ContinualLearner, folder: Path, repo_id: str, told: Told | None = None, *,
    merged: bool = False, adapters: bool = False, with_samples: bool = False, token: str | None = None, online: bool = False,
) -> CardFacts:  # fmt: skip
    """Write into the new ``folder`` what `publish` would upload, and nothing anywhere else.

    Raises:
        HubError: nothing was learned, something cannot be made of this method, or a file would tell a path or a token.
    """
    told = told or Told()
    if told.base_model is not None and not is_repo_id(told.base_model):
        raise HubError(f"--base-model {told.base_model!r} is not a name on the hub: give owner/name")
    if folder.exists():
        raise HubError(f"{folder} exists already: choose a new folder")
    with _opened(source) as found, atomic_dir(folder) as part:
        if not any(record.factors or record.full or record.tensors for record in found.records):
            raise HubError(f"{found.path}: nothing was learned yet, so there is nothing to publish")
        base = base_of(found, told, None, online=False)
        name = base.name if found.ledger.head["base"]["name"] or told.base_model else ""
        left_out = write_portable(found.ledger, part / LEDGER_FOLDER, name, with_samples)
        contents = _weights(found, part, base.hub_id or "", merged, adapters or not found.learner.accumulates)
        if found.run is not None and found.run.accuracy:
            write_figure(found.run, part)
        samples = with_samples and any(record.tensors for record in found.records)
        contents = dataclasses.replace(
            contents, figure=(part / "figures").is_dir(), samples=samples, left_out=tuple(left_out)
        )
        facts = collect(found, repo_id, told, contents, online)
        atomic_write_text(part / CARD, render_card(facts))
        check_clean(part, _machine(found), (token or "", os.environ.get("HF_TOKEN", "")))
    return facts


def write_card(
    source: str | os.PathLike[str] | ContinualLearner, path: str | os.PathLike[str] | None = None, repo_id: str = NAMELESS,
    told: Told | None = None,
) -> str:  # fmt: skip
    """The model card alone, written to ``path`` where one is given; what it lists is what `publish` puts there by default."""
    with _opened(source) as found:
        adapter = _has_adapter(found)
        contents = Contents(adapter, why_no_adapter="" if adapter else _why_no_adapter(found))
        text = render_card(collect(found, repo_id, told or Told(), contents))
    if path is not None:
        atomic_write_text(path, text)
    return text


@contextmanager
def _opened(source: str | os.PathLike[str] | ContinualLearner) -> Iterator[Source]:
    if not isinstance(source, ContinualLearner):
        yield open_source(Path(source))
        return
    with tempfile.TemporaryDirectory(prefix="keeplora-push-") as scratch:
        path = source.save_pretrained(Path(scratch, "learner"))
        yield dataclasses.replace(open_source(path), learner=type(source), live=source)


def _has_adapter(source: Source) -> bool:
    """Whether one adapter holds what was learned, and can be written: whole modules in it need the model at hand."""
    at_hand = source.live is not None or source.run is not None
    whole = any(record.full for record in source.records)
    return not source.learner.unmergeable and bool(concatenated(source.records)) and (at_hand or not whole)


def _why_no_adapter(source: Source) -> str:
    """Words that follow "the method"."""
    if source.learner.unmergeable:
        return source.learner.unmergeable
    if not concatenated(source.records):
        return "leaves whole weights, no low-rank factors"
    return "trains modules in full, which an adapter can hold only together with the base model"


def _weights(source: Source, folder: Path, base_name: str, merged: bool, adapters: bool) -> Contents:
    """The adapter at the root, single tasks' and the merged model where they are asked for and can be made."""
    adapter = _has_adapter(source)
    whole = any(record.full for record in source.records)  # free modules, beside factors
    learner = source.live or (_trained(source) if adapter and whole else None)
    if adapter:
        free = free_weights(learner, source.records) if learner is not None else None
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = write_peft_adapter(Path(scratch, "adapter"), concatenated(source.records), base_name, free)
            for file in made.iterdir():
                file.rename(folder / file.name)
    tasks = []
    for i, record in enumerate(source.records, 1):
        if adapters and record.factors and not (record.full and learner is None):
            free = free_weights(learner, [record]) if learner is not None else None
            tasks.append(f"{getattr(record, 'entry', 0) or i:04d}-{slug(record.name)}")
            write_peft_adapter(folder / ADAPTERS_FOLDER / tasks[-1], record.factors, base_name, free)
    if merged:
        _write_merged(source, folder / "merged")
    why = "" if adapter else _why_no_adapter(source)
    return Contents(adapter=adapter, task_adapters=tuple(tasks), merged=merged, why_no_adapter=why)


def _trained(source: Source) -> ContinualLearner:
    from keeplora.experiment.serving import TrainedModel

    return TrainedModel(source.path, device="cpu").learner


def _write_merged(source: Source, target: Path) -> None:
    """The whole model with every task in its weights."""
    if source.learner.unmergeable:
        raise HubError(f"--merged: the method {source.learner.unmergeable}")
    if source.config:
        from keeplora.experiment.serving import TrainedModel

        TrainedModel(source.path, device="cpu").export(target, "merged")
    elif source.live is not None and hasattr(source.live.model, "save_pretrained"):
        if source.live.serving_cost().layers:
            raise HubError("--merged: the base is quantised and never merged; publish the adapter")
        source.live.model.save_pretrained(target)  # type: ignore[operator]
    else:
        raise HubError(
            f"--merged: {source.path} has no base model at hand; publish the run directory or the learner itself"
        )


def _machine(source: Source) -> list[str]:
    """Paths that say where this machine keeps what."""
    keys = ("base_dir", "data_dir", "output")
    folders = [str(source.config[key]) for key in keys if source.config.get(key)] + [str(source.path.resolve())]
    folders += [spec["base_dir"] for spec in source.config.get("tasks") or [] if spec.get("base_dir")]
    model = str(source.ledger.head["base"]["name"] or "")
    folders += [model] if os.path.isabs(model) else []
    return [str(Path.home()), os.getcwd(), *filter(os.path.isabs, folders)]
