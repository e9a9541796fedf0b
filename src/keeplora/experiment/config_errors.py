"""pydantic's errors as sentences: where (file, line, key), what is wrong, how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from keeplora.errors import ConfigError, did_you_mean
from keeplora.experiment.config_judge import JudgeConfig
from keeplora.experiment.config_schema import (
    AcceptConfig,
    EarlyStoppingConfig,
    ExperimentConfig,
    ModelConfig,
    TrainingConfig,
    TunerConfig,
)
from keeplora.experiment.config_video import VideoConfig
from keeplora.yaml_text import KeyPath

SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "tuner": TunerConfig,
    "training": TrainingConfig,
    "early_stopping": EarlyStoppingConfig,
    "accept": AcceptConfig,
    "video": VideoConfig,
    "judge": JudgeConfig,
}
#: Keys of a configuration file that are used up while loading.
FILE_ONLY_KEYS = ("per_method",)
#: Keys that keeplora itself writes into config.yaml; nobody has to set them, so no hint names them.
WRITTEN_KEYS = ("auto", "base_dir", "order_name")
PAGE = "docs/formats.md"

_MUST_BE = {
    "string_type": "must be a word or text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (`key: value` lines)",
    "model_type": "must be a mapping (`key: value` lines)",
    "model_attributes_type": "must be a mapping (`key: value` lines)",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
}


class Problem(NamedTuple):
    """One thing that is wrong: the key path it belongs to, and a sentence that names key and value."""

    path: KeyPath
    sentence: str


def key_text(path: KeyPath) -> str:
    """``("tasks", 0, "name")`` as ``tasks.0.name``."""
    return ".".join(map(str, path))


def _short(value: Any) -> str:
    text = "empty (null)" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def unknown_key(path: KeyPath, value: Any = None) -> Problem:
    """The sentence for a key that nothing reads: a near miss, or a key of another section."""
    *parents, key = path
    parent = str(parents[0]) if parents else ""
    model = SECTIONS.get(parent, ExperimentConfig) if len(parents) == 1 else ExperimentConfig
    choices = [*(k for k in model.model_fields if k not in WRITTEN_KEYS), *(FILE_ONLY_KEYS if not parents else ())]
    where = f"in {key_text(tuple(parents))}" if parents else "at the top level"
    homes = [section for section, fields in SECTIONS.items() if section != parent and key in fields.model_fields]
    if parents and key in ExperimentConfig.model_fields:
        hint = "; it belongs at the top level, not indented"
    elif homes:
        hint = f"; it belongs under `{homes[0]}:`"
    else:
        hint = did_you_mean(str(key), choices, PAGE)
    return Problem(path, f"unknown key {str(key)!r} {where}{hint}")


def _sentence(path: KeyPath, error: ErrorDetails) -> str:
    kind, key, value, context = error["type"], key_text(path), error["input"], error.get("ctx", {})
    shown = f"{key} is {_short(value)}, but"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "literal_error":
        choices = [part.strip(" '") for part in str(context["expected"]).replace(" or ", ", ").split(",")]
        return (
            f"{shown} must be one of {', '.join(choices)}{did_you_mean(str(value), choices).split(' (')[0].rstrip(';')}"
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{shown} must be {words.format(f'{context[name]:g}')}"
    if kind in _MUST_BE:
        return f"{shown} {_MUST_BE[kind]}"
    if kind == "value_error":
        message = str(context["error"])
        return f"{shown} {message}" if message.startswith("must") else f"{key} {message}"
    return f"{shown} {error['msg'][:1].lower()}{error['msg'][1:]}"


def problems_of(error: ValidationError, prefix: KeyPath = ()) -> list[Problem]:
    """One `Problem` for each of pydantic's errors."""
    problems = []
    for detail in error.errors(include_url=False):
        # "one" and "each" are the branches of a value-or-mapping field, "[key]" marks a mapping's key.
        path = (*prefix, *(part for part in detail["loc"] if part not in ("one", "each", "[key]")))
        if detail["type"] == "extra_forbidden":
            problems.append(unknown_key(path))
        elif detail["type"] == "problems":  # ExperimentConfig's own checks
            for key, sentence in detail.get("ctx", {})["problems"]:
                parts = tuple(int(part) if part.isdigit() else part for part in key.split("."))
                problems.append(Problem(parts, f"{key} {sentence}"))
        else:
            problems.append(Problem(path, _sentence(path, detail)))
    return problems


def raise_problems(problems: Sequence[Problem], where: Callable[[KeyPath], str]) -> None:
    """Raise one ConfigError that lists every problem; nothing happens where there is none."""
    if not problems:
        return
    lines = list(dict.fromkeys(f"{where(problem.path)}: {problem.sentence}" for problem in problems))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError(f"{len(lines)} problems in the configuration:\n" + "\n".join(f"  - {line}" for line in lines))


def has_path(value: Any, path: KeyPath) -> bool:
    """Whether a nested value holds this key path."""
    for part in path:
        here: Any = value
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not in_list and not (isinstance(value, Mapping) and part in value):
            return False
        value = here[part]
    return True
