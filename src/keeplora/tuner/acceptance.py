"""`accept`: a finished task may not cost the old tasks and probes more than was agreed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keeplora.errors import ConfigError, did_you_mean

ACTIONS = ("warn", "undo")


@dataclass
class Acceptance:
    """What ``evaluate`` returned before the task, and how far it may fall."""

    max_drop: float
    action: str
    evaluate: Callable[[], Mapping[str, float]]
    before: dict[str, float]

    @classmethod
    def begin(
        cls, accept: Mapping[str, Any] | None, evaluate: Callable[[], Mapping[str, float]] | None,
        before: Mapping[str, float] | None = None,
    ) -> Acceptance | None:  # fmt: skip
        """Check ``accept`` and measure the state ``before`` the task, if it is not given; None where nothing was asked."""
        if accept is None:
            return None
        for key in accept:
            if key not in ("max_drop", "action"):
                raise ConfigError(f"accept: unknown key {key!r}{did_you_mean(key, ['max_drop', 'action'])}")
        max_drop, action = accept.get("max_drop"), accept.get("action", "warn")
        if not isinstance(max_drop, (int, float)) or isinstance(max_drop, bool) or not max_drop >= 0:
            raise ConfigError(f"accept: max_drop must be a number of points, 0 or more, got {max_drop!r}")
        if action not in ACTIONS:
            raise ConfigError(f"accept: unknown action {action!r}{did_you_mean(str(action), ACTIONS)}")
        if evaluate is None:
            raise ConfigError(
                "accept needs `evaluate`: a function that returns the accuracy of each old task and probe by name"
            )
        return cls(float(max_drop), action, evaluate, dict(evaluate() if before is None else before))

    def passes(self, task: str) -> bool:
        """Measure again; False when the task is to be undone."""
        after = self.evaluate()
        drops = {name: before - after[name] for name, before in self.before.items()}
        bad = {name: drop for name, drop in drops.items() if not drop <= self.max_drop}  # NaN does not pass
        if not bad:
            return True
        told = ", ".join(f"{name} by {drop:.1f}" for name, drop in sorted(bad.items(), key=lambda item: -item[1]))
        warnings.warn(
            f"task {task!r} costs more than {self.max_drop:g} points: {told}"
            + ("; it is undone and does not enter the ledger" if self.action == "undo" else ""),
            stacklevel=4,
        )
        return self.action != "undo"
