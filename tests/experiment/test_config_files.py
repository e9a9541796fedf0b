"""Configuration files: bad YAML is placed, scalars mean what people mean, and what is written is read back."""

from __future__ import annotations

import re

import pytest
from config_samples import METHODS, base, refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keeplora.errors import ConfigError
from keeplora.experiment.config import load_config, parse_overrides
from keeplora.yaml_text import dump_yaml, parse_yaml, read_yaml

GOOD = "tasks:\n  - {name: pets, source: folder}\nmodel: embedded\nmethod: lora\n"


def test_a_file_is_named_with_the_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "training:\n  # fast\n  learning_rate: -1e-3\n  epoch: 2\n")
    sentence = refuse(path)
    assert f"{path}, line 7: training.learning_rate is -0.001, but must be greater than 0" in sentence
    assert f"{path}, line 8: unknown key 'epoch' in training" in sentence
    path.write_text(GOOD.replace("name: pets", "name: pe/ts"))
    assert refuse(path).startswith(f"{path}, line 2: tasks.0 has the name 'pe/ts'")
    path.write_text(GOOD.replace("method: lora\n", ""))
    assert refuse(path) == f"{path}: method is missing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", ", line 1, column 4: this '[' is not closed before line 2, column 2"),
        ("a: 1\nb: 2\na: 3\n", ", line 3, column 1: key 'a' is given twice (first in line 1); keep one"),
        ("t:\n  e: 1\n  e: 2\n", ", line 3, column 3: key 'e' is given twice (first in line 2)"),
        ("a:\n\tb: 1\n", ", line 2, column 1: "),
        ("a: \x01", ", line 1, column 4: a character that YAML does not allow"),
        ("a: 1\n---\nb: 2\n", ", line 2, column 1: "),
        ("a: !!python/object:os.system x\n", ", line 1, column 4: "),
        ("- 1\n", " holds a list, not a mapping"),
        ("", " is empty; it needs at least"),
        ("# nothing\n", " is empty; it needs at least"),
        ("a: &x [*x]\n", ", line 1, column 4: an anchor that contains itself"),
    ],
)
def test_bad_yaml_is_placed(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert refuse(path).startswith(f"{path}{words}")


def test_files_that_cannot_be_read(tmp_path):
    assert refuse(tmp_path / "none.yaml") == f"no such file: {tmp_path / 'none.yaml'}"
    assert "is a folder" in refuse(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8" in refuse(tmp_path / "x.yaml")


def test_a_byte_order_mark_and_anchors_are_fine(tmp_path):
    path = tmp_path / "x.yaml"
    text = "x-spec: &spec {source: folder}\n" + GOOD.replace("{name: pets, source: folder}", "{<<: *spec, name: pets}")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "unknown key 'x-spec'" in refuse(path)
    value, _ = read_yaml(path)
    assert value["tasks"] == [{"source": "folder", "name": "pets"}]


def test_scalars_mean_what_people_mean():
    value, lines = parse_yaml("a: 1e-3\nb: no\nc: 010\nd: 1.5\ne: true\nf: ~\ng: 2024-01-01\nh: -3\n", "x")
    assert value == {"a": 0.001, "b": "no", "c": "010", "d": 1.5, "e": True, "f": None, "g": "2024-01-01", "h": -3}
    assert lines[("h",)] == 8


@pytest.mark.parametrize(
    "text", ["no", "1e3", "0123", "a: b", "", " x ", "a\nb", "\x85", "a\u2028b", "\u2029", "\ufeff", "\t", "é"]
)
def test_any_text_survives_writing_and_reading(text):
    assert parse_yaml(dump_yaml({text: [text]}), "x")[0] == {text: [text]}


def test_parse_overrides():
    assert parse_overrides(["training.epochs=2", "order=[a, b]", "training.learning_rate=1e-4", "output=a=b"]) == {
        "training.epochs": 2,
        "order": ["a", "b"],
        "training.learning_rate": 1e-4,
        "output": "a=b",
    }
    for bad, words in {
        "training.epochs": "KEY=VALUE",
        "=3": "KEY=VALUE",
        "a..b=3": "KEY=VALUE",
        "order=[a": "line 1",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse_overrides([bad])
    with pytest.raises(ConfigError, match="given twice"):
        parse_overrides(["a=1", "a=2"])
    assert "unknown key 'epoch'" in refuse(base(), {"training.epoch": 2})
    assert "tasks is a list; give the whole list" in refuse(base(), {"tasks.0.name": "x"})
    assert "sets training as a whole" in refuse(base(), {"training": 3, "training.epochs": 1})


# --- round trip -------------------------------------------------------------------------------------------------

SAFE = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,7}", fullmatch=True).filter(
    lambda name: not re.fullmatch(r"default|con|prn|aux|nul|(com|lpt)[1-9]", name.casefold())
)
ANY_TEXT = st.text(max_size=12)
SHARE = st.floats(0, 1)
POSITIVE = st.floats(0, 1e6, exclude_min=True)


def per(values, keys):
    return values | st.dictionaries(keys, values, min_size=1, max_size=3).flatmap(
        lambda d: values.map(lambda v: {**d, "default": v})
    )


@st.composite
def configurations(draw):
    names = draw(st.lists(SAFE, min_size=1, max_size=4, unique_by=str.casefold))
    leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT
    extra = st.dictionaries(ANY_TEXT, leaf | st.lists(leaf, max_size=2), max_size=2)
    specs = [{**draw(extra), "name": name, "source": draw(SAFE)} for name in names]
    cut = draw(st.integers(1, len(names)))
    task_names = st.sampled_from(names[:cut])
    towers = st.sampled_from(["vision", "text", "vision_model"])
    tuner = {
        "r": per(st.integers(1, 99), towers),
        "gamma": per(SHARE, towers),
        "energy_weights": per(SHARE, towers),
        "lora_alpha": POSITIVE,
        "schedule": st.sampled_from(["linear", "constant"]) | st.lists(SHARE, min_size=1, max_size=3),
        "target_modules": st.none() | ANY_TEXT.filter(bool) | st.lists(SAFE, min_size=1, max_size=2),
        "gradient_samples": st.none() | st.integers(1, 9) | st.floats(0.01, 0.99),
    }
    training = {
        "epochs": per(st.integers(1, 9), task_names),
        "learning_rate": per(POSITIVE, task_names),
        "schedule": st.sampled_from(["onecycle", "cosine", "constant"]),
        "warmup": st.none() | st.floats(0, 0.99),
        "grad_clip": st.none() | POSITIVE,
    }
    values = {
        "model": draw(SAFE),
        "method": draw(st.sampled_from(METHODS)),
        "tasks": specs[:cut],
        "probes": specs[cut:],
    }
    values["tuner"] = draw(st.fixed_dictionaries({}, optional=tuner))
    values["training"] = draw(st.fixed_dictionaries({}, optional=training))
    optional = {
        "name": st.none() | ANY_TEXT,
        "seed": st.integers(0, 2**32 - 1),
        "preset": st.sampled_from(["default", "mtil", "mtil-order-ii", "ucit", "mllm-dcl-features"]),
        "order": st.permutations(names[:cut]),
        "validation": st.none() | st.floats(0.01, 0.99) | st.dictionaries(task_names, SAFE, min_size=1),
    }
    values |= draw(st.fixed_dictionaries({}, optional=optional))
    rate = draw(POSITIVE)
    values["per_method"] = {"lora": {"training": {"learning_rate": rate}}}
    return values


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations(), st.booleans())
def test_resolved_loads_to_the_same_configuration(values, override):
    config = load_config(values, {"tuner.r.text": 3, "training.learning_rate": 0.125} if override else None)
    resolved = config.resolved()
    assert load_config(resolved) == config
    text = dump_yaml(resolved)
    again = load_config(parse_yaml(text, "resolved")[0])
    assert again == config
    assert again.resolved() == resolved
    assert again.overridden == config.overridden
