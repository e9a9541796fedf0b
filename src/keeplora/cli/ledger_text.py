"""What `keeplora ledger` prints, as tables for a terminal; and the values behind them, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from keeplora.tuner import Ledger
from keeplora.tuner.chain import TASK
from keeplora.tuner.ledger_check import Check, differ


def _table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", header_style="bold", padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left")
    return table


def _row(table: Table, *cells: Any) -> None:
    # Text, not markup: a name may hold square brackets.
    table.add_row(*(Text("–" if cell is None or cell == "" else str(cell)) for cell in cells))


def log_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """One row per entry."""
    entries, chain = ledger.entries(), ledger.chain()
    inputs = {name: n_in for name, (n_in, _) in ledger.targets.items()}
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"entry": entry.index, "kind": entry.kind, "task": entry.name or None, "time": entry.time}
        if entry.kind == TASK:
            layers: Mapping[str, Mapping[str, Any]] = entry.value["layers"]
            ranks = [layer.get("rank") or 0 for layer in layers.values()]
            used = {name: layer["used"] for name, layer in layers.items() if layer.get("used") is not None}
            row |= {
                "ranks": [min(ranks), max(ranks)] if ranks else None, "used": sum(used.values()) if used else None,
                "of": sum(inputs.get(name, 0) for name in used) or None,
                "score": (entry.metrics() or {}).get("score"), "state": chain.status(entry.index),
            }  # fmt: skip
        else:
            row["subject"] = entry.step.subject
        rows.append(row)
    return rows


def log_table(rows: Sequence[Mapping[str, Any]], where: str) -> list[Any]:
    """`log_rows` for a person."""
    head = ("entry", "what", "task", "when (UTC)", "rank", "dimensions used", "score", "now")
    table = _table(f"{where}: {len(rows)} entries", *head, right=("entry", "rank", "dimensions used", "score"))
    for row in rows:
        what = row["kind"] if row["kind"] != "rollback" else f"rollback to {row['subject']}"
        ranks, of = row.get("ranks"), row.get("of")
        rank = None if ranks is None else str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]}–{ranks[1]}"
        used = f"{row['used']}/{of} ({row['used'] / of:.0%})" if of else None
        score = row.get("score")
        when = (row["time"] or "").replace("T", " ").removesuffix("+00:00")
        _row(
            table, row["entry"], what, row["task"], when, rank, used,
            f"{score:.1f}" if isinstance(score, int | float) else None, row.get("state"),
        )  # fmt: skip
    return [table]


def task_told(ledger: Ledger, task: str) -> dict[str, Any]:
    """All that is recorded of a task, but for its tensors."""
    entries, chain = ledger.entries(), ledger.chain()
    k = chain.find(task, chain.state.active)
    entry = entries[k - 1]
    file = entry.folder / "tensors.safetensors"
    return {
        "entry": k, "name": entry.name, "state": chain.status(k), "folder": str(entry.folder), "time": entry.time,
        "bytes": file.stat().st_size if file.is_file() else 0, "base": ledger.head["base"],
        "learned_after": chain.names(chain.before[k]), "metrics": entry.metrics(), "info": entry.value["info"],
        "config": entry.value.get("config") or ledger.head["config"],
        "versions": entry.value.get("versions") or ledger.head.get("versions"), "layers": entry.value["layers"],
    }  # fmt: skip


def task_tables(told: Mapping[str, Any]) -> list[Any]:
    """`task_told` for a person."""
    facts = _table(f"{told['name']} (entry {told['entry']}, {told['state']})", "", "")
    for key in ("time", "folder", "bytes"):
        _row(facts, key, told[key])
    _row(facts, "learned after", ", ".join(told["learned_after"]))
    base = told["base"]
    _row(facts, "base model", " ".join(str(base[k]) for k in ("name", "revision", "class") if base.get(k)))
    for key, value in (told["info"] or {}).items():
        _row(facts, key, _short(value))
    for key in ("config", "versions"):
        _row(facts, key, _short(told[key]))
    for key, value in (told["metrics"] or {}).items():
        _row(facts, f"measured: {key}", _short(value))
    layers = _table(
        "", "layer", "s", "rank", "explained (ε)", "tr C", "columns of U", right=("s", "rank", "columns of U")
    )
    for name, layer in told["layers"].items():
        numbers = [layer.get(key) for key in ("s", "rank", "explained", "trace", "used")]
        _row(layers, name, *(f"{v:.4g}" if isinstance(v, float) else v for v in numbers))
    return [facts, layers]


def _short(value: Any, limit: int = 400) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{k}: {_short(v, limit)}" for k, v in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(_short(v, limit) for v in value)
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else f"{text[:limit]} …"


def check_table(found: Sequence[Check], where: str) -> list[Any]:
    """What `verify` looked at."""
    table = _table(f"{where}: what was checked", "where", "what", "value", "limit", "", right=("value", "limit"))
    for check in found:
        numbers = [None if v is None else f"{v:.1e}" for v in (check.value, check.limit)]
        _row(table, check.where, check.what, *numbers, "ok" if check.passed else "FAILED")
    return [table]


def diff_tables(told: Mapping[str, Any], a: str, b: str) -> list[Any]:
    """`compare_ledgers` for a person."""
    if not differ(told):
        return [Text(f"{a} and {b}: no difference, {told['common']} entries")]
    same = "the same base model" if told["same_base"] else "DIFFERENT base models"
    head = Text(f"{a} and {b}: {same}, {told['common']} entries in common")
    only = _table("", "only in", "entry", "what", "task")
    for where, rows in ((a, told["only_a"]), (b, told["only_b"])):
        for row in rows:
            _row(only, where, row["entry"], row["kind"], row["name"])
    layers = _table("", "layer", "‖ΔW‖ first", "‖ΔW‖ second", "‖difference‖", "relative",
                    right=("‖ΔW‖ first", "‖ΔW‖ second", "‖difference‖", "relative"))  # fmt: skip
    for row in told["layers"]:
        _row(layers, row["layer"], *(f"{row[key]:.4g}" for key in ("a", "b", "difference")), f"{row['relative']:.1%}")
    return [head, *([only] if only.rows else []), layers]
