"""`KeepLoraConfig`: every wrong value is refused with its field and the value."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.errors import ConfigError
from tests.tuner.blocks import config, make_net, make_towers

BAD = [
    ("r", 0), ("r", 1.5), ("r", True), ("r", {"vision": 4, "text": -2}),
    ("energy_weights", 1.01), ("energy_weights", -0.1), ("energy_weights", "0.9"), ("energy_weights", float("nan")),
    ("energy_features", {"vision": 2.0}), ("gamma", 1.5), ("gamma", True), ("gamma", {}),
    ("lora_alpha", 0), ("lora_alpha", -1.0), ("lora_alpha", float("inf")), ("lora_alpha", "16"),
    ("gradient_samples", 0), ("feature_samples", 2.5), ("gradient_samples", True),
    ("schedule", "liner"), ("schedule", {"vision": "constnt"}), ("memory", "feature"),
    ("target_modules", []), ("target_modules", ["q", 3]), ("exclude_modules", [""]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={v!r}" for n, v in BAD])
def test_bad_value_is_named_with_its_field(name, value):
    with pytest.raises(ConfigError) as error:
        KeepLoraConfig(**{name: value})
    text = str(error.value)
    assert text.startswith(name)
    wrong = next(iter(v for v in value.values() if v not in (4,)), None) if isinstance(value, dict) else value
    if wrong is not None:
        assert repr(wrong) in text


@pytest.mark.parametrize(("kwargs", "hint"), [
    ({"schedule": "liner"}, "did you mean 'linear'?"), ({"memory": "gradient"}, "did you mean 'gradients'?"),
])  # fmt: skip
def test_misspelt_name_gets_a_hint(kwargs, hint):
    with pytest.raises(ConfigError, match=hint.replace("?", r"\?")):
        KeepLoraConfig(**kwargs)


def test_every_field_has_help():
    assert all(f.metadata.get("help") for f in fields(KeepLoraConfig))


def test_dict_survives_json():
    made = config(gamma={"vision": 0.2, "default": 1.0}, schedule=[0.5, 1.0], exclude_modules=["head"])
    assert KeepLoraConfig(**json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(("key", "hint"), [("vision_modl", "vision_model"), ("txt_model", "text_model")])
def test_tower_key_without_tower_is_refused_with_a_hint(key, hint):
    with pytest.raises(ConfigError, match=rf"^gamma: no tower is named '{key}'; did you mean '{hint}'\?"):
        ContinualLearner(make_towers(), config(gamma={key: 0.5, "default": 1.0}))


def test_the_short_name_of_a_tower_is_offered():
    with pytest.raises(
        ConfigError, match=r"'visoin'; did you mean 'vision'\? \(one of: default, text, text_model, vision, "
    ):
        ContinualLearner(make_towers(), config(gamma={"visoin": 0.5, "default": 1.0}))


@pytest.mark.parametrize("key", ["vision", "text", "language", "default"])
def test_role_keys_may_name_a_tower_that_is_not_there(key):
    assert ContinualLearner(make_net(), config(gamma={key: 0.5, "default": 1.0})).targets


def test_tower_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"^r gives no value for the tower 'text_model'.*'default'"):
        ContinualLearner(make_towers(), config(r={"vision": 4}))


def test_longest_key_wins():
    made = config(gamma={"vision": 0.1, "vision_model": 0.3, "default": 0.9})
    assert made.for_tower("gamma", "vision_model") == 0.3
    assert made.for_tower("gamma", "model.vision_tower") == 0.1
    assert made.for_tower("gamma", "text_model") == 0.9
