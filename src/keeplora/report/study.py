"""Everything that a study leaves behind for reading: page, tables, plots."""

from __future__ import annotations

from pathlib import Path

from keeplora.files import atomic_write_text
from keeplora.report.study_data import Study
from keeplora.report.study_html import render_page
from keeplora.report.study_plots import plot_study
from keeplora.report.study_text import summary_csv, table_csv, table_md, table_tex


def render_study(study: Study, folder: Path) -> Path:
    """Write report.html, table.csv, summary.csv, table.tex, table.md and plots/*.png into ``folder``; returns the page.

    Works for any part of a study, down to one without a finished cell. Each file is replaced atomically.
    """
    atomic_write_text(folder / "table.csv", table_csv(study))
    atomic_write_text(folder / "summary.csv", summary_csv(study))
    atomic_write_text(folder / "table.tex", table_tex(study))
    atomic_write_text(folder / "table.md", table_md(study))
    plot_study(study, folder / "plots")
    return render_page(study, folder / "report.html")
