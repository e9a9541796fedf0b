"""A method's own settings: a frozen dataclass per method, filled from `KeepLoraConfig.options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from keeplora.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class NoOptions:
    """The settings of a method that has none."""


def option(default: Any, help: str) -> Any:
    """A field of an options class."""
    return field(default=default, metadata={"help": help})


def make_options(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """An instance of the options class ``kind``.

    Raises:
        ConfigError: an unknown name, or a value of another type than the default's.
    """
    known = {f.name: f.default for f in fields(kind)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            if not known:
                raise ConfigError(f"tuner.options.{name}: this method has no options of its own; remove it")
            raise ConfigError(f"tuner.options: unknown option {name!r}{did_you_mean(str(name), known)}")
        default = known[name]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise ConfigError(f"tuner.options.{name} is {value!r}, but must be of the kind of its default {default!r}")
        given[name] = value
    return kind(**given)
