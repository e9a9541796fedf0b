"""Errors that a person can act on, and the "did you mean" that goes with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KeepLoraError(Exception):
    """Wrong input or state, told in one sentence: what is wrong, where, and how to mend it.

    The command line prints the sentence alone; a traceback is kept for faults of keeplora itself.
    """


class ConfigError(KeepLoraError):
    """A configuration key or value that cannot be used."""


class DataError(KeepLoraError):
    """A data source, file or sample that cannot be used; the message names it."""


class TargetError(KeepLoraError):
    """A module that was asked for as a target but cannot be adapted; the message names it."""


class LedgerError(KeepLoraError):
    """A ledger that is damaged, of another model, or of a later format."""


class HubError(KeepLoraError):
    """Something that was to be written to or read from the Hugging Face hub, and could not be."""


class CapacityError(KeepLoraError):
    """No direction is left for a new task in any target."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint such as ``"; did you mean 'lora'? (one of: keeplora, lora)"``.

    >>> did_you_mean("lorra", ["lora", "zero-shot"])
    "; did you mean 'lora'? (one of: lora, zero-shot)"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} (one of: {', '.join(known)})"
