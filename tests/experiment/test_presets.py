"""Presets hold the reference's numbers, and every one of them is a usable configuration."""

from __future__ import annotations

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment.config import load_config
from keeplora.experiment.presets import WHOLE_KEYS, deep_merge, load_preset, preset_names, preset_values

ORDER_I = ["Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers102", "Food101", "MNIST", "OxfordPet",
           "StanfordCars", "SUN397"]  # fmt: skip
ORDER_II = ["StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD",
            "EuroSAT", "CIFAR100"]  # fmt: skip


def config(preset, tasks, **changes):
    specs = [{"name": name, "source": "folder"} for name in tasks]
    return load_config({"preset": preset, "tasks": specs, "model": "m", "method": "keeplora++", **changes})


def epochs(preset, tasks, **changes):
    training = config(preset, tasks, **changes).training
    return [training.for_task(name).epochs for name in tasks]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_configuration_without_overrides(name):
    loaded = config(name, ["one", "two"])
    assert loaded.overridden == []
    assert loaded.early_stopping is None
    assert not loaded.best_epoch
    assert load_preset(name)["description"]


def test_names():
    assert {"default", "mtil", "mllm-dcl", "ucit", "cl-vista"} <= set(preset_names())
    for twin in ("mllm-dcl", "ucit", "cl-vista"):
        assert config(twin, ["a"]).tuner.memory == "gradients"
        features, gradients = config(f"{twin}-features", ["a"]), config(twin, ["a"])
        assert features.tuner.memory == "features"
        assert features.tuner.model_copy(update={"memory": "gradients"}) == gradients.tuner
        assert features.training == gradients.training


def test_mtil():
    loaded = config("mtil", ORDER_I)
    tuner, training = loaded.tuner, loaded.training
    assert (tuner.r, tuner.lora_alpha, tuner.energy_features, tuner.memory) == (16, 1.0, 0.99, "features")
    assert tuner.energy_weights == {"vision": 0.85, "text": 0.2}
    assert tuner.gamma == {"vision": 0.2, "text": 1.0}
    assert (training.learning_rate, training.weight_decay, training.batch_size) == (1e-3, 0.01, 64)
    assert (training.schedule, training.precision, loaded.seed) == ("onecycle", "auto", 42)
    assert epochs("mtil", ORDER_I) == [10] * 10 + [5]
    assert epochs("mtil-order-ii", ORDER_II) == [5, 2, 5, 5, 5, 5, 10, 10, 10, 10, 10]
    assert epochs("mtil", ORDER_I, method="lora-cls") == [5] * 11
    assert epochs("mtil", ["pets", "sun 397"]) == [10, 5]  # the same data under the user's spelling


@pytest.mark.parametrize(
    ("name", "r", "alpha", "rate", "batch", "samples"),
    [("mllm-dcl", 64, 128, 2e-5, 64, 0.2), ("ucit", 32, 8, 2e-4, 64, 0.2), ("cl-vista", 64, 128, 1e-4, 16, 0.1)],
)
def test_generative_presets(name, r, alpha, rate, batch, samples):
    loaded = config(name, ["a"])
    tuner, training = loaded.tuner, loaded.training
    assert (tuner.r, tuner.lora_alpha, tuner.energy_weights, tuner.energy_features) == (r, alpha, 0.6, 0.99)
    assert (tuner.gamma, tuner.gradient_samples) == (0.2, samples)
    assert tuner.target_modules is None  # the seven linears of each block of the language model, found by the family
    assert tuner.parts.model_dump() == {"language": "protected", "projector": "free", "vision": "frozen"}
    assert (training.learning_rate, training.batch_size, training.weight_decay) == (rate, batch, 0)
    assert (training.schedule, training.warmup) == ("cosine", 0.03)


def test_generative_values_per_task():
    assert epochs("mllm-dcl", ["RS", "Med", "AD", "Sci", "Fin"]) == [1, 3, 1, 2, 1]
    assert epochs("ucit", ["ArxivQA", "Flickr30k"]) == [1, 1]
    training = config("ucit", ["ArxivQA", "Flickr30k"]).training
    assert [training.for_task(name).learning_rate for name in ("ArxivQA", "Flickr30k")] == [2e-4, 1e-4]


def test_default_is_ours():
    loaded = config("default", ["a"])
    assert loaded.training.weight_decay == 0
    assert loaded.tuner.memory == "features"


def test_unknown_preset_gets_a_hint():
    with pytest.raises(ConfigError, match="unknown preset 'mtli'; did you mean 'mtil'"):
        load_preset("mtli")


def test_deep_merge_is_idempotent_and_keeps_its_arguments():
    low, top = {"a": {"x": 1, "r": {"p": 1}}, "b": 2}, {"a": {"y": 2, "r": {"q": 2}}}
    merged = deep_merge(low, top, WHOLE_KEYS)
    assert merged == {"a": {"x": 1, "y": 2, "r": {"q": 2}}, "b": 2}
    assert deep_merge(merged, top, WHOLE_KEYS) == merged
    assert low == {"a": {"x": 1, "r": {"p": 1}}, "b": 2}
    assert preset_values("default") == preset_values("default")
