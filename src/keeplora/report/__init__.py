"""The run's report: a self-contained page, tables for the terminal, and pictures for a README."""

from keeplora.report.html import render_report
from keeplora.report.runs import find_comparable, load_results

__all__ = ["find_comparable", "load_results", "render_report"]
