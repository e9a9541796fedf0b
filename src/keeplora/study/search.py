"""What a search varies and in which order: spaces of methods, an even design for the first trials, TPE after it.

With the budgets that continual learning allows (often six trials a method) a model of the results has nothing to learn
from: optuna's TPE draws its first ten trials at random. Ours spread them: a Latin hypercube, so that n trials try n
learning rates evenly over the whole range, whatever else varies. From the eleventh on TPE proposes.

A proposal is a function of the seed, the method, the trial's number and the trials before it, and of nothing else: a
search that was killed, or that ran on more jobs, proposes the same. Therefore each of TPE's trials waits for all
earlier ones of its method.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, KeepLoraError, did_you_mean

DESIGN = 10
"""Trials at most that are spread evenly; optuna's own number of trials before its model is used."""
ENOUGH = 4  # finished trials that TPE's model needs; with fewer it draws at random
LEARNING_RATE = "training.learning_rate"
_DRAWS = 200


@dataclass(frozen=True)
class Axis:
    """One thing that varies. ``kind``: "log", "uniform" (``low`` to ``high``; whole numbers where both are) or "choice"."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    values: tuple[Any, ...] = ()

    @classmethod
    def make(cls, key: str, entry: Sequence[Any]) -> Axis:
        """An axis from a method's ``search`` entry: ("log", low, high), ("uniform", low, high) or ("choice", values)."""
        if key.split(".")[0] not in ("training", "tuner") or "." not in key:
            raise ConfigError(f"search: {key!r} is no key of training or tuner; only those can be searched")
        kind, *rest = entry
        if kind == "choice" and len(rest) == 1 and len(rest[0]):
            return cls(key, kind, values=tuple(rest[0]))
        if kind in ("log", "uniform") and len(rest) == 2 and rest[0] < rest[1] and (kind == "uniform" or rest[0] > 0):
            return cls(key, kind, rest[0], rest[1])
        raise ConfigError(
            f"search: {key} is {list(entry)!r}, but must be [log, LOW, HIGH] with 0 < LOW < HIGH, [uniform, LOW, HIGH] or "
            "[choice, [VALUES]]"
        )

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, share: float) -> Any:
        """The value ``share`` (0 up to 1) of the way along the axis.

        >>> Axis("training.learning_rate", "log", 1e-4, 1e-2).at(0.5), Axis("tuner.gamma", "choice", values=(0, 1)).at(0.5)
        (0.001, 1)
        """
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        if self.kind == "log":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.whole else rounded(value)

    def text(self) -> str:
        return f"{', '.join(map(str, self.values))}" if self.kind == "choice" else f"{self.low:g} to {self.high:g}"

    def entry(self) -> list[Any]:
        """The axis as `make` takes it, for a file."""
        return [self.kind, list(self.values)] if self.kind == "choice" else [self.kind, self.low, self.high]

    def suggest(self, trial: Any) -> None:
        """Have optuna's trial settle the value."""
        if self.kind == "choice":
            trial.suggest_categorical(self.key, self.values)
        elif self.whole:
            trial.suggest_int(self.key, int(self.low), int(self.high), log=self.kind == "log")
        else:
            trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log")


def rounded(value: Any) -> Any:
    """Three significant digits: more are not what a search can tell apart, and nobody would type them.

    >>> rounded(0.00146779926), rounded(3), rounded("a")
    (0.00147, 3, 'a')
    """
    return float(f"{value:.3g}") if isinstance(value, float) else value


def make_space(method: str, search: Mapping[str, Any], fixed: Sequence[str], ranges: Mapping[str, Any]) -> list[Axis]:
    """A method's axes: its registry entry, less the keys that the user ``fixed``, with the user's ``ranges``.

    Raises `ConfigError` for a method without anything to search, and for a learning rate that is fixed.
    """
    if LEARNING_RATE in fixed and LEARNING_RATE in search:
        raise ConfigError(f"-o {LEARNING_RATE}: it is what is searched; narrow it by --range {LEARNING_RATE}=LOW:HIGH")
    axes = [Axis.make(key, ranges.get(key, entry)) for key, entry in search.items() if key not in fixed]
    if not axes:
        raise ConfigError(f"{method} has nothing to search; leave it out of --methods")
    return axes


def parse_ranges(options: Sequence[str], spaces: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``[METHOD:]KEY=LOW:HIGH`` as entries by method: wider or narrower ranges than the registry's.

    >>> parse_ranges(["lora:training.learning_rate=1e-5:1e-2"], {"lora": {"training.learning_rate": ("log", 1e-4, 1e-2)}})
    {'lora': {'training.learning_rate': ('log', 1e-05, 0.01)}}
    """
    found: dict[str, dict[str, Any]] = {method: {} for method in spaces}
    for option in options:
        left, _, right = option.partition("=")
        method, _, key = left.rpartition(":")
        low, _, high = right.partition(":")
        try:
            whole = not any(mark in right for mark in ".eE")
            ends: tuple[float, float] = (int(low), int(high)) if whole else (float(low), float(high))
        except ValueError:
            raise ConfigError(f"--range {option}: write it as KEY=LOW:HIGH or METHOD:KEY=LOW:HIGH") from None
        if method and method not in spaces:
            raise ConfigError(f"--range {option}: {method!r} is not among --methods{did_you_mean(method, spaces)}")
        having = [
            name for name in ([method] if method else spaces) if spaces[name].get(key, ("choice",))[0] != "choice"
        ]
        if not having:
            keys = {k for space in spaces.values() for k, entry in space.items() if entry[0] != "choice"}
            raise ConfigError(f"--range {option}: no range of {key!r} is searched{did_you_mean(key, keys)}")
        for name in having:
            kind, *old = spaces[name][key]
            numbers = ends if all(isinstance(end, int) for end in old) else tuple(map(float, ends))
            found[name][key] = (kind, *numbers)
    return found


def design(axes: Sequence[Axis], n: int, seed: int) -> list[dict[str, Any]]:
    """``n`` settings that cover every axis evenly: a Latin hypercube, the most spread out of some draws.

    Each of n equal parts of a range (of its logarithm for "log") is tried once, in its middle.

    >>> sorted(s["a.b"] for s in design([Axis("a.b", "log", 1e-4, 1e-2)], 4, seed=0))
    [0.000178, 0.000562, 0.00178, 0.00562]
    """
    draw = random.Random(seed)
    best: list[tuple[int, ...]] = []
    widest = -1.0
    for _ in range(_DRAWS if len(axes) > 1 else 1):
        rows = list(zip(*(draw.sample(range(n), n) for _ in axes), strict=True))
        near = min((math.dist(a, b) for i, a in enumerate(rows) for b in rows[:i]), default=0.0)
        if near > widest:
            best, widest = rows, near
    return [{axis.key: axis.at((i + 0.5) / n) for axis, i in zip(axes, row, strict=True)} for row in best]


@dataclass(frozen=True)
class Trial:
    """One trial. ``state``: "running", "finished" or "failed"; ``criterion`` is None unless it is finished."""

    method: str
    number: int
    settings: dict[str, Any]
    proposed_by: str  # "design" or "tpe"
    state: str = "running"
    criterion: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def folder(self) -> str:
        """Its place below the search's folder."""
        return f"{self.method}/trial-{self.number:02d}"


class Searcher:
    """One method's trials in optuna's database: asks, and remembers what was told, through any kill.

    ``spread``: how many trials are of the even design.
    """

    def __init__(self, database: Path, method: str, axes: Sequence[Axis], spread: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._states = optuna, optuna.trial.TrialState
        self.method, self.axes, self.spread, self.seed = method, list(axes), spread, seed
        try:
            # SQLite takes back a half-written transaction after a kill; optuna's journal file stays torn and locked.
            storage = optuna.storages.RDBStorage(f"sqlite:///{database.resolve().as_posix()}")
            self.study = optuna.create_study(
                storage=storage, study_name=method, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # many kinds: damaged, of another optuna, read-only
            reason = str(error).strip().splitlines()[0]
            raise KeepLoraError(
                f"{database} cannot be used as optuna's database ({reason}); choose another --output"
            ) from None
        planned = design(self.axes, spread, self._number_seed("design"))
        for settings in planned[len(self._all()) :]:  # a kill may have come while they were being written
            self.study.enqueue_trial(settings)
        for trial in self._all():
            if trial.state == self._states.RUNNING:
                self._settle(self._trial(trial.number))

    def _number_seed(self, what: object) -> int:
        return zlib.crc32(f"{self.seed}/{self.method}/{what}".encode())

    def _all(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def trials(self) -> list[Trial]:
        """Every trial that was begun, by number."""
        names = {self._states.COMPLETE: "finished", self._states.FAIL: "failed", self._states.RUNNING: "running"}
        return [
            Trial(
                self.method, t.number, {axis.key: rounded(t.params[axis.key]) for axis in self.axes},
                "design" if t.number < self.spread else "tpe", names[t.state],
                t.value if t.state == self._states.COMPLETE else None,
                t.user_attrs.get("seconds"), t.user_attrs.get("error", ""),
            )
            for t in self._all() if t.state in names
        ]  # fmt: skip

    def ask(self) -> Trial | None:
        """The next trial, which counts as running from now on; None while TPE has to wait for an earlier one."""
        running = [t for t in self._all() if t.state == self._states.RUNNING]
        begun = sum(t.state != self._states.WAITING for t in self._all())
        if begun >= self.spread and running:
            return None
        if begun >= self.spread and all(t.state != self._states.WAITING for t in self._all()):
            self.study.enqueue_trial(self._propose(begun))
        trial = self.study.ask()
        self._settle(trial)
        return self.trials()[trial.number]

    def _propose(self, number: int) -> dict[str, Any]:
        """TPE's settings for a trial: a function of what was told of the earlier ones alone, whatever was killed between."""
        sampler = self._optuna.samplers.TPESampler(seed=self._number_seed(number), n_startup_trials=ENOUGH)
        study = self._optuna.create_study(direction="maximize", sampler=sampler)  # in memory
        for told in self.trials():
            if told.criterion is not None:
                study.enqueue_trial(told.settings)
                past = study.ask()
                for axis in self.axes:
                    axis.suggest(past)
                study.tell(past, told.criterion)
        trial = study.ask()
        for axis in self.axes:
            axis.suggest(trial)
        return {axis.key: rounded(trial.params[axis.key]) for axis in self.axes}

    def _trial(self, number: int) -> Any:
        return self._optuna.trial.Trial(self.study, self._all()[number]._trial_id)

    def _settle(self, trial: Any) -> None:
        """The planned or proposed values into a trial's parameters: a kill may have come between two."""
        for axis in self.axes:
            axis.suggest(trial)

    def tell(self, number: int, criterion: float | None, seconds: float | None, error: str = "") -> None:
        """What came of a trial; ``criterion`` None: it failed, and ``error`` says why."""
        trial = self._trial(number)
        trial.set_user_attr("seconds", seconds)
        if criterion is None:
            trial.set_user_attr("error", error)
            self.study.tell(number, state=self._states.FAIL)
        else:
            self.study.tell(number, criterion)
