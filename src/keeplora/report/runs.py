"""Read a run directory, and find the runs beside it that may stand in one table with it.

The reader is lenient where a run can be young or cut short (no results yet, a half-written last line of
``metrics.jsonl``) and strict where a file says something that cannot be true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.files import read_regular, real_path
from keeplora.json_text import MAX_BYTES, parse_json, read_object
from keeplora.report.kinds import GENERATION, Kind, kind_named
from keeplora.report.run_files import check_shape, remedy
from keeplora.yaml_text import parse_yaml

RESULTS_FORMAT = "keeplora-results"
RESULTS_VERSION = 0

METHOD_LABELS = {
    "zero-shot": "Zero-shot",
    "full-ft": "Full fine-tuning",
    "lora": "Sequential LoRA",
    "keeplora": "KeepLoRA (γ = 1)",
    "keeplora++": "KeepLoRA++",
}


BOUNDS = ("joint", "oracle")
"""Methods that see more than a learner may: upper bounds, which are never starred as the best."""


@dataclass(frozen=True)
class Run:
    """What a run directory says about itself; every part may be missing except its path."""

    path: Path
    results: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    events: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return str(self.results.get("name") or self.path.name)

    @property
    def removed(self) -> list[str]:
        """Tasks that were taken out since the rows were measured."""
        return [str(name) for name in self.results.get("removed") or []]

    @property
    def kind(self) -> Kind:
        """What the run does; before there are results, data.json tells: a set of questions names its scorer."""
        if not self.results and any(entry.get("scorer") for entry in self.sets):
            return GENERATION
        return kind_named(self.results.get("kind"))

    @property
    def scorers(self) -> dict[str, str]:
        """The scorer of each set of a run that answers questions; empty for other runs."""
        found = {str(s.get("name")): str(s["scorer"]) for s in self.sets if s.get("scorer")}
        return found | {str(name): str(scorer) for name, scorer in (self.results.get("scorers") or {}).items()}

    @property
    def method(self) -> str:
        return str(self.results.get("method") or "unknown method")

    @property
    def seed(self) -> Any:
        return self.results.get("seed")

    @property
    def tasks(self) -> list[str]:
        known = self.results.get("tasks") or [s.get("name") for s in self.sets if s.get("kind") != "probe"]
        return [str(name) for name in known]

    @property
    def probes(self) -> list[str]:
        known = self.results.get("probes") or [s.get("name") for s in self.sets if s.get("kind") == "probe"]
        return [str(name) for name in known]

    @property
    def sets(self) -> list[dict[str, Any]]:
        return [entry for entry in self.data.get("tasks") or [] if isinstance(entry, dict)]

    @property
    def accuracy(self) -> list[list[float | None]]:
        return self.results.get("accuracy") or []

    @property
    def probe_accuracy(self) -> list[list[float | None]]:
        return self.results.get("probe_accuracy") or []

    @property
    def metrics(self) -> dict[str, float | None]:
        return self.results.get("metrics") or {}

    @property
    def cost(self) -> dict[str, Any]:
        return self.results.get("cost") or {}

    @property
    def layers(self) -> list[dict[str, Any]]:
        return self.results.get("layers") or []

    @property
    def tasks_info(self) -> list[dict[str, Any]]:
        return self.results.get("tasks_info") or []

    @property
    def done(self) -> int:
        """Tasks whose row is in the matrix."""
        return max(0, len(self.accuracy) - 1)

    @property
    def finished(self) -> bool:
        return bool(self.tasks) and self.done == len(self.tasks)

    @property
    def on_validation(self) -> bool:
        """Whether its numbers are of held-out training samples, as a search's are."""
        return self.results.get("evaluate_on") == "validation"

    @property
    def bound(self) -> bool:
        """Whether its method sees more than a learner may."""
        return self.method in BOUNDS

    @property
    def learns(self) -> bool:
        """Whether training changes the model at all."""
        return self.method != "zero-shot"

    @property
    def label(self) -> str:
        """The method as a person writes it, with the classifier variant named."""
        return self.results.get("method_title") or method_label(self.method, self.results.get("variant"))

    @property
    def settings(self) -> dict[str, str]:
        """What config.yaml says of how the run learns (`learning_settings`); empty where it cannot be read."""
        try:
            value, _ = parse_yaml(self.config, str(self.path / "config.yaml"))
        except KeepLoraError:
            return {}
        return learning_settings(value) if isinstance(value, dict) else {}

    def column(self, name: str) -> list[float | None]:
        """Accuracy or score on task or probe ``name`` at each finished moment, row 0 first; empty where it is not in the run."""
        for names, matrix in ((self.tasks, self.accuracy), (self.probes, self.probe_accuracy)):
            if name in names:
                j = names.index(name)
                return [row[j] if j < len(row) else None for row in matrix]
        return []


NOT_SETTINGS = (
    "name", "suite", "tasks", "probes", "order", "order_name", "method", "seed", "output", "base_dir", "preset", "model",
    "loggers", "data_dir", "device", "threads", "candidates", "evaluate_on", "first_tasks", "reference",
    "validation_seed",
)  # fmt: skip
"""Keys of a configuration that say which run it is, on what and where, not how it learns."""


def learning_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """How a configuration learns, as dotted keys and texts.

    >>> learning_settings({"seed": 3, "tuner": {"r": 8, "rank_budget": None}})
    {'tuner.r': '8', 'tuner.rank_budget': '–'}
    """
    return _flat({key: value for key, value in config.items() if key not in NOT_SETTINGS})


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {
            k: v for key, one in value.items() for k, v in _flat(one, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: "–" if value is None else str(value)}


def method_label(method: str, variant: str | None = None) -> str:
    """The method's name as written in prose; an unknown one is left as it is.

    >>> method_label("keeplora++-cls", "cls"), method_label("my-method")
    ('KeepLoRA++, cls', 'my-method')
    """
    if variant in (None, "", "text"):
        return METHOD_LABELS.get(method, method)
    plain = method.removesuffix(f"-{variant}")
    return f"{METHOD_LABELS.get(plain, plain)}, {variant}"


def _json(path: Path) -> dict[str, Any]:
    value = read_object(path, remedy(path))
    if value is None:
        return {}
    check_shape(value, path.name, path)
    return value


def _text(path: Path) -> str:
    try:
        return read_regular(path, MAX_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise KeepLoraError(f"{path} cannot be read: {error.strerror or error}; {remedy(path)}") from None


def _events(path: Path) -> tuple[dict[str, Any], ...]:
    found = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        try:
            event = parse_json(line)
        except ValueError:
            continue  # A run that was killed while it wrote leaves half a line; the rest still counts.
        if isinstance(event, dict):
            if event.get("event") == "epoch":
                check_shape(event, "epoch", f"{path}, line {number}")
            found.append(event)
    return tuple(found)


def _check_results(results: dict[str, Any], path: Path) -> None:
    if not results:
        return
    if results.get("format") != RESULTS_FORMAT:
        raise KeepLoraError(f"{path}: 'format' is {results.get('format')!r}, expected {RESULTS_FORMAT!r}")
    version = results.get("version")
    if not isinstance(version, int) or version > RESULTS_VERSION:
        raise KeepLoraError(f"{path}: version {version!r} is later than {RESULTS_VERSION}; update keeplora to read it")
    try:
        kind_named(results.get("kind"))
    except KeepLoraError as error:
        raise KeepLoraError(f"{path}: {error}") from None
    for key, names in (("accuracy", "tasks"), ("probe_accuracy", "probes")):
        width = len(results.get(names) or [])
        for i, row in enumerate(results.get(key) or []):
            if len(row) != width:
                raise KeepLoraError(f"{path}: {key}[{i}] has {len(row)} values for {width} {names}")


def load_results(run_dir: Path) -> dict[str, Any]:
    """``results.json`` of a run directory, checked; empty where the run has none yet."""
    path = Path(run_dir) / "results.json"
    results = _json(path)
    _check_results(results, path)
    return results


def load_run(run_dir: Path) -> Run:
    """Read a run directory; raises `KeepLoraError` where there is none, or where one of its files is damaged."""
    run_dir = Path(run_dir)
    if not any((run_dir / name).is_file() for name in ("results.json", "status.json", "config.yaml")):
        raise KeepLoraError(f"{run_dir} is not a run directory: it has no results.json, status.json or config.yaml")
    return Run(
        path=run_dir,
        results=load_results(run_dir),
        data=_json(run_dir / "data.json"),
        status=_json(run_dir / "status.json"),
        environment=_json(run_dir / "environment.json"),
        config=_text(run_dir / "config.yaml"),
        events=_events(run_dir / "metrics.jsonl"),
    )


def find_comparable(run_dir: Path) -> list[Path]:
    """Sibling run directories with the same ``comparison_key``: same model, tasks, order, data and image size.

    Sorted by name, without ``run_dir`` itself. A sibling that cannot be read is passed over: it is another run's fault.
    """
    run_dir = real_path(run_dir)
    key = load_results(run_dir).get("comparison_key")
    found = []
    for path in sorted(run_dir.parent.iterdir()) if key else []:
        if real_path(path) == run_dir or not (path / "results.json").is_file():
            continue
        try:
            if load_results(path).get("comparison_key") == key:
                found.append(path)
        except KeepLoraError:
            continue
    return found


def load_others(run: Run, against: Sequence[Path] = ()) -> list[Run]:
    """The runs to show beside ``run``: those named, which must be comparable, then the comparable siblings."""
    others: dict[Path, Run] = {}
    for path in against:
        other = load_run(Path(path))
        if other.results and run.results and other.kind is not run.kind:
            raise KeepLoraError(
                f"{path} cannot be compared with {run.path}: it {other.kind.does} ({other.kind.name}), the other "
                f"{run.kind.does} ({run.kind.name})"
            )
        if other.results.get("comparison_key") != run.results.get("comparison_key"):
            raise KeepLoraError(
                f"{path} cannot be compared with {run.path}: their comparison keys differ, so the model, the tasks, "
                "their order, the data or the image size is not the same"
            )
        others[real_path(path)] = other
    for path in find_comparable(run.path):
        if real_path(path) not in others:
            try:
                others[real_path(path)] = load_run(path)
            except KeepLoraError:
                continue
    others.pop(real_path(run.path), None)
    return list(others.values())
