"""The run's report: a self-contained page, an index over many runs, tables for the terminal, and pictures for a README."""

from keeplora.report.html import render_report
from keeplora.report.index_html import render_index
from keeplora.report.runs import find_comparable, load_results

__all__ = ["find_comparable", "load_results", "render_index", "render_report"]
