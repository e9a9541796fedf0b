"""Between a learner and its folder: the ledger, and one stock PEFT adapter per task beside it."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from keeplora.errors import LedgerError
from keeplora.files import atomic_dir, atomic_write_json
from keeplora.tuner.adapter import Factors
from keeplora.tuner.ledger import Ledger, TaskRecord, slug

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
            "name": learner.base_name, "class": type(learner.model).__name__, "hash": learner.store.base_hash(),
        },
        targets=[asdict(t) for t in learner.targets],
        config=learner.config.to_dict(),
        bases=learner.start_bases(),
        versions=versions(),
    )  # fmt: skip


def save_learner(learner: ContinualLearner, directory: str | Path) -> Path:
    """``directory/ledger`` and ``directory/adapters/<task>``; whole or not at all."""
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise LedgerError(f"{directory} is not empty: save_pretrained writes into a new or empty folder")
    if directory.exists():
        directory.rmdir()
    with atomic_dir(directory) as part:
        ledger = create_ledger(learner, part / LEDGER_FOLDER)
        for i, record in enumerate(learner.records, 1):
            ledger.append(record)
            if record.factors:
                write_peft_adapter(
                    part / ADAPTERS_FOLDER / f"{i:04d}-{slug(record.name)}", record.factors, learner.base_name
                )
    return directory


def write_peft_adapter(path: Path, factors: dict[str, Factors], base_name: str) -> Path:
    """A stock PEFT folder. s is folded into B, alpha = r everywhere and init plain: old and new servers read it alike.

    Layers of lower rank keep theirs through ``rank_pattern`` with an equal ``alpha_pattern``, so every scaling is 1.
    """
    ranks = {name: f.A.shape[0] for name, f in factors.items()}
    r = max(ranks.values())
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r, lora_alpha=r, target_modules=sorted(factors), init_lora_weights=True, rank_pattern=pattern,
        alpha_pattern=dict(pattern), base_model_name_or_path=base_name or None, inference_mode=True,
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
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
    """Σ_t s_t B_t A_t of every layer as one pair of factors, exactly: A stacked, s_t B_t side by side, s = 1."""
    import torch

    names = sorted({name for record in records for name in record.factors})
    out = {}
    for name in names:
        parts = [record.factors[name] for record in records if name in record.factors]
        out[name] = Factors(torch.cat([f.A for f in parts]), torch.cat([f.s * f.B for f in parts], dim=1), 1.0)
    return out


def open_ledger(directory: str | os.PathLike[str]) -> Ledger:
    """The ledger in ``directory`` (a saved learner, a run directory, or the ledger's own folder)."""
    directory = Path(directory)
    if not directory.is_dir():
        raise LedgerError(f"{directory} is not a folder: give the folder that save_pretrained or a run wrote")
    return Ledger.open(directory / LEDGER_FOLDER if (directory / LEDGER_FOLDER).is_dir() else directory)


def apply_records(learner: ContinualLearner, ledger: Ledger) -> None:
    """Bring an untouched base model to the ledger's last state."""
    found = learner.store.base_hash()
    if found != ledger.head["base"]["hash"]:
        raise LedgerError(
            f"{ledger.path} belongs to another base model ({ledger.head['base']['name'] or ledger.head['base']['class']}): "
            f"the target weights' hash is {found[:12]}…, the ledger's {ledger.head['base']['hash'][:12]}…; "
            "load the untouched base model first"
        )
    records = ledger.records()
    learner.restore_bases(ledger.bases(), records)  # whatever is refused is refused before a weight moves
    for record in records if learner.accumulates else ():
        learner.store.add(record.deltas)
    learner.records = records
