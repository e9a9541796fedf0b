"""Scores of generated answers, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from keeplora.errors import ConfigError, KeepLoraError, did_you_mean
from keeplora.evaluation.scorers.base import References, Scored, Scorer

if TYPE_CHECKING:
    from keeplora.evaluation.judges import Judge

#: name -> (module of this package, function in it); a module is imported when one of its scorers is first asked for.
SCORERS: dict[str, tuple[str, str]] = {
    "exact": ("short", "exact"),
    "exact-ignoring-case": ("short", "exact_ignoring_case"),
    "contains": ("short", "contains"),
    "contains-lower": ("short", "contains_lower"),
    "exact-stripped": ("short", "exact_stripped"),
    "vqa": ("short", "vqa"),
    "multiple-choice-sci": ("science", "multiple_choice_sci"),
    "mapqa": ("science", "mapqa"),
    "caption": ("captions", "caption"),
    "rouge-l": ("captions", "rouge_l"),
    "cider": ("captions", "cider"),
    "option": ("choice", "option"),
    "judge": ("judge", "judge"),
}
#: Those that take a judge.
JUDGED = frozenset({"judge"})


def scorer_names() -> list[str]:
    """The names that `score` takes, sorted.

    >>> "exact" in scorer_names()
    True
    """
    return sorted(SCORERS)


def scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ConfigError: where there is none of that name, with the nearest one.
    """
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}{did_you_mean(name, SCORERS)}")
    module, function = SCORERS[name]
    return getattr(import_module(f"{__name__}.{module}"), function)


def score(
    name: str,
    predictions: Sequence[str],
    references: References,
    questions: Sequence[str],
    *,
    judge: Judge | None = None,
) -> Scored:
    """Score answers.

    Args:
        name: one of `scorer_names`.
        predictions: what the model answered, one per item.
        references: the accepted answers of each item, at least one; an item earns what its best reference gives it,
            except where the scorer says otherwise (votes of "vqa", CIDEr's mean over references).
        questions: one per item; the rules of some sets depend on it.
        judge: who rates answers for the scores in `JUDGED`; None: word overlap. Other scores need none.

    Returns:
        A `Scored`. For no items at all the value is None.

    Raises:
        ConfigError: for an unknown name. KeepLoraError: for lists of different lengths, or an item without references.

    >>> score("exact", ["A cat.", "dog"], [["a cat"], ["wolf", "fox"]], ["", ""])
    Scored(value=50.0, per_sample=[1.0, 0.0], components={}, missing=None)
    """
    function: Callable[..., Scored] = scorer(name)
    if not len(predictions) == len(references) == len(questions):
        raise KeepLoraError(
            f"{name}: {len(predictions)} predictions, {len(references)} lists of references and {len(questions)} "
            "questions; each item needs one of each"
        )
    for i, accepted in enumerate(references):
        if isinstance(accepted, str) or not accepted:
            raise KeepLoraError(f"{name}: item {i} needs a list of at least one reference, not {accepted!r}")
    if not predictions:
        return Scored(None, [], missing=f"{name}: there are no answers to score")
    if judge is not None and name in JUDGED:
        function = partial(function, judge=judge)
    return function(predictions, references, questions)


__all__ = ["JUDGED", "SCORERS", "References", "Scored", "Scorer", "score", "scorer", "scorer_names"]
