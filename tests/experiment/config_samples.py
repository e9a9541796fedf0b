"""A small valid configuration, and a loader that expects a refusal."""

from __future__ import annotations

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment.config import load_config

METHODS = ["zero-shot", "lora", "keeplora", "keeplora++"]


def base(**changes):
    tasks = [{"name": "pets", "source": "folder", "path": "pets"}, {"name": "signs", "source": "pack"}]
    return {"tasks": tasks, "model": "embedded", "method": "lora", **changes}


def refuse(values, overrides=None, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(values, overrides, known_methods=METHODS, **keywords)
    return str(caught.value)
