"""What an analysis measures: its points, each with a name that its file bears, in the order of measuring."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.analysis.spectrum import MEASURES
from keeplora.errors import ConfigError, KeepLoraError, did_you_mean
from keeplora.tuner.targets import Target

SHARES = (0.0, 0.5, 0.7, 0.85, 0.95, 1.0)
"""Of the spectrum, the grid of `intra`."""
MODES = ("leading", "trailing")
"""Which end of the spectrum weights are rebuilt from."""
THIRD_SHARES = (0.5, 0.85, 0.95)
WINDOWS = 3
MOST_STEPS = 12
"""Most steps in which updates are undone over the depth: a block a step in models of no more blocks."""
INTER = ("thirds", "windows", "spectra")
INTER_RUN = ("layers", "undo")
GENERAL = ("auto", "reference", "probes")
HELD_OUT = 0.25
"""Share of a task's training data that windows are judged on, where the experiment holds none out."""
LIMIT = 200


@dataclass(frozen=True)
class Point:
    """One thing to measure.

    Attributes:
        kind: what; `keeplora.study.analyze.measure` has a function per kind. values: JSON values that say which.
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique, and safe as a file's.

        >>> Point("intra", {"part": "vision_model", "mode": "leading", "share": 0.85}).name
        'intra-vision_model-leading-0.85'
        """
        return "-".join([self.kind, *(re.sub(r"[^\w.]+", "_", f"{v}") for v in self.values.values())])


@dataclass(frozen=True)
class AnalysisPlan:
    """What is looked at and how; the same plan finds the same numbers.

    Attributes:
        source: a resolved experiment configuration (`ExperimentConfig.resolved`), or with ``run`` that of the run.
        output: the analysis's folder. run: a finished run's directory, or None.
        limit: most samples of each set; None: all. general: which sets stand for general knowledge, one of `GENERAL`.
        by: what a share of the spectrum is of, one of `MEASURES`. seed: of the choice of samples, and of training.
        tasks: on how many tasks, from the first, windows of layers are adapted. windows: into how many the depth is divided.
    """

    source: Mapping[str, Any]
    output: Path
    run: Path | None = None
    limit: int | None = LIMIT
    general: str = "auto"
    by: str = "energy"
    seed: int = 0
    tasks: int = 2
    windows: int = WINDOWS

    def __post_init__(self) -> None:
        for name, choices in (("general", GENERAL), ("by", MEASURES)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"--{name}: unknown word {value!r}{did_you_mean(value, choices)}")
        if self.limit is not None and self.limit < 4:
            raise ConfigError(f"--limit is {self.limit}: with fewer than 4 samples of a set nothing can be told")
        if self.tasks < 1:
            raise ConfigError(f"--tasks is {self.tasks}: windows of layers are adapted on at least one task")
        if self.windows < 2:
            raise ConfigError(f"--windows is {self.windows}: the depth is divided into at least two windows")

    @property
    def told(self) -> dict[str, Any]:
        """The options on which the numbers depend."""
        return {"limit": self.limit, "general": self.general, "by": self.by, "seed": self.seed}


def parts_of(targets: Sequence[Target]) -> list[str]:
    """The towers, in the model's order."""
    return list(dict.fromkeys(t.tower or "model" for t in targets))


def in_part(target: Target, part: str) -> bool:
    return part == "all" or (target.tower or "model") == part


def window_of(target: Target, windows: int = WINDOWS) -> int | None:
    """Which of so many windows of depth a target lies in, 0 the shallowest; None for one without a depth.

    >>> t = Target("a", "vision", 3, 12, 4, 4, 1.0, 4, 4.0)
    >>> window_of(t), window_of(t, 12)
    (0, 3)
    """
    if target.depth is None or target.blocks < 2:
        return None
    return _window(target.depth, target.blocks, windows)


def _window(depth: int, blocks: int, windows: int) -> int:
    return int((depth + 0.5) * windows / blocks)


def window_name(index: int, windows: int = WINDOWS) -> str:
    """ "the shallow third", "the middle third", "the deep third"."""
    names = ("the shallow third", "the middle third", "the deep third")
    return names[index] if windows == len(names) else f"window {index + 1} of {windows}"


def windows_present(targets: Sequence[Target], windows: int = WINDOWS) -> list[int]:
    return sorted({w for t in targets if (w := window_of(t, windows)) is not None})


def blocks_of(targets: Sequence[Target]) -> dict[str, int]:
    """Blocks of each tower that has some, in the model's order."""
    return {t.tower: t.blocks for t in targets if t.depth is not None}


def window_blocks(index: int, windows: int, blocks: Mapping[str, int]) -> str:
    """Which blocks a window is.

    >>> window_blocks(0, 3, {"vision": 12, "text": 6}), window_blocks(1, 12, {"vision": 12, "text": 6})
    ('blocks 0–3 of vision and 0–1 of text', 'blocks 1 of vision and 0 of text')
    >>> window_blocks(0, 12, {"vision": 12, "text": 6})
    'block 0 of vision'
    """
    there = []
    for tower, n in blocks.items():
        inside = [d for d in range(n) if n > 1 and _window(d, n, windows) == index]
        if inside:
            span = f"{inside[0]}–{inside[-1]}" if len(inside) > 1 else f"{inside[0]}"
            there.append((span, f"{span} of {tower or 'the model'}"))
    word = "block" if len(there) == 1 and "–" not in there[0][0] else "blocks"
    return f"{word} {' and '.join(text for _, text in there)}"


def undo_steps(targets: Sequence[Target]) -> int:
    """Steps in which updates are undone: a block of the deepest tower each, or `MOST_STEPS` of several blocks."""
    return min(MOST_STEPS, max(blocks_of(targets).values(), default=1))


def check_shares(shares: Sequence[float]) -> list[float]:
    """The grid in order, 0 and 1 (the two ends that every rule needs) put in."""
    for share in shares:
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"--shares holds {share:g}, but a share of the spectrum lies between 0 and 1")
    return sorted({0.0, 1.0, *shares})


def check_what(words: Sequence[str], choices: Sequence[str], where: str) -> list[str]:
    for word in words:
        if word not in choices:
            raise ConfigError(f"--what: {where} has no {word!r}{did_you_mean(word, choices)}")
    return [word for word in choices if word in words] or list(choices)


def intra_points(
    targets: Sequence[Target], shares: Sequence[float], parts: Sequence[str] | None = None,
    configured: Mapping[str, float] | None = None,
) -> list[Point]:  # fmt: skip
    """The spectrum: each part's weights from their leading components, and from the trailing ones that hold as much.

    Args:
        configured: ε_w per tower: a share that each tower is tried at as well, for what is suggested in its
            place must be better than it.
    """
    there = parts_of(targets)
    for part in parts or ():
        if part not in (*there, "all"):
            raise ConfigError(f"--parts: no tower is named {part!r}{did_you_mean(part, [*there, 'all'])}")
    points = [Point("untouched")]
    for part in parts or there:
        own = [] if part == "all" else [v for tower, v in (configured or {}).items() if (tower or "model") == part]
        for mode in MODES:
            # Nothing kept, and everything, is the same from either end: told once, and checked once.
            grid = [s for s in check_shares([*shares, *own]) if mode == "leading" or 0 < s < 1]
            points += [Point("intra", {"part": part, "mode": mode, "share": share}) for share in grid]
    return points


def inter_points(targets: Sequence[Target], what: Sequence[str], tasks: int, windows: int = WINDOWS) -> list[Point]:
    """The depth, on an untouched model: thirds truncated, windows adapted, gradients and features.

    Raises:
        ConfigError: more windows than the deepest tower has blocks. KeepLoraError: no depth.
    """
    thirds = windows_present(targets)
    if len(thirds) < 2 and ("thirds" in what or "windows" in what):
        raise KeepLoraError("the targets have no depth to be cut into thirds: no tower has two blocks")
    deepest = max(blocks_of(targets).values(), default=1)
    if windows > max(deepest, WINDOWS):
        raise ConfigError(f"--windows is {windows}, but the deepest tower has {deepest} blocks: give 2 to {deepest}")
    points = [Point("untouched")]
    if "spectra" in what:
        points.append(Point("spectra"))
    if "thirds" in what:
        points += [Point("third", {"window": w, "share": share}) for w in thirds for share in THIRD_SHARES]
    if "windows" in what:
        # Thirds bear the name that they always had.
        of = {} if windows == WINDOWS else {"windows": windows}
        there = windows_present(targets, windows)
        points += [Point("window", {"task": t, "window": w, **of}) for t in range(1, tasks + 1) for w in there]
    return points


def run_points(what: Sequence[str], learned: int, steps: int) -> list[Point]:
    """The depth, on a finished run: every layer after each task, and updates undone in so many steps (`undo_steps`)."""
    points: list[Point] = []
    if "layers" in what:
        points += [Point("layers", {"task": t}) for t in range(1, learned + 1)]
    if "undo" in what:
        points += [Point("undo", {"first": "shallow", "steps": k, "total": steps}) for k in range(steps + 1)]
        # All undone, and nothing, are the same from either end.
        points += [Point("undo", {"first": "deep", "steps": k, "total": steps}) for k in range(1, steps)]
    return points


def label_of(plan_source: Mapping[str, Any], run: str | os.PathLike[str] | None) -> str:
    """How pages name what was analysed."""
    if run is not None:
        return Path(run).name
    return str(plan_source.get("name") or Path(str(plan_source.get("suite") or "experiment")).stem)
