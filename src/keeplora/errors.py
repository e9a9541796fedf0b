"""Errors that a person can act on, and the "did you mean" that goes with them."""

from __future__ import annotations

import difflib
import errno
import os
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


class TrainingError(KeepLoraError, FloatingPointError):
    """A loss or gradient that is NaN or infinite; no weight has taken it in."""


class RankError(KeepLoraError):
    """Another process of the same run failed or is gone; the sentence names its rank and the cause."""


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your quota of disk space is used up; free some space",
    errno.EFBIG: "it is larger than the system lets one file be",
    errno.EROFS: "it lies on a read-only file system",
    errno.EIO: "the disk or network drive failed (input/output error)",
}


def reason(error: OSError) -> str:
    """Why the system refused, in words that say what to do.

    >>> reason(OSError(errno.ENOSPC, "No space left on device"))
    'the disk is full; free some space'
    """
    return _ADVICE.get(error.errno or 0, error.strerror or str(error))


def file_error(error: OSError) -> str:
    """What the system said of a file, in one sentence that names it.

    >>> file_error(OSError(errno.ENOSPC, "No space left on device", "runs/a/status.json"))
    'runs/a/status.json: the disk is full; free some space, then do the same again (a run goes on with `keeplora resume`)'
    >>> file_error(OSError(errno.EROFS, "Read-only file system", "runs/a/report.html"))
    'runs/a/report.html: it lies on a read-only file system'
    """
    told = reason(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        told += ", then do the same again (a run goes on with `keeplora resume`)"
    return f"{os.fsdecode(error.filename)}: {told}"


HANDFUL = 5


def did_you_mean(name: str, choices: Iterable[str], page: str = "") -> str:
    """Return a hint such as ``"; did you mean 'lora'? (one of: keeplora, lora)"``.

    Where there is a ``page`` of the documentation that has all choices, at most `HANDFUL` are told, the nearest first.

    >>> did_you_mean("lorra", ["lora", "zero-shot"])
    "; did you mean 'lora'? (one of: lora, zero-shot)"
    >>> did_you_mean("epoch", ["seed", "epochs", "tasks", "steps", "name", "output", "device"], "docs/formats.md")
    "; did you mean 'epochs'? (or steps, device, seed, name; docs/formats.md has all)"
    """
    known = sorted(map(str, choices))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if not page or len(known) <= HANDFUL:
        return f"{hint} (one of: {', '.join(known)})"
    others = difflib.get_close_matches(str(name), [one for one in known if one not in near], HANDFUL - len(near), 0.0)
    return f"{hint} ({'or' if near else 'there are'} {', '.join(others)}; {page} has all)"
