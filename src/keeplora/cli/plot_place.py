"""Where a command's ``--plot`` goes, looked at before the work is done."""

from __future__ import annotations

import os
from pathlib import Path

from keeplora.errors import KeepLoraError


def check_plot(path: Path) -> None:
    """`KeepLoraError` unless a picture can be written there: its ending, and its folder."""
    from keeplora.report.plot_file import check_plot_name

    folder = check_plot_name(path).parent
    if not folder.is_dir():
        raise KeepLoraError(f"--plot {path}: there is no folder {folder}; make it first, or name another place")
    if path.is_dir():
        raise KeepLoraError(f"--plot {path} is a folder; name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise KeepLoraError(f"--plot {path} cannot be written; name a place where you may write")
