"""Exports that lie on disk: an adapter's or a checkpoint's tensors, found for each target, read one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.tuner.adapter import Factors
from keeplora.tuner.targets import Target

PREFIX = "base_model.model."


class SavedTensors:
    """The safetensors files of a folder, by tensor name; nothing else in it is opened."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = folder
        self._where: dict[str, str] = {}
        for file in sorted(set(files)):
            with self._open(file) as handle:
                self._where |= dict.fromkeys(handle.keys(), file)

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
            raise KeepLoraError(f"{path} is missing: the export is not complete; export the run again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, ValueError) as error:
            raise KeepLoraError(f"{path} is not a readable safetensors file ({error}); export the run again") from None

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(self._where[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._where[name]) as handle:
            return handle.get_tensor(name)


class SavedExport:
    """An exported folder, opened for the targets of a learner.

    Attributes:
        kind: "adapter" or "checkpoint". dtype: of the targets' tensors.

    Raises:
        KeepLoraError: the folder holds no export, one in a format that is not read, or none of these targets.
    """

    def __init__(self, folder: str | Path, targets: Sequence[Target]) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise KeepLoraError(f"{self.folder} is not a folder: give the folder that `keeplora export` wrote")
        self._config: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        if (self.folder / "adapter_config.json").is_file():
            self.kind = "adapter"
            self._config = self._adapter_config()
            self._tensors = SavedTensors(self.folder, ["adapter_model.safetensors"])
            known = set(self._tensors.names)
            halves = {t.name: [f"{PREFIX}{t.name}.lora_{half}.weight" for half in "AB"] for t in targets}
            self._names = {name: pair[0] for name, pair in halves.items() if known >= set(pair)}
        else:
            self.kind = "checkpoint"
            self._tensors = SavedTensors(self.folder, checkpoint_files(self.folder))
            self._names = _weight_names(self._tensors, targets, self.folder)
        if not self._names:
            raise KeepLoraError(
                f"{self.folder} adapts none of the layers that the run learned; it belongs to another model"
            )
        self.dtype = self._tensors[next(iter(self._names.values()))].dtype

    def weight(self, target: Target) -> Tensor:
        """(out, in) of a checkpoint, as it is stored."""
        return self._tensors[self._names[target.name]]

    def factors(self, target: Target) -> Factors | None:
        """A and s·B of an adapter, as they are stored; None where it does not adapt the target."""
        name = target.name
        if name not in self._names:
            return None
        A, B = (self._tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB")
        if A.shape[1] != target.n_in or B.shape[0] != target.n_out or A.shape[0] != B.shape[1]:
            raise KeepLoraError(
                f"{self.folder}: the adapter of {name} has shapes {tuple(A.shape)} and {tuple(B.shape)}, which do not fit a "
                f"layer of {target.n_in} inputs and {target.n_out} outputs; it belongs to another model"
            )
        scaling = self._scaling(name)
        return Factors(A, B if scaling == 1.0 else scaling * B.to(torch.float32), 1.0)

    def _adapter_config(self) -> dict[str, Any]:
        config = _read_json(self.folder / "adapter_config.json")
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            what = "DoRA" if config.get("use_dora") else repr(config.get("peft_type"))
            raise KeepLoraError(
                f"{self.folder} is an adapter of the type {what}; only plain LoRA adapters can be audited"
            )
        return config

    def _scaling(self, name: str) -> float:
        r, alpha = (
            self._for_layer(name, f"{key}_pattern", default)
            for key, default in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
            raise KeepLoraError(
                f"{self.folder / 'adapter_config.json'}: r is {r!r} and lora_alpha {alpha!r}; two numbers are needed"
            )
        return alpha / (r**0.5 if self._config.get("use_rslora") else r)

    def _for_layer(self, name: str, pattern: str, default: str) -> Any:
        """PEFT's rule: the first pattern that is the whole name or a dotted end of it, else the adapter's own value."""
        values = self._config.get(pattern) or {}
        try:
            return values.get(get_pattern_key(list(values), name), self._config.get(default))
        except (AttributeError, TypeError, re.error):
            raise KeepLoraError(
                f"{self.folder / 'adapter_config.json'}: {pattern} is no mapping from patterns of names to numbers"
            ) from None


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a merged checkpoint; `KeepLoraError` where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, Mapping) or not all(isinstance(file, str) for file in named.values()):
            raise KeepLoraError(f"{index} names no files in 'weight_map'; export the run again")
        return list(named.values())
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    pickled = any(folder.glob("*.bin"))
    raise KeepLoraError(
        f"{folder} holds no adapter_config.json and no model.safetensors"
        + ("; files of pickled tensors (.bin) are never opened: save it as safetensors" if pickled else "")
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KeepLoraError(f"{path} is not readable JSON ({error}); export the run again") from None
    if not isinstance(value, dict):
        raise KeepLoraError(f"{path} holds a {type(value).__name__} where an object is expected; export the run again")
    return value


def _weight_names(tensors: SavedTensors, targets: Sequence[Target], folder: Path) -> dict[str, str]:
    """Which tensor is which target's weight.

    `transformers` writes some models under other names than their modules have (the parts before the block list are
    renamed), so what counts is the longest common end, then how many of the other parts agree.
    """
    names = [name for name in tensors.names if name.endswith(".weight")]
    by_leaf: dict[str, list[str]] = {}
    for name in names:
        by_leaf.setdefault(name.split(".")[-2] if name.count(".") else name, []).append(name)
    out: dict[str, str] = {}
    for t in targets:
        wanted = f"{t.name}.weight"
        candidates = by_leaf.get(t.name.rsplit(".", 1)[-1], [])
        best = [wanted] if wanted in candidates else _nearest(wanted.split("."), candidates)
        if len(best) != 1:
            raise KeepLoraError(
                f"{folder} holds {'no weight' if not best else 'several weights'} that could be {t.name}; it is no merged "
                "checkpoint of this run's model"
            )
        if tensors.shape(best[0]) != (t.n_out, t.n_in):
            raise KeepLoraError(
                f"{folder}: {best[0]} has shape {tensors.shape(best[0])}, but {t.name} has {(t.n_out, t.n_in)}; it is no "
                "merged checkpoint of this run's model"
            )
        out[t.name] = best[0]
    if len(set(out.values())) != len(out):
        raise KeepLoraError(
            f"{folder}: several layers would share one weight; it is no merged checkpoint of this run's model"
        )
    return out


def _nearest(wanted: list[str], candidates: Sequence[str]) -> list[str]:
    def score(name: str) -> tuple[int, int]:
        parts = name.split(".")
        end = 0
        while end < min(len(parts), len(wanted)) and parts[-1 - end] == wanted[-1 - end]:
            end += 1
        return end, len(set(parts[: len(parts) - end]) & set(wanted[: len(wanted) - end]))

    scores = {name: score(name) for name in candidates}
    top = max(scores.values(), default=(0, 0))
    return [name for name, value in scores.items() if value == top and top[0] >= 2]
