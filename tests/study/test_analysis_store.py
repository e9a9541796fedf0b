"""An analysis's folder after settings have come and gone."""

from __future__ import annotations

from typing import Any

import pytest

from keeplora.errors import KeepLoraError
from keeplora.experiment import load_config
from keeplora.study.analyze.store import AnalysisStore


def identity(**tuner: Any) -> dict[str, Any]:
    config = load_config({"suite": "demo-small", "method": "keeplora++"})
    return {
        "model": "embedded", "limit": 100, "tuner": config.tuner.model_dump() | tuner, "video": config.video.model_dump(),
        "training": config.training.model_dump(), "generation": config.generation.model_dump(),
    }  # fmt: skip


def older(told: dict[str, Any], **had: Any) -> dict[str, Any]:
    """As a keeplora wrote it that did not know `energy_general`, `parts` and `workers`, and knew settings that are gone."""
    tuner = {key: value for key, value in told["tuner"].items() if key not in ("energy_general", "parts")}
    training = {key: value for key, value in told["training"].items() if key != "workers"}
    return {**told, "tuner": {**tuner, "rank_allocation": "uniform", **had}, "training": training}


def test_a_setting_that_came_later_at_its_default_is_the_same_analysis(tmp_path):
    with AnalysisStore(tmp_path / "a").writing(older(identity())):
        pass
    with AnalysisStore(tmp_path / "a").writing(identity()):
        pass
    assert AnalysisStore(tmp_path / "a").check(identity()) is not None


@pytest.mark.parametrize(
    ("wrote", "now", "says"),
    [
        (older(identity()), identity(energy_general=0.9), "tuner"),
        (older(identity(), rank_allocation="share"), identity(), "tuner"),
        (older(identity()), {**identity(), "limit": 5}, r"limit 100 \(now 5\)"),
    ],
)
def test_another_value_is_another_analysis(tmp_path, wrote, now, says):
    with AnalysisStore(tmp_path / "a").writing(wrote):
        pass
    with pytest.raises(KeepLoraError, match=f"another model, other data or other options: {says}"):
        AnalysisStore(tmp_path / "a").check(now)
