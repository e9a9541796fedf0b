"""The file of a picture: which endings there are, and the same bytes for the same figure."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
_UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def check_plot_name(path: str | os.PathLike[str]) -> Path:
    """The path, if it ends as a picture does; `KeepLoraError` otherwise."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise KeepLoraError(
            f"{target}: a plot is written as .png, .svg or .pdf, not as {target.suffix or 'a bare name'!r}"
        )
    return target


def write_figure(figure: Figure, target: Path, *, dpi: int, **how: Any) -> Path:
    """Write a figure whole or not at all; ``target`` has passed `check_plot_name`, ``how`` is ``savefig``'s."""
    kind = target.suffix.lower()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind[1:], dpi=dpi, metadata=_UNDATED.get(kind, {}), **how)
    return atomic_write_bytes(target, buffer.getvalue())
