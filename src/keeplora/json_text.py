"""JSON from files that anyone may have written: what Python would read and no JSON holds is an error like any other.

``json.loads`` itself takes NaN, lets the second of two equal keys win, fails with `RecursionError` on deep nesting, and
returns halves of characters that can be neither printed nor written.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.files import read_regular

MAX_BYTES = 1 << 28
"""The largest file that is read as JSON where the caller knows no better."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {twice!r} twice")
    return value


def parse_json(text: str) -> Any:
    """`json.loads` that raises ValueError and nothing else, also for NaN, a repeated key, half of a character.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: it has the key 'a' twice
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python refuses to read thousands of digits, and names a function of its own
        raise ValueError("a number in it has too many digits" if "digits" in str(error) else str(error)) from None
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half of a character (a lone surrogate)") from None
    return value


def read_json(path: str | os.PathLike[str], most: int = MAX_BYTES) -> Any:
    """`parse_json` of an ordinary UTF-8 file of at most ``most`` bytes; OSError where it cannot be read."""
    return parse_json(read_regular(path, most).decode("utf-8"))


def read_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any] | None:
    """The object in a JSON file that keeplora wrote; None where there is no file.

    Args:
        remedy: what to do where it is damaged, the end of the sentence.

    Raises:
        KeepLoraError: it cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeepLoraError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise KeepLoraError(f"{path} is damaged: it is not readable JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise KeepLoraError(
            f"{path} is damaged: it holds a {type(value).__name__} where an object is expected; {remedy}"
        )
    return value
