"""Published figures beside ours: docs/evidence/published.yaml as the tables of docs/published.md.

    python scripts/published.py          # what is wrong with the file, and whether the page has its tables
    python scripts/published.py write    # writes the tables into the page, between its markers

A table stands between ``<!-- published: ID -->`` and ``<!-- end -->``; the words around it are the page's own.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "evidence" / "published.yaml"
PAGE = ROOT / "docs" / "published.md"
OURS = {"values", "page", "prints", "command", "commit", "date"}
_TABLE = re.compile(r"(<!-- published: (?P<id>[\w-]+) -->\n).*?(<!-- end -->)", re.S)


def read(path: Path = FILE) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def cell(values: list[float | None], decimals: int | None) -> str:
    """The figures of one row; NF where none was found, a dash for each that is missing among others.

    >>> cell([69.4, 65.3, None], 1), cell([None, None], 1), cell([0.98, None], None)
    ('69.4 / 65.3 / –', 'NF', '0.98 / –')
    """
    if all(value is None for value in values):
        return "NF"
    shown = ("–" if v is None else f"{v:g}" if decimals is None else f"{v:.{decimals}f}" for v in values)
    return " / ".join(shown).replace("-", "−")


def command(benchmark: dict[str, Any], method: dict[str, Any]) -> str:
    """The command whose numbers would be ours for this row; empty where the method is not implemented."""
    if method["ours"] is None:
        return ""
    return " ".join(filter(None, [benchmark["command"], f"--method {method['ours']}", method.get("also")]))


def table(benchmark: dict[str, Any], methods: dict[str, Any]) -> str:
    """One benchmark's Markdown table, with a note for each method that has one."""
    measures, decimals = benchmark["measures"], benchmark.get("decimals")
    lines = [f"Published and ours: {' / '.join(measures)}.", ""]
    lines += ["| method | its paper | published | how sure | ours | what would fill ours |", "| --- " * 6 + "|"]
    notes = []
    for row in benchmark["rows"]:
        method, ours = methods[row["method"]], row.get("ours")
        measured = cell(ours["values"], decimals) if ours else ""
        fills = f"`{command(benchmark, method)}`" if method["ours"] else "not implemented here"
        published = cell(row["published"], decimals)
        lines.append(
            f"| {row['method']} | {method['paper']} | {published} | {row['mark'] or ''} | {measured} | {fills} |"
        )
        if note := method.get("note"):
            notes.append(f"{row['method']}: {note}.")
        if ours:
            notes.append(
                f"{row['method']}, ours: `{ours['command']}`, commit {ours['commit']}, {ours['date']} "
                f"([{Path(ours['page']).stem}]({Path(ours['page']).name}))."
            )
    return "\n".join([*lines, "", *([" ".join(notes), ""] if notes else [])])


def problems(data: dict[str, Any]) -> list[str]:
    """What is wrong with the file, one sentence each."""
    found = []
    for benchmark in data["benchmarks"]:
        for row in benchmark["rows"]:
            where = f"{benchmark['id']}, {row.get('method')}"
            if row.get("method") not in data["methods"]:
                found.append(f"{where}: no such method under methods")
                continue
            figures = row["published"]
            if len(figures) != len(benchmark["measures"]):
                found.append(f"{where}: {len(figures)} figures for {len(benchmark['measures'])} measures")
            if (row["mark"] is None) != all(value is None for value in figures):
                found.append(f"{where}: a figure needs a mark, and a mark a figure")
            if row["mark"] is not None and row["mark"] not in data["marks"]:
                found.append(f"{where}: unknown mark {row['mark']!r}; one of {', '.join(data['marks'])}")
            found += [f"{where}: {problem}" for problem in unproven(row.get("ours"), len(benchmark["measures"]))]
    return found


def unproven(ours: dict[str, Any] | None, measures: int) -> list[str]:
    """What a measured cell lacks: the page that prints it, its command, commit and date."""
    if ours is None:
        return []
    if missing := sorted(OURS - ours.keys()):
        return [f"ours lacks {', '.join(missing)}"]
    page = ROOT / ours["page"]
    if not page.is_file() or ours["prints"] not in page.read_text(encoding="utf-8"):
        return [f"{ours['page']} does not print {ours['prints']!r}"]
    return (
        [] if len(ours["values"]) == measures else [f"ours has {len(ours['values'])} figures for {measures} measures"]
    )


def render(page: str, data: dict[str, Any]) -> str:
    """The page with its tables as the file has them.

    Raises:
        KeyError: the page names a benchmark that the file lacks.
    """
    known = {benchmark["id"]: benchmark for benchmark in data["benchmarks"]}
    return _TABLE.sub(lambda m: m[1] + "\n" + table(known[m["id"]], data["methods"]) + "\n" + m[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["check", "write"], default="check")
    what = parser.parse_args().what
    data, page = read(), PAGE.read_text(encoding="utf-8")
    wrong = problems(data)
    shown = {match["id"] for match in _TABLE.finditer(page)}
    wrong += [f"docs/published.md has no table {b['id']}" for b in data["benchmarks"] if b["id"] not in shown]
    if what == "write":
        PAGE.write_text(render(page, data), encoding="utf-8")
    elif render(page, data) != page:
        wrong.append(
            "docs/published.md is not what docs/evidence/published.yaml says; run python scripts/published.py write"
        )
    print(
        "\n".join(wrong) or "docs/published.md fits docs/evidence/published.yaml",
        file=sys.stderr if wrong else sys.stdout,
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
