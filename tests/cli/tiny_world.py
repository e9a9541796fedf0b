"""A tiny CLIP, three tasks and a probe of small generated pictures: enough for a whole run in under a second.

The folder is built once per session and shared by the tests of the command line and of the experiment.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from keeplora.experiment import Experiment
from keeplora.experiment.run_directory import RunDirectory
from keeplora.report import render_report
from keeplora.yaml_text import dump_yaml
from tests.models.tiny import make_tiny

METHODS = ("zero-shot", "full-ft", "lora", "keeplora", "keeplora++", "keeplora-cls", "keeplora++-cls")
TASKS = ("paint", "stripes", "dots")
PROBE = "grey"
TRAIN, TEST = 10, 6  # pictures per class
SEQUENCE = {
    "paint": {"red": (220, 60, 60), "green": (60, 200, 60), "blue": (70, 70, 220)},
    "stripes": {"flat": "rows", "tall": "columns"},
    "dots": {"few": 2, "many": 12},
    "grey": {"light": (190, 190, 190), "dark": (80, 80, 80)},
}


def picture(kind: Any, rng: np.random.Generator) -> Image.Image:
    """40 x 36 pixels of a colour, of rows or columns, or of so many dots, under heavy noise."""
    pixels = np.full((40, 36, 3), 128.0)
    if isinstance(kind, tuple):
        pixels[:] = kind
    elif kind == "rows":
        pixels[(np.arange(40) // 4) % 2 == 0] += 60
    elif kind == "columns":
        pixels[:, (np.arange(36) // 4) % 2 == 0] += 60
    else:
        for y, x in rng.integers(0, 32, (kind, 2)):
            pixels[y : y + 5, x : x + 5] = 250
    return Image.fromarray(np.clip(pixels + rng.normal(0, 70, pixels.shape), 0, 255).astype("uint8"))


class World:
    """Where everything lies, configurations for it, and finished runs that tests share.

    A run that a test got from `run` belongs to all tests: copy it (`copied`) before changing anything in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = make_tiny("clip", root / "clip")
        rng = np.random.default_rng(0)
        for name, classes in SEQUENCE.items():
            for label, kind in classes.items():
                for split, count in (("train", TRAIN), ("test", TEST)):
                    folder = root / name / split / label
                    folder.mkdir(parents=True)
                    for i in range(count):
                        picture(kind, rng).save(folder / f"{i}.png")
        self._runs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def config(self, **changes: Any) -> dict[str, Any]:
        """A whole experiment as a mapping; sections given as mappings are laid over its own."""
        values: dict[str, Any] = {
            "model": str(self.model),
            "tasks": [{"name": name, "source": "folder", "path": name} for name in TASKS],
            "probes": [{"name": PROBE, "source": "folder", "path": f"{PROBE}/test", "classes": ["light", "dark"]}],
            "method": "keeplora++", "base_dir": str(self.root), "device": "cpu",
            "tuner": {"r": 4},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "precision": "fp32"},
        }  # fmt: skip
        for key, value in changes.items():
            if isinstance(value, Mapping) and isinstance(values.get(key), dict):
                value = {**values[key], **value}
            values[key] = value
        return copy.deepcopy(values)

    def yaml(self, path: Path, **changes: Any) -> Path:
        """`config` as a file."""
        path.write_text(dump_yaml(self.config(**changes)), encoding="utf-8")
        return path

    def run(self, **changes: Any) -> tuple[Path, dict[str, Any]]:
        """(directory, results) of a finished run of `config`; made once per session for equal changes."""
        key = json.dumps(changes, sort_keys=True, default=str)
        if key not in self._runs:
            path = self.root / "runs" / f"{len(self._runs):03d}"
            results = Experiment(self.config(**changes, output=str(path)), quiet=True).run()
            if not (path / "report.html").is_file():  # whoever asked first may do without; the run is everyone's
                render_report(path)
            self._runs[key] = (path, results)
        return self._runs[key]

    def copied(self, run: Path, to: Path) -> Path:
        """A private copy of a run directory."""
        return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns(".lock")))


_world: World | None = None


def the_world(tmp_path_factory: Any) -> World:
    """The session's one world, whichever folder's conftest asks first."""
    global _world
    if _world is None:
        _world = World(tmp_path_factory.mktemp("world"))
    return _world


def ledger_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's ledger, by record and name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run / "ledger").rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{key}": value for key, value in load_file(file).items()}
    return found


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def status_of(run: Path) -> dict[str, Any]:
    return RunDirectory(run).read_status()


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunDirectory(run).read_events() if event["event"] == kind]


def record_of(run: Path, index: int) -> dict[str, Any]:
    """record.json of the task at ``index`` (from 1)."""
    (file,) = (run / "ledger").glob(f"{index:04d}-*/record.json")
    return json.loads(file.read_text(encoding="utf-8"))
