"""`keeplora run --auto`: the analysis first, then the run with what it suggests wherever the user did not say otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment import ExperimentConfig
from keeplora.files import sha256_file
from keeplora.methods import get_method
from keeplora.study.analyze.plan import LIMIT, SHARES, AnalysisPlan, Point, inter_points, intra_points
from keeplora.study.analyze.run import Analysis, analyze
from keeplora.study.analyze.store import AnalysisStore
from keeplora.study.analyze.world import World
from keeplora.study.plan_values import safe
from keeplora.tuner import ContinualLearner

SETTINGS = ("energy_weights", "energy_features", "gamma", "r")
WHAT = ("windows", "spectra")
"""Of `inter`, what suggestions come from; cut thirds are for the reader alone."""


class Taken(NamedTuple):
    """What a run takes from an analysis.

    Attributes:
        overrides: settings by dotted key. said: a line per setting, taken or not, for whoever watches.
        record: what the run's results tell of it (JSON values).
    """

    overrides: dict[str, Any]
    said: list[str]
    record: dict[str, Any]


def check_method(name: str) -> None:
    """Refuse methods that none of these settings steer."""
    method = get_method(name)
    if method.learner is not ContinualLearner:
        raise ConfigError(
            f"--auto sets ε_w, ε_f, γ and the rank of KeepLoRA, which method {name!r} does not read: use keeplora++, or leave "
            "--auto out"
        )


def analysis_for(
    config: ExperimentConfig, *, limit: int | None = LIMIT, jobs: int | None = None, quiet: bool | None = None,
    folder: Path | None = None,
) -> Analysis:  # fmt: skip
    """The analysis that a run of ``config`` goes by: found where it was made before of the same model, data and options.

    It lies in ``runs/analysis-LABEL-HASH`` below the current folder, or in ``folder``; of another name there, by what it is of.
    """
    check_method(config.method)
    source = {k: v for k, v in config.resolved().items() if k not in ("output", "loggers", "order_name")}
    plan = AnalysisPlan(source, Path(), limit=limit, seed=config.seed)
    world = World(plan)
    identity = world.identity()
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    usual = Path("runs") / f"analysis-{safe(config.label)}-{key}"
    # The folder that `--auto` made first: one of `keeplora analyze` has a grid and a page of its own.
    there = (
        p for p in sorted(Path("runs").glob("analysis-*"), key=lambda p: (p != usual, p.name)) if _is_of(p, identity)
    )
    place = folder or next(there, usual)
    plan = AnalysisPlan(source, place, limit=limit, seed=config.seed)

    def points(world: World) -> Iterator[Point]:
        yield from intra_points(world.targets, SHARES, configured=world.configured_energies)
        yield from inter_points(world.targets, WHAT, min(plan.tasks, len(world.setup.tasks)))

    return analyze(plan, lambda w: list(points(w)), jobs=jobs, quiet=quiet, world=world)


def _is_of(folder: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return AnalysisStore(folder).check(identity) is not None
    except KeepLoraError:  # of something else, or of no one's
        return False


def take(analysis: Analysis, config: ExperimentConfig, own: Sequence[str]) -> Taken:
    """Which suggestions the run takes.

    Args:
        own: keys that the user set (`keeplora.experiment.own_settings.own_settings`).

    Neither a rank nor a γ comes with another learning speed: with a rank lora_alpha changes, so that lora_alpha / r stays, and
    with a γ the learning rate, so that the mean square of layer_scale · learning rate over the targets stays.
    """
    made = analysis.results["suggestion"]
    where = str(analysis.folder)
    overrides: dict[str, Any] = {}
    said: list[str] = []
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        value, now = made[name], getattr(config.tuner, name)
        why = _kept(name, value, config, own)
        if name == "energy_features" and why is None and made["r"] is not None and _kept("r", made["r"], config, own):
            why = f"for {_text(value)} was made for rank {made['r']}, which the run does not take"
        if why is None:
            overrides[f"tuner.{name}"] = value
            said.append(f"{name}: {_text(value)} from the analysis (was {_text(now)})")
        else:
            said.append(f"{name}: {_text(now)}, {why}")
        settings[name] = {
            "suggested": value,
            "taken": why is None,
            "before": now,
            **({} if why is None else {"why": why}),
        }
    if "tuner.r" in overrides and "lora_alpha" not in own:
        overrides["tuner.lora_alpha"] = config.tuner.lora_alpha * overrides["tuner.r"] / int(config.tuner.r)  # type: ignore[arg-type]
        said.append(f"lora_alpha: {overrides['tuner.lora_alpha']:g}, so that lora_alpha / r stays")
    rate = made.get("learning_rate")
    if "tuner.gamma" in overrides and rate is not None:
        if "learning_rate" in own:
            said.append("learning_rate: as your configuration says, though another γ moves all layers by more or less")
        else:
            overrides["training.learning_rate"] = rate
            said.append(f"learning_rate: {_text(rate)}, so that all layers together move as far as before")
    results = analysis.folder / "results.json"
    record = {
        "analysis": where, "results_sha256": sha256_file(results), "settings": settings, "evidence": made["evidence"],
        "data": analysis.results["note"],
    }  # fmt: skip
    return Taken(overrides, said, record)


def _kept(name: str, value: Any, config: ExperimentConfig, own: Sequence[str]) -> str | None:
    """Why a setting stays as it is; None: the suggestion is taken."""
    if name in own:
        return "as your configuration says"
    if value is None:
        return "for the figures give no reason to change it"
    if name == "gamma" and (config.tuner.schedule != "linear" or "schedule" in own):
        return "for the schedule is not the linear one that γ belongs to"
    if name == "gamma" and config.method.removesuffix("-cls") == "keeplora":
        return "for keeplora is the method with γ = 1; use keeplora++"
    if name == "r" and isinstance(config.tuner.r, Mapping):
        return "for the ranks are per tower"
    return None


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {v:g}" for k, v in value.items()) + "}"
    return "not told" if value is None else f"{value:g}"
