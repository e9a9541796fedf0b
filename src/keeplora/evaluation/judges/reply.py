"""The rating in a judge's words: a whole number from 0 to 5, or none."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from keeplora.evaluation.judges.base import HIGHEST

#: A judge answers in a line. Of a text longer than this nothing is read.
LONGEST = 20_000
_NUMBER = r"[+-]?[0-9]+(?:[.,][0-9]+)*"
# Not part of a longer number, and not the start of "0-5", "0 to 5", "5%", "4th", a sum, or a fraction of anything but five.
_END = (
    r"(?![.,]?[0-9])(?:\s*(?:/|out\s+of)\s*(?P<of>[0-9]+(?:\.[0-9]+)?))?(?![.,]?\w)(?!\s*(?:%|/|to\b|[-–—+*×]\s*[0-9]))"
)
_MARKED = re.compile(
    rf"\b(?:score|rating)\b[\s\"'*_`]*(?:[:=]|\bis\b|\bof\b)[\s\"'*_`]*(?:a\s+)?(?P<number>{_NUMBER})[\"'*_`]*{_END}",
    re.IGNORECASE,
)
_BARE = re.compile(rf"[\s\"'*_`(\[]*(?P<number>{_NUMBER})[\"'*_`]*{_END}[\s\"'*_`.!)\]]*", re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*\s*(.*?)```", re.DOTALL)
_BRACES = re.compile(r"\{[^{}]*\}")


def parse_score(text: str) -> int | None:
    """The rating that ``text`` gives, or None where it gives none, or several that differ.

    Read are, in this order: JSON objects and Python dictionaries with a key "score" (whatever else they hold, in code
    fences or not), numbers that are marked as score or rating, and a text that is nothing but a number. What a model
    writes while it thinks (``<think>``) does not count. 4.0 is 4; 3.5, -1 and 7 are no ratings; nor is 4/10.

    >>> [parse_score(said) for said in ('{"score": 4}', "Score: 4/5", "4", "```json\\n{'pred': 'yes', 'score': 4}\\n```")]
    [4, 4, 4, 4]
    >>> [parse_score(said) for said in ("7", "3.5", "The two dogs are 3.", "score: 0-5", "")]
    [None, None, None, None, None]
    """
    text = text.rsplit("</think>", 1)[-1].strip()
    if not text or text.startswith("<think>") or len(text) > LONGEST:
        return None
    found = list(_told(text))
    if not found:
        found = [_of_match(match) for match in _MARKED.finditer(text)]
    if not found and (bare := _BARE.fullmatch(_FENCE.sub(r"\1", text))):
        found = [_of_match(bare)]
    return found[0] if found and all(rating == found[0] for rating in found) else None


def _told(text: str) -> Iterator[int | None]:
    """The ratings of every object with a key "score": the whole text, else the objects in it."""
    wholes = [text, *(match[1] for match in _FENCE.finditer(text))]
    read = [pairs for whole in wholes if (pairs := _pairs(whole.strip())) is not None]
    if not read:
        read = [pairs for match in _BRACES.finditer(text) if (pairs := _pairs(match[0])) is not None]
    for pairs in read:
        yield from (_rating(value) for key, value in pairs if isinstance(key, str) and key.strip().lower() == "score")


def _pairs(text: str) -> list[tuple[Any, Any]] | None:
    """Keys and values of a JSON object or a Python dictionary, repeated keys and all; None for anything else."""
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return _literal_pairs(text)
    return found if isinstance(found, list) else None


def _literal_pairs(text: str) -> list[tuple[Any, Any]] | None:
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Dict):
            return None
        return [(ast.literal_eval(k), ast.literal_eval(v)) for k, v in zip(node.keys, node.values, strict=True) if k]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _rating(value: Any) -> int | None:
    """A value as a rating: the number, or a text that holds it alone."""
    if isinstance(value, str):
        match = _BARE.fullmatch(value)
        return _of_match(match) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value in range(HIGHEST + 1) else None


def _of_match(match: re.Match[str]) -> int | None:
    if match["of"] is not None and float(match["of"]) != HIGHEST:
        return None
    try:
        return _rating(float(match["number"]))
    except ValueError:  # 1,5 or 1.2.3
        return None
