"""Settings that there are no more, and what saved ones are read as. Light: whoever opens a run's folder imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TUNER = {
    "energy_before": 0.0, "rank_allocation": "uniform", "energy_allocation": "uniform", "refresh_factor": False,
    "trim_tolerance": None,
}  # fmt: skip
"""Fields of the tuner, with the value under which they changed nothing."""


def without_retired(tuner: Mapping[str, Any]) -> dict[str, Any]:
    """A tuner's saved settings without the fields that there are no more and that changed nothing: ledgers and runs that have
    them open.

    >>> without_retired({"r": 8, "energy_before": 0.0}), without_retired({"energy_before": 0.5})
    ({'r': 8}, {'energy_before': 0.5})
    """
    return {key: value for key, value in tuner.items() if key not in TUNER or value != TUNER[key]}
