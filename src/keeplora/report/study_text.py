"""A study's tables for other programs and papers: CSV, LaTeX (booktabs), Markdown, and the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from keeplora.report import study_tables
from keeplora.report.study_data import Study
from keeplora.report.tables import Cell, Table

if TYPE_CHECKING:
    from rich.console import RenderableType

_COST = (
    "seconds", "statistics_seconds", "training_seconds", "evaluation_seconds", "peak_memory_bytes", "state_bytes",
    "trained_parameters",
)  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$",
    "−": r"$-$", "–": "--", "—": "---", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "★": r"$\star$",
    "[": "{[}", "]": "{]}", "’": "'", "‘": "`", "…": r"\ldots{}", "\u00a0": "~", '"': "''", "²": r"$^2$", "≥": r"$\geq$",
    "≤": r"$\leq$", "→": r"$\rightarrow$",
    **dict(zip("αβγδεζηθικλμνξπρστυφψω", (f"$\\{name}$" for name in (
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
        "pi", "rho", "sigma", "tau", "upsilon", "phi", "psi", "omega",
    )), strict=True)),
}  # fmt: skip


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return out.getvalue()


def table_csv(study: Study) -> str:
    """One row per cell with every metric and cost; numbers in full, nothing where there is none."""
    head = [
        "method",
        "title",
        "order",
        "seed",
        "state",
        "tasks_done",
        *(key for key, *_ in study.kind.metrics),
        "probe_before",
        *_COST,
    ]
    rows = []
    for cell in study.cells:
        metrics, cost = cell.metrics, cell.run.cost if cell.finished and cell.run else {}
        values = [metrics.get(key) for key in (*(key for key, *_ in study.kind.metrics), "probe_before")]
        done = cell.run.done if cell.run else 0
        place = [cell.method, study.title(cell.method), cell.order, cell.seed, cell.state, done]
        rows.append([*place, *values, *(cost.get(key) for key in _COST), cell.error, str(cell.path)])
    return _csv([*head, "error", "path"], rows)


def summary_csv(study: Study) -> str:
    """One row per method, order ("all" for the pooled ones) and metric; differences and tests beside the means."""
    head = [
        "method", "title", "order", "metric", "n_seeds", "mean", "low", "high", "sd", "against", "pairs", "difference",
        "difference_low", "difference_high", "t_p", "t_p_holm", "wilcoxon_pairs", "wilcoxon_p", "wilcoxon_p_holm",
    ]  # fmt: skip
    rows = []
    for scope in (None, *(order.label for order in study.orders)):
        for method in study.methods:
            for key, *_ in study.kind.metrics:
                found = study.estimates.get((method.name, scope, key))
                one = study.differences.get((method.name, scope, key))
                values: list[Any] = [None] * 5
                if found is not None:
                    values = [found["n"], found["mean"], found["low"], found["high"], found["sd"]]
                tests: list[Any] = [None] * 10
                if one is not None:
                    ends = (one.interval["mean"], one.interval["low"], one.interval["high"])
                    tests = [
                        study.against,
                        one.pairs,
                        *ends,
                        one.t_p,
                        one.t_p_holm,
                        one.wilcoxon_n,
                        one.wilcoxon_p,
                        one.wilcoxon_p_holm,
                    ]
                rows.append([method.name, method.title, scope or "all", key, *values, *tests])
    return _csv(head, rows)


def latex(text: str) -> str:
    """Text as LaTeX shows it; Greek letters and signs become mathematics, letters without a name a question mark.

    >>> latex("KeepLoRA (γ = 1) & 50 %"), latex("a_b ± −3")
    ('KeepLoRA ($\\\\gamma$ = 1) \\\\& 50 \\\\%', 'a\\\\_b $\\\\pm$ $-$3')
    """
    return "".join(_LATEX.get(c, c if ord(c) < 0x250 and c.isprintable() else "?") for c in text)


def _plain(cell: Cell | str) -> tuple[str, bool]:
    return (cell, False) if isinstance(cell, str) else (cell.text, cell.best or "sure" in cell.cls)


def _latex_table(table: Table, label: str) -> str:
    head = " & ".join(map(latex, table.head)) + r" \\"
    lines = [
        r"\begin{table}[t]", r"\centering", rf"\caption{{{latex(table.caption)}}}", rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule", head, r"\midrule",
    ]  # fmt: skip
    for row in table.rows:
        cells = [rf"\textbf{{{latex(text)}}}" if strong else latex(text) for text, strong in map(_plain, row)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _all_tables(study: Study) -> list[tuple[str, Table]]:
    """Every table with a label; the best mean is bold here, where the page has a star."""
    found: list[tuple[str, Table]] = []
    for i, scope in enumerate(study.scopes):
        means = study_tables.methods_table(study, scope)
        found.append((f"methods-{i}", replace(means, caption=means.caption.replace("★ best", "bold: best"))))
        differences = study_tables.differences_table(study, scope)
        if differences is not None:
            found.append((f"differences-{i}", differences))
    return [*found, ("cost", study_tables.cost_table(study))]


def _missing_note(study: Study) -> str:
    if not study.missing:
        return ""
    return f"{len(study.cells) - len(study.missing)} of {len(study.cells)} cells are finished. Missing:"


def table_tex(study: Study) -> str:
    r"""Every table for ``\input``; needs the package booktabs."""
    lines = ["% Made by keeplora compare. Needs \\usepackage{booktabs}. Bold: best mean, or Holm's p < 0.05."]
    if study.missing:
        lines += [
            f"% {line}".replace("\n", " ") for line in (_missing_note(study), *study_tables.missing_lines(study, 200))
        ]
    return "\n".join(lines) + "\n" + "\n\n".join(_latex_table(t, label) for label, t in _all_tables(study)) + "\n"


def _markdown_cell(cell: Cell | str) -> str:
    text, strong = _plain(cell)
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("*", "\\*")
    return f"**{text}**" if strong else text


def _markdown_table(table: Table) -> str:
    lines = [table.caption + ":", "", "| " + " | ".join(map(_markdown_cell, table.head)) + " |"]
    lines.append("| --- |" + " ---: |" * (len(table.head) - 1))
    return "\n".join([*lines, *("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in table.rows)])


def table_md(study: Study) -> str:
    """Every table as Markdown, then notes and missing cells."""
    parts = [f"# {study.name}", *(_markdown_table(table) for _, table in _all_tables(study))]
    if study.notes:
        parts.append("\n".join(f"- {note}" for note in study.notes))
    if study.missing:
        lines = "\n".join(f"- {line}" for line in study_tables.missing_lines(study, 200))
        parts.append(f"{_missing_note(study)}\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def terminal(study: Study) -> list[RenderableType]:
    """What a call of `keeplora compare` ends with: tables, what is missing, notes."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown: list[Any] = []
    for name, table in _all_tables(study):
        if not name.endswith("-0"):
            continue  # orders by themselves and cost are in the files
        rich = RichTable(
            title=table.caption,
            title_justify="left",
            title_style="",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, head in enumerate(table.head):
            rich.add_column(Text(head), justify="left" if i == 0 else "right", no_wrap=i > 0)
        for row in table.rows:
            cells = list(map(_plain, row))
            rich.add_row(*(Text(text, style="bold" if strong else "") for text, strong in cells))
        shown.append(rich)
    shown += [Text(note) for note in study.notes]
    if study.missing:
        shown += [Text(_missing_note(study)), *(Text(f"  {line}") for line in study_tables.missing_lines(study))]
    return shown
