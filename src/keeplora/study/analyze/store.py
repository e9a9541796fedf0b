"""An analysis's folder: what it is of, and every measured point as a file of its own, written as it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel

from keeplora.errors import KeepLoraError, reason
from keeplora.experiment.config_generation import GenerationConfig
from keeplora.experiment.config_schema import TrainingConfig, TunerConfig
from keeplora.experiment.config_video import VideoConfig
from keeplora.experiment.folder_lock import FolderLock
from keeplora.files import atomic_write_json, sweep
from keeplora.json_text import read_object
from keeplora.retired import without_retired
from keeplora.study.analyze.plan import Point

FORMAT = "keeplora-analysis"
VERSION = 0
NOTED_LATER = ("general_sets", "max_length")
"""Of an identity, what older folders do not say: taken to be as it is today."""
REMEDY = "delete it and repeat the command"


_SECTIONS: dict[str, type[BaseModel]] = {
    "tuner": TunerConfig, "training": TrainingConfig, "generation": GenerationConfig, "video": VideoConfig,
}  # fmt: skip
"""Of an analysis's identity, those that are settings."""


class AnalysisStore:
    """The folder of one analysis, locked while it is written to (``with store.writing(identity)``).

    Layout: analysis.json (what it is of), points/NAME.json, results.json, suggestion.yaml, analysis.html, figures/*.png.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None

    def writing(self, identity: Mapping[str, Any]) -> AnalysisStore:
        """Lock the folder for an analysis of ``identity``, made where it is not there.

        Raises:
            KeepLoraError: it holds an analysis of something else, other files, or another process writes to it.
        """
        found = self.check(identity)
        identity = _read_again(identity)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
            self._lock.acquire()
        except OSError as error:
            raise KeepLoraError(f"{self.path} cannot be written to: {reason(error)}") from None
        sweep(self.path)
        if found is None:
            atomic_write_json(self.path / "analysis.json", {"format": FORMAT, "version": VERSION, "identity": identity})
        return self

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the folder's analysis is of, None where it is to be made; refused where it is not of ``identity``.

        Raises:
            KeepLoraError: it holds an analysis of something else, or other files.
        """
        identity, found = _of_today(_read_again(identity)), self.identity()
        if found is not None:
            found = {key: identity[key] for key in NOTED_LATER if key in identity} | _of_today(found)
        if found is None and self.path.is_dir() and any(not e.name.startswith(".") for e in self.path.iterdir()):
            raise KeepLoraError(f"{self.path} is not empty and holds no analysis; choose another --output")
        if found is not None and found != identity and {**found, "revised": 0} == {**identity, "revised": 0}:
            changed = " and ".join(identity.get("revised") or found["revised"])
            raise KeepLoraError(
                f"{self.path} was measured by another keeplora, for which {changed} meant something else: its points cannot be "
                f"mixed with today's; {REMEDY}, or choose another --output"
            )
        if found is not None and found != identity:
            other = [key for key in sorted({**found, **identity}) if found.get(key) != identity.get(key)]
            told = ", ".join(f"{k} {_short(found.get(k))} (now {_short(identity.get(k))})" for k in other[:3])
            raise KeepLoraError(
                f"{self.path} holds the analysis of another model, other data or other options: {told}; choose another --output"
            )
        return found

    def __enter__(self) -> AnalysisStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def identity(self) -> dict[str, Any] | None:
        """What the folder's analysis is of; None where there is none."""
        value = read_object(self.path / "analysis.json", REMEDY)
        if value is None:
            return None
        if value.get("format") != FORMAT or not isinstance(value.get("identity"), dict):
            raise KeepLoraError(f"{self.path / 'analysis.json'} is not an analysis's; choose another --output")
        if value.get("version") != VERSION:
            raise KeepLoraError(
                f"{self.path} was written in version {value.get('version')} of the analysis format, this keeplora knows "
                f"{VERSION}; choose another --output, or use the keeplora that made it"
            )
        return value["identity"]

    def has(self, point: Point) -> bool:
        return self._file(point).is_file()

    def write(self, point: Point, result: Mapping[str, Any]) -> None:
        """Keep a measured point; it is on disk, whole, when this returns."""
        atomic_write_json(self._file(point), {"kind": point.kind, **point.values, "result": dict(result)})

    def points(self, wanted: Sequence[Point] | None = None) -> list[dict[str, Any]]:
        """Every measured point, by name; with ``wanted`` of the kinds that are among them these alone, of other kinds all.

        `intra` and `inter` share a folder and a page: a call of one leaves what the other asked for as it is.
        """
        names, kinds = {point.name for point in wanted or ()}, {point.kind for point in wanted or ()}
        found = []
        for file in sorted((self.path / "points").glob("*.json")):
            value = read_object(file, REMEDY)
            if value is None or not isinstance(value.get("result"), dict) or "kind" not in value:
                raise KeepLoraError(f"{file} is damaged: it holds no measured point; {REMEDY}")
            if value["kind"] not in kinds or file.stem in names:
                found.append(value)
        return found

    def seconds(self) -> dict[str, list[float]]:
        """How long each kind of point took, of those that are there."""
        found: dict[str, list[float]] = {}
        for value in self.points():
            if isinstance(took := value["result"].get("seconds"), int | float):
                found.setdefault(value["kind"], []).append(float(took))
        return found

    def _file(self, point: Point) -> Path:
        return self.path / "points" / f"{point.name}.json"


def _read_again(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read from the file: a tuple is a list."""
    return json.loads(json.dumps(identity))


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _of_today(identity: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of settings that an older keeplora did not have, and without those that it had and changed nothing."""
    out = dict(identity)
    for name, schema in _SECTIONS.items():
        if isinstance(section := identity.get(name), dict):
            fields = {key: field for key, field in schema.model_fields.items() if not field.is_required()}
            known: Any = schema.model_construct(
                **{k: f.get_default(call_default_factory=True) for k, f in fields.items()}
            )
            defaults = json.loads(known.model_dump_json(include=set(fields)))
            out[name] = defaults | (without_retired(section) if name == "tuner" else section)
    return out
