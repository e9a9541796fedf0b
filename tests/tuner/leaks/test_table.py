"""The tables: narrow enough, worst first, and readable without colour."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from keeplora.tuner.leaks.rows import Audit, BackwardRow, ExportRow, LeakRow, judge
from keeplora.tuner.leaks.table import SHOWN, WIDTH, audit_tables, audit_text

LAYERS = [f"model.language_model.layers.{i}.self_attn.{k}_proj" for i in range(50) for k in "qkvo"]
EXPORTS = (("running", "bf16", 0.2), ("fp32", "fp32", 2e-6), ("fp16", "fp16", 0.03), ("adapter", "fp32", 1e-8))


def wide_audit(**leaks: float) -> Audit:
    """Two hundred layers of long names, two tasks; ``leaks``: factor leaks of single layers by their index (l7=…)."""
    rows, exports, backward = [], [], []
    for i, layer in enumerate(LAYERS):
        leak = leaks.get(f"l{i}", 1e-8 * (1 + i / 1000))
        rows += [LeakRow(layer, task, leak, 0.2, 0.19, (leak, None)) for task in ("pets", "signs")]
        for export, dtype, size in EXPORTS:
            floor = None if export == "adapter" else size * 1.1
            exports += [ExportRow(export, dtype, layer, b, size, floor, size, 2 * size) for b in (None, "pets")]
        backward.append(BackwardRow(layer, "pets", 0.99, 2.0, 1.0, 0.5, True))
    return Audit(rows, ("A note.",), (None, "pets", "signs"), tuple(exports), tuple(backward))


def widest(text: str) -> int:
    """Of the tables; sentences that name layers may be longer."""
    return max(len(line) for line in text.splitlines() if not line.startswith("✗"))


def test_two_hundred_layers_fit_and_the_worst_come_first():
    audit = wide_audit(l150=3e-4, l77=2e-6)
    text = audit_text(audit)
    lines = text.splitlines()
    assert widest(text) <= WIDTH
    named = [line for line in lines if line.startswith("model.language_model.layers.")]
    assert len(named) == 2 * SHOWN
    assert named[0].startswith(LAYERS[150])
    assert named[1].startswith(LAYERS[77])
    assert "176 more layers are not shown, none with a worse mark (--all shows them)." in lines
    assert "A note." in lines
    assert (
        f"✗ the factors of task pets in {LAYERS[150]} leak 3.0e-04, most of it into what the weight basis U₀ protects."
        in lines
    )
    everything = audit_text(audit, every_layer=True)
    assert all(everything.count(f"{layer} ") >= 2 for layer in LAYERS)
    assert "are not shown" not in everything
    assert widest(everything) <= WIDTH


def test_marks_say_without_colour_what_colours_say():
    audit = wide_audit(l150=3e-4)
    row = next(line for line in audit_text(audit).splitlines() if line.startswith(LAYERS[150]))
    assert row.split()[1:] == [
        "3.0e-04",
        "✗",
        "2.0e-01/2e-01",
        "≈",
        "2.0e-06/2e-06",
        "✓",
        "3.0e-02/3e-02",
        "≈",
        "1.0e-08",
        "✓",
    ]
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, force_terminal=True, color_system="standard")
    console.print(audit_tables(audit)[0])
    coloured = next(line for line in stream.getvalue().splitlines() if LAYERS[150] in line)
    assert "\x1b[1;31m3.0e-04 ✗" in coloured
    assert "\x1b[33m2.0e-01/2e-01 ≈" in coloured
    assert "\x1b[32m1.0e-08 ✓" in coloured


def test_a_layer_whose_export_is_out_of_bounds_comes_before_larger_factor_leaks():
    audit = wide_audit(l3=9e-6)
    bad = ExportRow("running", "bf16", LAYERS[199], None, 0.5, 0.01, 0.1, 0.2)
    audit = Audit(audit.rows, audit.notes, audit.bases, (*audit.exports, bad), audit.backward)
    first = next(line for line in audit_text(audit).splitlines() if line.startswith("model."))
    assert first.startswith(LAYERS[199])
    assert "5.0e-01/1e-02 ✗" in first


def test_names_that_are_too_long_keep_their_end():
    long = "model." + "very_long_part." * 6 + "q_proj"
    whole = wide_audit()
    rows = [dataclasses.replace(row, layer=long) for row in whole.rows[:2]]
    exports = tuple(dataclasses.replace(row, layer=long) for row in whole.exports[:8])
    text = audit_text(Audit(rows, (), whole.bases, exports, (dataclasses.replace(whole.backward[0], layer=long),)))
    leaks, stability = [line for line in text.splitlines() if line.startswith("…") and "very_long_part.q_proj" in line]
    assert leaks.split()[1:] == [
        "1.0e-08",
        "✓",
        "2.0e-01/2e-01",
        "≈",
        "2.0e-06/2e-06",
        "✓",
        "3.0e-02/3e-02",
        "≈",
        "1.0e-08",
        "✓",
    ]
    assert stability.split()[1:] == ["2e-01/4e-01", "2e-06/4e-06", "3e-02/6e-02", "1e-08/2e-08", "1.0e-02", "0.50", "✓"]
    assert widest(text) <= WIDTH


def test_weights_that_rounding_does_not_explain_are_named():
    bad = [ExportRow("saved", "bf16", "q", basis, leak, 0.01) for basis, leak in ((None, 0.2), ("pets", 0.5))]
    text = audit_text(Audit([LeakRow("q", "signs", 1e-8, 0.0, 0.0, (1e-8,))], (), (None,), tuple(bad)))
    said = "✗ the saved weights of q leak 5.0e-01 into what task pets protects, above the rounding floor of 1e-02: "
    assert said + "something besides the tasks in force is in them." in text
    assert text.count("something besides") == 1


def test_names_are_not_markup():
    rows = [LeakRow("[bold]x[/bold]", "[red]t", 1e-3, None, None, (1e-3,))]
    text = audit_text(Audit(rows, (), (None,)))
    assert "[bold]x[/bold]" in text
    assert "task [red]t in" in text


def test_judgement():
    assert [judge(v) for v in (0.0, 1e-5, 1.1e-5)] == ["ok", "ok", "above"]
    assert [judge(v, 0.1) for v in (1e-6, 0.2, 0.21)] == ["ok", "floor", "above"]
    assert judge(None, 0.1) is None
