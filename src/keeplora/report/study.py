"""Everything that a study leaves behind for reading: page, tables, plots."""

from __future__ import annotations

from pathlib import Path

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_write_text
from keeplora.report.study_data import Study
from keeplora.report.study_html import render_page
from keeplora.report.study_plots import plot_study
from keeplora.report.study_text import summary_csv, table_csv, table_md, table_tex


def render_study(study: Study, folder: Path) -> Path:
    """Write report.html, table.csv, summary.csv, table.tex, table.md and plots/*.png into ``folder``; returns the page.

    Works for any part of a study, down to one without a finished cell. Each file is replaced atomically, the plots last.

    Raises `KeepLoraError` where a plot cannot be drawn; all else is written then.
    """
    atomic_write_text(folder / "table.csv", table_csv(study))
    atomic_write_text(folder / "summary.csv", summary_csv(study))
    atomic_write_text(folder / "table.tex", table_tex(study))
    atomic_write_text(folder / "table.md", table_md(study))
    page = render_page(study, folder / "report.html")
    try:
        plot_study(study, folder / "plots")
    except (KeepLoraError, OSError):
        raise
    except Exception as error:  # a fault of the drawing must not look like one of the study
        raise KeepLoraError(
            f"{folder}: tables and page are written, but plots/*.png could not be made ({type(error).__name__}: {error})"
        ) from error
    return page
