"""Which differences between two configurations another number would come of."""

from __future__ import annotations

import pytest

from keeplora.experiment.resuming import changed_settings


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ({"model": {"name": "a"}}, {"model": {"name": "b"}}, ["model.name 'a' (now 'b')"]),
        ({"judge": {"device": "cpu"}}, {"judge": {"device": "cuda"}}, ["judge.device 'cpu' (now 'cuda')"]),
        ({"tuner": {"options": {}}}, {"tuner": {"options": {"lambda": 5}}}, ["tuner.options {} (now {'lambda': 5})"]),
        (
            {"tuner": {"gamma": {"vision": 0.2, "default": 1}}},
            {"tuner": {"gamma": {"vision": 0.2, "text": 1}}},
            ["tuner.gamma {'vision': 0.2, 'default': 1} (now {'vision': 0.2, 'text': 1})"],
        ),
        ({"tuner": {"r": 8, "gone": 1}, "device": "cpu"}, {"tuner": {"r": 8.0, "new": 1}, "device": "cuda"}, []),
        ({"training": {"workers": 4}, "seed": 1}, {"training": {"workers": 0}, "seed": 0}, []),
        ({"tasks": [{"name": "x" * 99}]}, {"tasks": []}, ["tasks [{'name': '" + "x" * 46 + "… (now [])"]),
    ],
)
def test_what_another_number_would_come_of(was, now, told):
    assert changed_settings(was, now) == told
