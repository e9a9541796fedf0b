"""Judges: who says how well an answer agrees with the accepted ones, from 0 to 5.

A new judge is one class with the interface of `Judge`, and one line in `JUDGES`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from keeplora.errors import ConfigError, did_you_mean
from keeplora.evaluation.judges.base import HIGHEST, Heard, Judge, JudgeError, Question, Verdict
from keeplora.evaluation.judges.cache import CachedJudge, JudgementCache, judgement_key

#: kind -> (module of this package, class in it); a module is imported when a judge of its kind is made.
JUDGES: dict[str, tuple[str, str]] = {
    "overlap": ("words", "OverlapJudge"),
    "exact": ("words", "ExactJudge"),
    "local": ("local", "LocalJudge"),
    "openai": ("endpoint", "EndpointJudge"),
}


def judge_kinds() -> list[str]:
    """The kinds that `make_judge` takes, sorted.

    >>> judge_kinds()
    ['exact', 'local', 'openai', 'overlap']
    """
    return sorted(JUDGES)


def judge_class(kind: str) -> type:
    """The class of a kind of judge; its arguments are the settings of that kind.

    Raises:
        ConfigError: where there is no such kind, with the nearest one.
    """
    if kind not in JUDGES:
        raise ConfigError(f"there is no judge {kind!r}{did_you_mean(kind, JUDGES)}")
    module, name = JUDGES[kind]
    return getattr(import_module(f"{__name__}.{module}"), name)


def judge_keys(kind: str) -> list[str]:
    """The settings of a kind of judge, without ``kind``.

    >>> judge_keys("overlap"), "base_url" in judge_keys("openai")
    ([], True)
    """
    return [name for name in inspect.signature(judge_class(kind)).parameters if name not in ("args", "kwargs")]


def make_judge(
    settings: Mapping[str, Any] | None = None, cache: JudgementCache | str | os.PathLike[str] | None = None
) -> Judge:
    """The judge that ``settings`` describe.

    Args:
        settings: ``kind`` (default "overlap") and that kind's own keys; a key whose value is None counts as absent.
        cache: where judgements are kept; None: nowhere.

    Raises:
        ConfigError: an unknown kind or key, a lacking one, or a value that the judge refuses.

    >>> make_judge().judge([Question("How many?", ("two",), "2")])
    [Verdict(score=5, text='')]
    """
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    kind = given.pop("kind", "overlap")
    made, known = judge_class(kind), judge_keys(kind)
    for key in given:
        if key not in known:
            raise ConfigError(
                f"judge.{key} is no setting of the judge {kind!r}{did_you_mean(key, known) if known else ''}"
            )
    parameters = inspect.signature(made).parameters
    for key in known:
        if parameters[key].default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"the judge {kind!r} needs judge.{key}")
    judge: Judge = made(**given)
    if cache is None:
        return judge
    return CachedJudge(judge, cache if isinstance(cache, JudgementCache) else JudgementCache(cache))


__all__ = [
    "HIGHEST", "JUDGES", "CachedJudge", "Heard", "Judge", "JudgeError", "JudgementCache", "Question", "Verdict",
    "judge_class", "judge_keys", "judge_kinds", "judgement_key", "make_judge",
]  # fmt: skip
