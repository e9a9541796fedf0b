"""The kinds of values that a configuration's keys may hold, and one value or one per tower or task."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from keeplora.errors import ConfigError, did_you_mean

T = TypeVar("T")

#: In a mapping over towers or tasks, the value of every tower or task that is not named.
DEFAULT_KEY = "default"


def _not_empty(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if not value:
        raise ValueError("must hold at least one entry")
    return value


def _one_or_each(value: Any) -> str:
    return "each" if isinstance(value, Mapping) else "one"


_NotEmpty = AfterValidator(_not_empty)


def _samples(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a whole number of samples, or a share between 0 and 1")
    if isinstance(value, int) and value < 1:
        raise ValueError("must be at least 1 sample (or a share between 0 and 1, or null for all)")
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError("must be a share between 0 and 1 (both excluded), or a whole number of samples")
    return value


def _layer_schedule(value: Any) -> Any:
    if isinstance(value, str) and value in ("linear", "constant"):
        return value
    if isinstance(value, str):
        raise ValueError(f"must be linear, constant or a list of numbers{did_you_mean(value, ['linear', 'constant'])}")
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or not value or not all(math.isfinite(v) and v >= 0 for v in value):
        raise ValueError("must be linear, constant or a list of finite numbers >= 0, one per block, shallowest first")
    return value


_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]+(?:[.][0-9]+)?)\s*([a-z]*)\s*", value.lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError("must be a number of bytes, or text such as 200MiB, 1.5GiB or 300MB")
        value = int(float(found[1]) * _UNITS[found[2]])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("must be a number of bytes of at least 1, or text such as 200MiB, 1.5GiB or 300MB")
    return value


def _modules(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise ValueError("must be a list of module names, one pattern as text, or null")


def _validation(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError("must be a share of the training data between 0 and 1 (both excluded), or a path")
    return value


# A task's name becomes part of file names on every system, and a key on the command line.
_SAFE_NAME = re.compile(r"\w(?:[\w .+-]{0,62}[\w+-])?")
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def _data_spec(spec: dict[str, Any]) -> dict[str, Any]:
    for key in ("name", "source"):
        if key not in spec:
            near = did_you_mean(key, [str(k) for k in spec]) if spec else ""
            raise ValueError(f"has no `{key}:`{near.split(' (')[0] if 'mean' in near else ''}")
        if not isinstance(spec[key], str) or not spec[key]:
            raise ValueError(f"has `{key}: {spec[key]!r}`, which must be a word")
    name = spec["name"]
    if not _SAFE_NAME.fullmatch(name) or name.casefold().split(".")[0] in _DEVICE_NAMES:
        raise ValueError(
            f"has the name {name!r}, which is not safe as a file name; use at most 64 letters, digits, spaces or "
            "any of '-', '_', '.', '+', beginning with a letter or digit"
        )
    if name == DEFAULT_KEY:
        raise ValueError(f"is called {name!r}, a word that stands for all other tasks; choose another name")
    return spec


Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[Any, BeforeValidator(_bytes)]
Samples = Annotated[Any, BeforeValidator(_samples)]
_LayerSchedule = Annotated[Any, BeforeValidator(_layer_schedule)]
_Validation = Annotated[Any, BeforeValidator(_validation)]
Modules = Annotated[Any, BeforeValidator(_modules)]
DataSpec = Annotated[dict[str, Any], AfterValidator(_data_spec)]
_Each = Discriminator(_one_or_each)
CountPer = Annotated[Annotated[Count, Tag("one")] | Annotated[dict[str, Count], _NotEmpty, Tag("each")], _Each]
SharePer = Annotated[Annotated[_Share, Tag("one")] | Annotated[dict[str, _Share], _NotEmpty, Tag("each")], _Each]
PositivePer = Annotated[Annotated[Positive, Tag("one")] | Annotated[dict[str, Positive], _NotEmpty, Tag("each")], _Each]
SchedulePer = Annotated[
    Annotated[_LayerSchedule, Tag("one")] | Annotated[dict[str, _LayerSchedule], _NotEmpty, Tag("each")], _Each
]
ValidationPer = Annotated[
    Annotated[_Validation, Tag("one")] | Annotated[dict[str, _Validation], _NotEmpty, Tag("each")], _Each
]


def pick(value: T | Mapping[str, T], *names: str, key: str) -> T:
    """The entry of ``value`` for the first of ``names`` in it, else its ``default``; a plain value is everyone's.

    >>> pick({"vision": 0.2, "default": 1.0}, "text_model", "text", key="tuner.gamma")
    1.0
    """
    if not isinstance(value, Mapping):
        return value
    for name in (*names, DEFAULT_KEY):
        if name in value:
            return value[name]
    raise ConfigError(f"{key} gives no value for {names[0]!r}; add `{names[-1]}:` or `{DEFAULT_KEY}:` to it")
