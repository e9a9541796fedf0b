"""The console that tables are printed to."""

from __future__ import annotations

from rich.console import Console


def wide_console(width: int = 120) -> Console:
    """A terminal's own width; a pipe or a log file has none, and 80 columns would cut names short."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
