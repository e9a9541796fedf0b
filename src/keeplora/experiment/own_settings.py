"""Which settings a user chose, apart from what a preset or a suite brings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from keeplora.experiment.config import _merge, _nested, _per_method
from keeplora.experiment.config_source import read


def own_settings(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> list[str]:
    """Keys of ``tuner:`` that the file (its ``per_method`` entry too) or the overrides hold, in order, and ``learning_rate``.

    >>> own_settings({"suite": "demo", "tuner": {"r": 8}}, {"tuner.gamma.text": 1.0})
    ['gamma', 'r']
    """
    values = read(source)[0].values
    values = _merge(values, _nested(overrides or {}, values))
    found: set[str] = set()
    for layer in (values, _per_method(values, values.get("method"))):
        tuner, training = layer.get("tuner"), layer.get("training")
        found |= set(tuner) if isinstance(tuner, Mapping) else set()
        found |= {"learning_rate"} & set(training) if isinstance(training, Mapping) else set()
    return sorted(found)
