"""The two sides of `keeplora analyze drift`, opened from whatever folder holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.experiment.ledgers import LedgerPlace
from keeplora.files import expand
from keeplora.models import load_model
from keeplora.tuner.drift import START, LedgerSide, SavedSide, Side
from keeplora.tuner.leaks.saved import PREFIX, SavedExport, SavedTensors, checkpoint_files
from keeplora.tuner.targets import Target

SAVED = ("adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
"""What an adapter or a checkpoint has of files."""


def open_sides(
    a: Path, b: Path, *, task_a: str | None = None, task_b: str | None = None, model: str | None = None,
    weights: bool = True,
) -> tuple[Side, Side]:  # fmt: skip
    """Each from a run directory, a saved learner, a ledger, an exported adapter, or a merged checkpoint.

    Args:
        task_a, task_b: of a ledger, the state after that task ("start": before all of them).
        model: the base model, where neither folder is a run directory. weights: load it; without, updates alone are compared.
    """
    paths = [expand(a), expand(b)]
    places = [LedgerPlace.open(p) if is_ledger(p) else None for p in paths]
    for path, place, task in zip(paths, places, (task_a, task_b), strict=True):
        if not path.is_dir():
            raise KeepLoraError(f"{path} is not a folder: give a run directory, a ledger, an adapter or a checkpoint")
        if place is None and not any(any(path.glob(name)) for name in SAVED):
            raise KeepLoraError(
                f"{path} holds no ledger, adapter or checkpoint; give a run directory, a ledger, an exported adapter or a "
                "merged checkpoint"
            )
        if place is None and task is not None:
            what = "state before its tasks" if task == START else f"state after {task!r}"
            raise KeepLoraError(
                f"{path} is no ledger, so there is no {what} in it; give two folders, without a task here"
            )
    W0 = _base(places, model) if weights else None
    targets = _targets(places, paths)
    sides: list[Side] = []
    for path, place, task in zip(paths, places, (task_a, task_b), strict=True):
        if place is not None:
            sides.append(LedgerSide(path.name, place.ledger, task, W0))
        else:
            sides.append(SavedSide(path.name, SavedExport(path, targets), targets, W0))
    return sides[0], sides[1]


def is_ledger(path: Path) -> bool:
    """Whether a folder holds a ledger, or is one."""
    return (path / "ledger.json").is_file() or (path / "ledger" / "ledger.json").is_file()


def _base(places: Sequence[LedgerPlace | None], model: str | None) -> Mapping[str, Tensor] | None:
    found = next((place for place in places if place is not None and place.run), None)
    if model is None and found is not None:
        return found.open_learner(None)[0].store.W0
    if model is None:
        return None
    ledger = next((place for place in places if place is not None), None)
    if ledger is not None and not ledger.run:
        return ledger.open_learner(model)[0].store.W0
    network = load_model(model, device="cpu").model
    return {name.removesuffix(".weight"): p.detach() for name, p in network.named_parameters() if p.ndim == 2}


def _targets(places: Sequence[LedgerPlace | None], paths: Sequence[Path]) -> list[Target]:
    """The layers to compare: a ledger's, else those of an adapter, else every matrix that a checkpoint holds."""
    for place in places:
        if place is not None:
            return [Target(**t) for t in place.ledger.head["targets"]]
    adapters = [path for path in paths if (path / "adapter_config.json").is_file()]
    path = adapters[0] if adapters else paths[0]
    tensors = SavedTensors(path, ["adapter_model.safetensors"] if adapters else checkpoint_files(path))
    found = []
    for name in tensors.names:
        shape = tensors.shape(name)
        if adapters and name.endswith(".lora_A.weight"):
            layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            out = tensors.shape(f"{PREFIX}{layer}.lora_B.weight")[0]
            found.append(Target(layer, "", None, 1, shape[1], out, 1.0, 1, 1.0))
        elif not adapters and name.endswith(".weight") and len(shape) == 2:
            found.append(Target(name.removesuffix(".weight"), "", None, 1, shape[1], shape[0], 1.0, 1, 1.0))
    return found
