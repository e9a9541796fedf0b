"""Configuration: layers, ranges, and the sentences that tell what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_samples import METHODS, base, refuse

import keeplora.suites
from keeplora.experiment.config import ExperimentConfig, load_config
from keeplora.yaml_text import dump_yaml, parse_yaml


@pytest.fixture
def suite(monkeypatch):
    """A packaged suite, in place of the real ones."""
    values = {
        "name": "toy",
        "description": "two tasks",
        "model": {"name": "embedded", "image_size": 112},
        "tasks": [{"name": "a", "source": "pack"}, {"name": "b", "source": "pack"}],
        "probes": [{"name": "p", "source": "pack"}],
        "training": {"epochs": 7, "learning_rate": 0.002},
        "tuner": {"r": 4},
        "per_method": {"keeplora": {"training": {"learning_rate": 0.004}}},
    }

    def load_suite(name):
        if name != "toy":
            raise keeplora.errors.KeepLoraError(f"unknown suite {name!r}; did you mean 'toy'?")
        return values

    monkeypatch.setattr(keeplora.suites, "load_suite", load_suite, raising=False)
    return values


# --- values and layers -------------------------------------------------------------------------------------------


def test_least_configuration_is_completed_by_the_default_preset():
    config = load_config(base(), known_methods=METHODS)
    assert config.model.name == "embedded"
    assert (config.training.epochs, config.training.weight_decay, config.tuner.gamma) == (3, 0.0, 0.2)
    assert config.validation is None
    assert config.accept is None
    assert not config.best_epoch
    assert config.overridden == []
    assert config.output_path == Path("runs/experiment-lora-seed0")


def test_layers_go_preset_suite_file_command_line(suite):
    def rate(method="lora", overrides=None, **file):
        return load_config({"suite": "toy", "method": method, **file}, overrides).training.learning_rate

    assert rate() == 0.002  # suite over preset
    assert rate("keeplora") == 0.004  # the suite's tuned value for this method over the suite's general one
    assert rate("keeplora", training={"learning_rate": 0.5}) == 0.5  # file over suite
    own = {"lora": {"training": {"learning_rate": 0.25}}}
    assert rate(per_method=own, training={"learning_rate": 0.5}) == 0.25  # the file's tuned value over its general one
    assert rate("keeplora", per_method=own, training={"learning_rate": 0.5}) == 0.5
    assert rate(overrides={"training.learning_rate": 0.1}, per_method=own) == 0.1  # command line over all
    assert rate("lora", {"method": "keeplora"}) == 0.004  # the method of the command line picks the entry


def test_a_suite_brings_tasks_probes_model_and_training(suite):
    config = load_config({"suite": "toy", "method": "lora"})
    assert config.task_names == ["a", "b"]
    assert [probe["name"] for probe in config.probes] == ["p"]
    assert (config.model.name, config.model.image_size) == ("embedded", 112)
    assert (config.training.epochs, config.tuner.r, config.training.batch_size) == (7, 4, 32)
    assert config.label == "toy"
    assert load_config({"suite": "toy", "method": "lora", "model": {"image_size": 98}}).model.image_size == 98
    other = load_config({"suite": "toy", "method": "lora", "model": "openai/clip"})
    assert (other.model.name, other.model.image_size) == ("openai/clip", None)  # not the embedded model's size


def test_suite_and_tasks_exclude_each_other(suite):
    assert "both `suite:` and `tasks:`" in refuse({**base(), "suite": "toy"})
    assert "neither `suite:` nor `tasks:`" in refuse({"method": "lora", "model": "embedded"})
    sentence = refuse({"suite": "tyo", "method": "lora"})
    assert sentence.startswith("configuration: unknown suite 'tyo'")
    assert "'toy'" in sentence


def test_overridden_lists_what_differs_from_the_preset():
    config = load_config(base(preset="mtil", tuner={"r": 8, "gamma": {"vision": 0.2, "text": 1.0}}, seed=42))
    assert [tuple(entry) for entry in config.overridden] == [("tuner.r", 16, 8)]
    assert str(config.overridden[0]) == "tuner.r: 8 (preset: 16)"
    assert [entry.key for entry in load_config(base(seed=3)).overridden] == ["seed"]


def test_values_per_task_and_per_tower():
    epochs = {"pets": 2, "default": 5}
    config = load_config(base(training={"epochs": epochs, "learning_rate": {"pets": 0.1, "signs": 0.2}}))
    assert [config.training.for_task(name).epochs for name in ("pets", "signs")] == [2, 5]
    assert [config.training.for_task(name).learning_rate for name in ("pets", "signs")] == [0.1, 0.2]
    assert "gives no value for task 'signs'" in refuse(base(training={"epochs": {"pets": 2}}))
    sentence = refuse(base(training={"epochs": {"pest": 2, "default": 1}}))
    assert "training.epochs.pest names an unknown task 'pest'; did you mean 'pets'?" in sentence


def test_one_entry_on_the_command_line_keeps_the_other_values():
    config = load_config(
        base(), {"training.epochs.pets": 9, "tuner.gamma.text": 1.0, "tuner.energy_weights.vision": 0.5}
    )
    assert config.training.epochs == {"default": 3, "pets": 9}
    assert config.tuner.gamma == {"default": 0.2, "text": 1.0}
    assert config.tuner.energy_weights == {"vision": 0.5, "text": 0.2, "default": 0.6}
    dotted = base(tasks=[{"name": "v1.5", "source": "pack"}])
    assert load_config(dotted, {"training.epochs.v1.5": 4}).training.for_task("v1.5").epochs == 4


def test_order(tmp_path):
    config = load_config(base(order=["signs", "pets"]))
    assert [spec["name"] for spec in config.ordered_tasks] == ["signs", "pets"]
    assert config.task_names == ["pets", "signs"]
    assert "order names an unknown task 'pest'; did you mean 'pets'?" in refuse(base(order=["pest", "signs"]))
    assert "order leaves out 'signs'" in refuse(base(order=["pets"]))
    assert "order names task 'pets' more than once" in refuse(base(order=["pets", "pets", "signs"]))


def test_base_dir_is_the_folder_of_the_file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(dump_yaml(base()))
    assert load_config(path).base_dir == str(tmp_path)
    assert load_config(path, {"base_dir": "data"}).base_dir == str(tmp_path / "data")
    assert load_config(path, base_dir="/").base_dir == "/"
    assert load_config(base()).base_dir == str(Path.cwd())


def test_python_values_are_accepted_as_plain_ones(tmp_path):
    config = load_config(base(output=tmp_path / "run", tuner={"target_modules": ("q_proj",), "schedule": (0.5, 1)}))
    assert config.output_path == tmp_path / "run"
    assert config.tuner.target_modules == ["q_proj"]
    assert config.tuner.schedule == [0.5, 1]


def test_output_folder_is_named_after_the_run():
    config = load_config(base(name="my pets/2", method="keeplora++-cls", seed=7))
    assert config.output_path == Path("runs/my-pets-2-keeplora++-cls-seed7")


def test_sample_caps():
    tuner = load_config(base(tuner={"gradient_samples": 0.2, "feature_samples": 50})).tuner
    assert [tuner.samples("gradient_samples", n) for n in (1, 10, 11)] == [1, 2, 3]
    assert tuner.samples("feature_samples", 10) == 50
    assert load_config(base()).tuner.samples("feature_samples", 10) is None


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.learning_rate", -1e-3, "training.learning_rate is -0.001, but must be greater than 0"),
        ("training.learning_rate", 0, "training.learning_rate is 0, but must be greater than 0"),
        ("training.learning_rate", float("nan"), "must be"),
        ("training.learning_rate", float("inf"), "finite"),
        ("training.learning_rate", "fast", "is 'fast', but must be a number"),
        ("training.epochs", 0, "training.epochs is 0, but must be at least 1"),
        ("training.epochs", 1.5, "is 1.5, but must be a whole number"),
        ("training.epochs", True, "is True, but must be a whole number"),
        ("training.epochs", {}, "must hold at least one entry"),
        ("training.batch_size", 0, "must be at least 1"),
        ("training.weight_decay", -0.1, "must be at least 0"),
        ("training.schedule", "cosin", "must be one of onecycle, cosine, constant; did you mean 'cosine'?"),
        ("training.optimizer", "sgd", "must be one of adamw"),
        ("training.precision", "fp16", "must be one of auto, fp32, bf16"),
        ("training.warmup", 1.0, "training.warmup is 1.0, but must be less than 1"),
        ("training.grad_clip", 0.0, "must be greater than 0"),
        ("training.workers", -1, "must be at least 0"),
        ("tuner.r", 0, "tuner.r is 0, but must be at least 1"),
        ("tuner.r", {"vision": 0}, "tuner.r.vision is 0, but must be at least 1"),
        ("tuner.lora_alpha", 0, "must be greater than 0"),
        ("tuner.gamma", 1.01, "tuner.gamma is 1.01, but must be at most 1"),
        ("tuner.gamma", -0.1, "tuner.gamma is -0.1, but must be at least 0"),
        ("tuner.gamma", {"text": 2}, "tuner.gamma.text is 2, but must be at most 1"),
        ("tuner.energy_weights", 1.2, "must be at most 1"),
        ("tuner.energy_features", -1, "must be at least 0"),
        ("tuner.schedule", "linaer", "did you mean 'linear'?"),
        ("tuner.schedule", [], "must be linear, constant or a list"),
        ("tuner.schedule", [0.1, -1], "must be linear, constant or a list"),
        ("tuner.schedule", [True], "must be linear, constant or a list"),
        ("tuner.memory", "feature", "did you mean 'features'?"),
        ("tuner.gradient_samples", 0, "must be at least 1 sample"),
        ("tuner.gradient_samples", 1.0, "must be a share between 0 and 1"),
        ("tuner.feature_samples", "all", "must be a whole number of samples"),
        ("tuner.target_modules", [1], "must be a list of module names"),
        ("tuner.target_modules", [], "must be a list of module names"),
        ("seed", -1, "seed is -1, but must be at least 0"),
        ("seed", 2**32, "must be less than"),
        ("threads", 0, "threads is 0, but must be at least 1"),
        ("device", "gpu", "must be one of auto, cpu, cuda"),
        ("validation", 0, "must be a share of the training data"),
        ("validation", 1.0, "must be a share of the training data"),
        ("validation", {"pets": 3}, "validation.pets is 3, but must be a share of the training data"),
        ("validation", {"pest": 0.1}, "did you mean 'pets'?"),
        ("early_stopping", {"patience": 0}, "early_stopping.patience is 0"),
        ("accept", {"max_drop": -1}, "accept.max_drop is -1"),
        ("accept", {"max_drop": 1, "action": "und"}, "did you mean 'undo'?"),
        ("model.image_size", 0, "model.image_size is 0"),
        ("output", "", "output is '', but must not be empty"),
        ("training", None, "training is empty (null), but must be a mapping"),
        ("probes", {}, "must be a list"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_its_range(key, value, words):
    sentence = refuse(base(), {key: value})
    assert words in sentence
    assert key in sentence
    assert sentence.startswith("command line: ")
    assert "\n" not in sentence


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_the_ends_of_a_closed_range_are_allowed(value):
    config = load_config(base(), {"tuner.gamma": value, "tuner.energy_weights": value, "tuner.energy_features": value})
    assert config.tuner.gamma == value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metod": "lora"}, "unknown key 'metod' at the top level; did you mean 'method'?"),
        ({"training": {"epoch": 1}}, "unknown key 'epoch' in training; did you mean 'epochs'?"),
        ({"tuner": {"gama": 1}}, "unknown key 'gama' in tuner; did you mean 'gamma'?"),
        ({"model": {"name": "x", "size": 3}}, "unknown key 'size' in model"),
        ({"learning_rate": 1}, "it belongs under `training:`"),
        ({"training": {"gamma": 1}}, "it belongs under `tuner:`"),
        ({"training": {"seed": 1}}, "it belongs at the top level"),
        ({"method": "lorra"}, "unknown method 'lorra'; did you mean 'lora'?"),
        ({"method": 3}, "method is 3, but must be a word"),
        ({"preset": "mtl"}, "unknown preset 'mtl'; did you mean 'mtil'?"),
        ({"preset": ["mtil"]}, "unknown preset"),
        ({"per_method": {"lorra": {}}}, "unknown method 'lorra'; did you mean 'lora'?"),
        (
            {"per_method": {"lora": {"trainin": {}}}},
            "unknown key 'trainin' in per_method.lora; did you mean 'training'?",
        ),
        ({"per_method": {"keeplora": {"tuner": {"gama": 1}}}}, "per_method.keeplora: unknown key 'gama' in tuner"),
        ({"per_method": {"keeplora": {"tuner": {"gamma": 2}}}}, "per_method.keeplora: tuner.gamma is 2"),
        ({"per_method": {"lora": {"training": {"epochs": 0}}}}, "per_method.lora: training.epochs is 0"),
        ({"per_method": []}, "per_method is [], but must be a mapping"),
        ({"tasks": []}, "tasks is empty; give at least one task"),
        ({"tasks": [{"source": "folder"}]}, "tasks.0 has no `name:`"),
        ({"tasks": [{"nam": "a", "source": "folder"}]}, "tasks.0 has no `name:`; did you mean 'nam'?"),
        ({"tasks": [{"name": "a"}]}, "tasks.0 has no `source:`"),
        ({"tasks": [{"name": 3, "source": "folder"}]}, "tasks.0 has `name: 3`, which must be a word"),
        ({"tasks": ["a"]}, "tasks.0 is 'a', but must be a mapping"),
        ({"tasks": [{"name": "default", "source": "folder"}]}, "choose another name"),
    ],
)
def test_unknown_names_get_a_hint(values, words):
    sentence = refuse(base(**values))
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b", "a:b", "con", "NUL.txt", "a ", "x" * 65, "", "a\nb"])
def test_names_that_no_file_can_have_are_refused(name):
    assert "name" in refuse(base(tasks=[{"name": name, "source": "folder"}]))


@pytest.mark.parametrize("name", ["a", "Road signs", "v1.5", "straße", "digits_0-9", "c++", "x" * 64])
def test_ordinary_names_are_accepted(name):
    assert load_config(base(tasks=[{"name": name, "source": "folder"}])).task_names == [name]


def test_names_are_unique_over_tasks_and_probes_whatever_their_case():
    sentence = refuse(base(probes=[{"name": "Pets", "source": "folder"}]))
    assert sentence == "configuration: probes.0 has the name 'Pets', which tasks.0 has already"


@pytest.mark.parametrize(
    ("values", "decides"),
    [
        ({"early_stopping": {"patience": 2}}, "when training stops"),
        ({"best_epoch": True}, "which epoch is kept"),
        ({"accept": {"max_drop": 1.0}}, "whether a task is kept"),
    ],
)
def test_choices_need_validation_data(values, decides):
    sentence = refuse(base(**values))
    assert next(iter(values)) + " needs validation data" in sentence
    assert f"test data may not decide {decides}" in sentence
    assert load_config(base(**values, validation=0.1)).validation_for("pets") == 0.1
    assert "task 'signs' has none" in refuse(base(**values, validation={"pets": "held-out/pets"}))
    both = load_config(base(**values, validation={"pets": "held-out/pets", "default": 0.2}))
    assert [both.validation_for(name) for name in ("pets", "signs")] == ["held-out/pets", 0.2]
    specs = [{"name": "pets", "source": "folder", "validation": "val"}]
    assert load_config(base(tasks=specs, **values)).validation_for("pets") == "val"


def test_every_problem_is_told_at_once():
    sentence = refuse(base(training={"epochs": 0, "lr": 1}, tuner={"r": 0}, seed=-1, metod="x"))
    assert sentence.startswith("5 problems in the configuration:\n")
    for words in ("training.epochs is 0", "unknown key 'lr'", "tuner.r is 0", "seed is -1", "unknown key 'metod'"):
        assert sentence.count(words) == 1


def test_a_problem_in_this_methods_entry_is_told_once():
    sentence = refuse(base(per_method={"lora": {"training": {"epochs": 0}}}))
    assert sentence == "configuration: per_method.lora: training.epochs is 0, but must be at least 1"


@pytest.mark.parametrize("overrides", [{}, {"training.learning_rate": 0.3}, {"model": "x"}, {"tuner.gamma.text": 0.4}])
def test_resolved_of_a_suite_loads_to_the_same_configuration(suite, overrides):
    suite |= {"validation": 0.2, "tuner": {"gamma": {"vision": 0.1, "default": 1}}}
    config = load_config({"suite": "toy", "method": "keeplora", "validation": None}, overrides)
    assert config.validation is None
    assert "tasks" not in config.resolved()
    again = load_config(parse_yaml(dump_yaml(config.resolved()), "resolved")[0])
    assert isinstance(again, ExperimentConfig)
    assert again == config
