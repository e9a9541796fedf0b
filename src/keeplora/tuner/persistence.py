"""Between a learner and its folder: the ledger, and one stock PEFT adapter per task beside it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from keeplora.errors import KeepLoraError, LedgerError, TargetError
from keeplora.files import atomic_dir, atomic_write_json
from keeplora.hub import local_folder
from keeplora.math import Subspace
from keeplora.retired import without_retired
from keeplora.tuner.adapter import Factors, concatenate
from keeplora.tuner.basis import check_values, in_force
from keeplora.tuner.chain import TASK
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.ledger import Ledger, TaskRecord, slug
from keeplora.tuner.ledger_files import no_ledger
from keeplora.tuner.quantised import quantisation
from keeplora.tuner.weights import Snapshot, WeightStore

if TYPE_CHECKING:
    from keeplora.tuner.learner import ContinualLearner

LEDGER_FOLDER = "ledger"
ADAPTERS_FOLDER = "adapters"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    out = {}
    for package in ("keeplora", "torch", "transformers", "peft", "safetensors"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
            out[package] = "unknown"
    return out


def create_ledger(learner: ContinualLearner, path: str | Path) -> Ledger:
    """A new ledger for the learner's base model, targets and config; holds U₀ where the method has one."""
    return Ledger.create(
        path,
        base={
            "name": learner.base_name, "revision": learner.base_revision, "class": type(learner.model).__name__,
            "hash": learner.store.base_hash(),
        },
        targets=[asdict(t) for t in learner.targets],
        config=learner.config.to_dict(),
        bases=learner.U.start,
        versions=versions(),
        learner=learner._told(),
    )  # fmt: skip


def save_learner(learner: ContinualLearner, directory: str | Path) -> Path:
    """``directory/ledger`` and ``directory/adapters/<task>``; whole or not at all."""
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise LedgerError(f"{directory} is not empty: save_pretrained writes into a new or empty folder")
    if directory.exists():
        directory.rmdir()
    with atomic_dir(directory) as part:
        _copy_chain(learner, create_ledger(learner, part / LEDGER_FOLDER))
        for record in learner.records:
            if record.factors:
                write_peft_adapter(
                    part / ADAPTERS_FOLDER / f"{record.entry:04d}-{slug(record.name)}", record.factors,
                    learner.base_name, free_weights(learner, [record]),
                )  # fmt: skip
    return directory


def _copy_chain(learner: ContinualLearner, ledger: Ledger) -> None:
    """Every entry that the learner has behind it, so that what was taken out can still be put back."""
    chain = learner._chain
    known = learner._source.entries() if learner._source is not None else []
    for i, step in enumerate(chain.steps, 1):
        if step.kind != TASK:
            ledger.enter(step)
            continue
        ledger.append(replace(learner._task(i)), purged=i in chain.state.purged)
        if i <= len(known) and (metrics := known[i - 1].metrics()) is not None:
            ledger.write_metrics(i, metrics)


def free_weights(learner: ContinualLearner, records: Sequence[TaskRecord] | None = None) -> dict[str, Tensor]:
    """round(W₀ + ΔW) of every free module's parameters, for `write_peft_adapter`; by default of all records together."""
    updates = all_updates(learner.records if records is None else records)
    out = {}
    for name in learner.free.parameters:
        W = W0 = learner.store.W0[name]
        for update in updates.get(name, ()):
            assert isinstance(update, Tensor)
            W = W.to(torch.float32) + update
        out[name] = W.to(W0.dtype)
    return out


def write_peft_adapter(
    path: Path, factors: dict[str, Factors], base_name: str, free: Mapping[str, Tensor] | None = None
) -> Path:
    """A stock PEFT folder. s is folded into B, alpha = r everywhere and init plain: old and new servers read it alike.

    Layers of lower rank keep theirs through ``rank_pattern`` with an equal ``alpha_pattern``, so every scaling is 1.
    ``free``, whole parameters by their full names (`free_weights`), become PEFT's ``modules_to_save``.
    """
    free = free or {}
    ranks = {name: f.A.shape[0] for name, f in factors.items()}
    r = max(ranks.values())
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r, lora_alpha=r, target_modules=sorted(factors), init_lora_weights=True, rank_pattern=pattern,
        alpha_pattern=dict(pattern), base_model_name_or_path=base_name or None, inference_mode=True,
        modules_to_save=sorted({name.rpartition(".")[0] for name in free}) or None,
    )  # fmt: skip
    tensors: dict[str, Tensor] = {f"base_model.model.{name}": W.contiguous() for name, W in free.items()}
    for name, f in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = f.A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (f.s * f.B).contiguous()
    values = config.to_dict()
    values["target_modules"] = sorted(factors)
    with atomic_dir(path) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        atomic_write_json(part / "adapter_config.json", values)
    return path


def concatenated(records: list[TaskRecord]) -> dict[str, Factors]:
    """Σ_t s_t B_t A_t of every layer as one pair of factors (`keeplora.tuner.adapter.concatenate`)."""
    names = sorted({name for record in records for name in record.factors})
    found = {name: concatenate([r.factors[name] for r in records if name in r.factors]) for name in names}
    return {name: f for name, f in found.items() if f is not None}


def all_updates(records: Sequence[TaskRecord]) -> Snapshot:
    """The updates of each weight in task order, as a store's `restore` takes them."""
    out: Snapshot = {}
    for record in records:
        for name, update in record.updates.items():
            out[name] = (*out.get(name, ()), update)
    return out


def merge_into(source: ContinualLearner | Sequence[TaskRecord], model: nn.Module) -> nn.Module:
    """Merge learned tasks into ``model``, an *unquantised* copy of the base: W = round(W₀ + Σ sBA), in place (M7).

    For tasks that were learned on a quantised base, which itself is never merged. What they learned fits the quantised
    weights, so the merged model differs from the one that was trained by the base's quantisation error, and by no more.

    Args:
        source: a learner, or its records in order. model: of the same architecture, in any float dtype.

    Returns:
        ``model``.

    Raises:
        KeepLoraError: the method keeps one model per task. TargetError: a weight that ``model`` lacks, that has another
            shape there, or that is quantised; nothing is changed then.
    """
    found: Any = getattr(source, "records", source)
    records: list[TaskRecord] = list(found)
    if reason := getattr(source, "unmergeable", ""):
        raise KeepLoraError(f"this method {reason}")
    updates = all_updates(records)
    linears, parameters = [], []
    for name, of_weight in updates.items():
        try:
            module = model.get_submodule(name) if _is_module(model, name) else None
            weight = model.get_parameter(f"{name}.weight" if module is not None else name)
        except AttributeError:
            raise TargetError(
                f"the model to merge into has no {name}; load the base of the learned tasks, unquantised"
            ) from None
        if module is not None and quantisation(module) is not None:
            raise TargetError(
                f"{name} is quantised in the model to merge into; load the base unquantised (fp32 or bf16)"
            )
        shapes = {(u.B.shape[0], u.A.shape[1]) if isinstance(u, Factors) else tuple(u.shape) for u in of_weight}
        if shapes != {tuple(weight.shape)}:
            raise TargetError(
                f"{name} has shape {tuple(weight.shape)} in the model to merge into, but {shapes.pop()} in the learned tasks"
            )
        (parameters if module is None else linears).append(name)
    WeightStore(model, linears, parameters).restore(updates)
    return model


def _is_module(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(parent)._modules


def open_ledger(directory: str | os.PathLike[str], revision: str | None = None, *, append: bool = False) -> Ledger:
    """The ledger in ``directory`` (a saved learner, a run directory, the ledger's own folder, or "owner/name" on the hub)."""
    name, directory = directory, local_folder(directory, [f"{LEDGER_FOLDER}/*"], revision)
    if append and directory != Path(name).expanduser():
        raise LedgerError(f"{name} is on the hub: to append to it, save_pretrained() it into a folder first")
    if not directory.is_dir():
        raise LedgerError(f"{directory} is not a folder: give the folder that save_pretrained or a run wrote")
    if not any((directory / name).exists() for name in (LEDGER_FOLDER, "ledger.json", "base.safetensors")):
        raise LedgerError(no_ledger(directory))
    return Ledger.open(directory / LEDGER_FOLDER if (directory / LEDGER_FOLDER).is_dir() else directory)


def ledger_config(ledger: Ledger) -> KeepLoraConfig:
    """The config that the learner was made with."""
    try:
        return KeepLoraConfig(**without_retired(ledger.head["config"]))
    except TypeError as error:
        raise LedgerError(
            f"{ledger.path / 'ledger.json'}: its 'config' is not one of this keeplora ({error}); upgrade keeplora"
        ) from None


def apply_records(learner: ContinualLearner, ledger: Ledger) -> None:
    """Bring an untouched base model to the ledger's last state."""
    base = ledger.head["base"]
    found = learner.store.base_hash()
    if found != base["hash"]:
        raise LedgerError(
            f"{ledger.path} belongs to another base model ({base.get('name') or base.get('class')}): "
            f"the target weights' hash is {found[:12]}…, the ledger's {base['hash'][:12]}…; "
            "load the untouched base model first"
        )
    chain = ledger.chain()
    shelf = {record.entry: record for record in ledger.history()}
    bases = ledger.bases() if learner.protects else {}
    _check_bases(bases, ledger, learner.protects)
    _check_used(bases, list(shelf.values()), ledger)
    learner.restore_bases(bases, list(shelf.values()))  # whatever is refused is refused before a weight moves
    learner._adopt(ledger, chain, shelf)
    if learner.accumulates:
        learner.store.restore(all_updates(learner.records))


def _check_used(start: Mapping[str, Subspace], records: Sequence[TaskRecord], ledger: Ledger) -> None:
    """The columns that each record says were in use are those that the bases and the increments add up to."""
    for i, record in enumerate(records, 1):
        check_values(record, records[: i - 1], f"{ledger.path}: task {record.name!r}")
        for name, used in record.used.items():
            if name in start and (found := start[name].k + int(in_force(records[:i], name).sum())) != used:
                raise LedgerError(
                    f"{ledger.path}: after task {record.name!r} layer {name!r} has {used} protected directions by its record, "
                    f"but {found} in the tensors; restore the ledger from a copy"
                )


def _check_bases(bases: Mapping[str, Subspace], ledger: Ledger, protects: bool) -> None:
    file = ledger.path / "base.safetensors"
    if protects and bases.keys() != ledger.targets.keys():
        odd = sorted(bases.keys() ^ ledger.targets.keys())[0]
        raise LedgerError(
            f"{file} and the targets of ledger.json do not name the same layers ({odd}); restore the copy"
        )
