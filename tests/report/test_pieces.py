"""Palette, charts, reading of run directories, and the comparison: each piece by itself."""

from __future__ import annotations

import doctest
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from fake_runs import make_run
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from keeplora.errors import KeepLoraError
from keeplora.report import charts, compare, figures, palette, runs, tables
from keeplora.report.charts import Series
from keeplora.report.terminal import results_table

STYLE = (Path(runs.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [charts, compare, figures, palette, runs, tables])
def test_docstring_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_on_the_heat_map_and_marks_on_the_page_can_be_read(theme: str) -> None:
    for level in range(palette.HEAT_LEVELS):
        background, ink = palette.heat(theme, level)
        assert palette.contrast(background, ink) >= 4.5, (theme, level)
    for colour in palette.SERIES[theme]:
        assert palette.contrast(colour, palette.SURFACE[theme]) >= 3, colour


def theme_variables(theme: str) -> dict[str, str]:
    blocks = re.findall(r":root\{([^}]*)\}", STYLE)
    found = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", blocks[0] if theme == "light" else blocks[1]))
    return {**found, "surface": palette.SURFACE[theme]}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(theme: str) -> None:
    v = theme_variables(theme)
    pairs = [("ink", s) for s in ("page", "surface", "wash")] + [
        ("soft", s) for s in ("page", "surface", "wash", "track")
    ]
    pairs += [
        ("link", "surface"),
        ("link", "page"),
        ("good", "good-bg"),
        ("warn", "warn-bg"),
        ("bad", "bad-bg"),
        ("ink", "warn-bg"),
    ]
    for text, behind in pairs:
        assert palette.contrast(v[text], v[behind]) >= 4.5, (theme, text, behind)


def test_contrast_is_the_standard_one() -> None:
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert palette.contrast("#ffffff", "#0000ff") == pytest.approx(8.59, abs=0.01)


# --- charts ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), max_size=8))
def test_axis_holds_every_value_on_round_ticks(values: list[float | None]) -> None:
    top = charts.nice_top(values)
    known = [v for v in values if v is not None]
    assert top >= max(known, default=0) * (1 - 1e-9)
    ticks = charts.ticks(top)
    assert ticks[0] == 0
    assert ticks[-1] == pytest.approx(top)
    assert 4 <= len(ticks) <= 6


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=0, max_size=40),
    st.integers(0, 9),
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=12),
)
def test_every_chart_is_well_formed_xml_inside_its_box(values: list[float | None], index: int, name: str) -> None:
    labels = [str(i) for i in range(len(values))]
    one = Series(name, values, index, True)
    numbers = [[v or 0.0, 1.0] for v in values]
    made = [
        charts.line_chart(
            [one], labels, label=name, top=100, learned_at=1, chance=10, bands=[(0, 2, name)], x_title=name
        ),
        charts.bar_chart([one], label=name, top=100, best=[0]),
        charts.stacked_columns(labels, [[v / 2, 1.0] for v, _ in numbers], ["W", name], label=name, x_title=name),
        charts.stacked_bars(labels, numbers, ["a", name], label=name, unit="s"),
    ]
    for svg in made:
        root = ET.fromstring(str(svg))
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        assert root.attrib["aria-label"] == name
        for mark in root.iter("circle"):
            assert 0 <= float(mark.attrib["cx"]) <= width
            assert 0 <= float(mark.attrib["cy"]) <= height
        for rect in root.iter("rect"):
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width + 0.2


def test_a_gap_lifts_the_pen() -> None:
    svg = charts.line_chart([Series("a", [1.0, None, 3.0, 4.0])], list("abcd"), label="x", top=4)
    path = re.search(r'<path d="([^"]*)"', svg)
    assert path is not None
    assert re.findall("[ML]", path[1]) == ["M", "M", "L"]
    assert svg.count("<circle") == 3


def test_higher_values_are_drawn_higher() -> None:
    svg = charts.line_chart([Series("a", [0.0, 50.0, 100.0])], list("abc"), label="x", top=100)
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert ys[0] > ys[1] > ys[2]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)


def test_numbers_for_a_person() -> None:
    assert [charts.number(v) for v in (1.25, -3.0, -0.01, None, float("nan"))] == ["1.2", "−3.0", "0.0", "–", "–"]
    assert [tables.count(v) for v in (1234567, 0, None, True)] == ["1 234 567", "0", "–", "–"]
    assert [tables.duration(v) for v in (0.0, 59.96, 3599.9, None)] == ["0.0 s", "1 min 00 s", "1 h 00 min", "–"]
    assert [tables.size(v) for v in (12, 2**20, 3 * 2**40)] == ["12 B", "1 MiB", "3072.0 GiB"]
    assert [tables.moment(v) for v in (None, "soon", 5)] == [None, "soon", "5"]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_find_comparable_takes_the_same_key_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    from keeplora.report import find_comparable

    root = tmp_path / "runs"
    make_run(root, "other-order", "lora", key="beef")
    (root / "notes").mkdir()
    broken = make_run(root, "broken", "lora")
    (broken / "results.json").write_text("{", encoding="utf-8")
    found = find_comparable(runs["keeplora++"])
    assert [path.name for path in found] == ["demo-full-ft", "demo-keeplora", "demo-lora"]


def test_no_key_means_nothing_to_compare_with(tmp_path: Path) -> None:
    from keeplora.report import find_comparable

    a = make_run(tmp_path, "a", key="")
    make_run(tmp_path, "b", key="")
    assert find_comparable(a) == []


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeepLoraError, match="is not a run directory"):
        runs.load_run(tmp_path)
    path = make_run(tmp_path, "run")
    good = json.loads((path / "results.json").read_text())
    for change, said in (
        ({"format": "other"}, "'format' is 'other'"),
        ({"version": 1}, "version 1 is later than 0"),
        ({"accuracy": [[1.0]]}, r"accuracy\[0\] has 1 values for 5 tasks"),
    ):
        (path / "results.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(KeepLoraError, match=said):
            runs.load_run(path)
    (path / "results.json").write_text("[]")
    with pytest.raises(KeepLoraError, match="holds a list"):
        runs.load_run(path)
    (path / "results.json").write_text(json.dumps(good))
    (path / "status.json").write_text('{"state": ')
    with pytest.raises(KeepLoraError, match=r"status\.json is damaged: it is not readable JSON"):
        runs.load_run(path)


def test_a_half_written_last_event_is_passed_over(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run")
    whole = runs.load_run(path).events
    with open(path / "metrics.jsonl", "a") as handle:
        handle.write('{"event": "epoch", "ta')
    assert runs.load_run(path).events == whole


def test_an_epoch_written_twice_by_a_resumed_run_counts_once(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run")
    with open(path / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps({"event": "epoch", "task": "emoji", "epoch": 2, "loss": 9.75}) + "\n")
    records = figures.epochs(runs.load_run(path))
    assert len(records) == 15
    assert records[1]["loss"] == 9.75
    assert [r["task"] for r in records[:4]] == ["emoji"] * 3 + ["road signs"]


# --- comparing -------------------------------------------------------------------------------------------------------


def test_untouched_model_is_row_zero_at_every_moment(tmp_path: Path) -> None:
    from keeplora.evaluation import summary

    run = runs.load_run(make_run(tmp_path, "run"))
    n = len(run.tasks)
    still = summary([run.accuracy[0]] * (n + 1), [run.probe_accuracy[0]] * (n + 1))
    for key, value in compare.untouched(run).items():
        assert value == pytest.approx(still[key]), key


def test_a_task_that_sat_out_is_not_said_to_be_kept(tmp_path: Path) -> None:
    run = runs.load_run(make_run(tmp_path, "run"))
    run.tasks_info[1]["not_learned"] = "no target has room"
    results = [str(row[-1]) for row in tables.task_table(run).rows]
    assert results == ["kept", "not learned", "kept", "kept", "kept"]


def test_a_run_on_held_out_samples_says_so(tmp_path: Path) -> None:
    from keeplora.report.html import _facts

    run = runs.load_run(make_run(tmp_path, "run"))
    assert "judged on" not in dict(_facts(run))
    run.results["evaluate_on"] = "validation"
    assert dict(_facts(run))["judged on"] == "held-out training samples, no test sample"


def test_with_the_classes_seen_there_is_no_untouched_model(tmp_path: Path) -> None:
    """Before the first task it chose among fewer classes than at any later moment."""
    run = runs.load_run(make_run(tmp_path, "run"))
    run.results["candidates"] = "seen"
    assert compare.untouched(run) == {}
    assert [entry.label for entry in compare.entries(run, [])] == ["KeepLoRA++"]


def test_one_line_per_method_same_seed_first_and_all_in_the_table(tmp_path: Path) -> None:
    run = runs.load_run(make_run(tmp_path, "kpp-1", seed=1))
    others = [runs.load_run(make_run(tmp_path, f"lora-{s}", "lora", seed=s)) for s in (0, 1, 2)]
    others.append(runs.load_run(make_run(tmp_path, "kpp-2", seed=2)))
    found = compare.entries(run, others)
    assert [e.label for e in found] == [
        "KeepLoRA++, seed 1", "Sequential LoRA, seed 0", "Sequential LoRA, seed 1", "Sequential LoRA, seed 2",
        "KeepLoRA++, seed 2", "Untouched model",
    ]  # fmt: skip
    assert [e.charted for e in found] == [True, False, True, False, False, True]
    assert len({e.index for e in found if e.charted}) == 3


def test_names_tell_apart_what_seeds_do_not(tmp_path: Path) -> None:
    a, b = (runs.load_run(make_run(tmp_path, name)) for name in ("first", "second"))
    assert [e.label for e in compare.entries(a, [b])][:2] == ["KeepLoRA++, first", "KeepLoRA++, second"]


def test_two_runs_of_one_method_name_and_seed_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder, "same") for folder in ("one", "two", "three")]
    text = (paths[1] / "config.yaml").read_text()
    (paths[1] / "config.yaml").write_text(text.replace("lr: 1.0e-3", "lr: 2.0e-3").replace("r: 16", "r: 8"))
    a, b, c = map(runs.load_run, paths)
    assert [e.label for e in compare.entries(a, [b])][:2] == ["KeepLoRA++, r 16, lr 0.001", "KeepLoRA++, r 8, lr 0.002"]
    assert [e.label for e in compare.entries(a, [c])][:2] == [f"KeepLoRA++, {paths[0]}", f"KeepLoRA++, {paths[2]}"]
    stream = io.StringIO()
    Console(file=stream, width=160).print(results_table([a, b]))
    assert "KeepLoRA++, r 8, lr 0.002" in stream.getvalue()
    # One seed differs, so the settings tell the other two apart.
    other = runs.load_run(make_run(tmp_path, "same", seed=3))
    assert [e.label for e in compare.entries(a, [b, other])][:3] == [
        "KeepLoRA++, seed 0, r 16, lr 0.001",
        "KeepLoRA++, seed 0, r 8, lr 0.002",
        "KeepLoRA++, seed 3",
    ]


def test_no_star_where_all_are_equal(tmp_path: Path) -> None:
    run = runs.load_run(make_run(tmp_path, "a"))
    found = [compare.Entry(name, run, {"last": 50.0 + i / 100}) for i, name in enumerate("abc")]
    assert compare.best(found, "last", True) == set()  # equal as they are shown
    assert compare.best([*found, compare.Entry("d", run, {"last": 49.0})], "last", True) == {0, 1, 2}


def test_layer_scales_that_lie_on_one_another_are_one_line(tmp_path: Path) -> None:
    run = runs.load_run(make_run(tmp_path, "a", blocks=6))
    flat = [{**layer, "scale": 1.0} for layer in run.layers]
    equal = runs.Run(run.path, {**run.results, "layers": flat})
    (figure,), (apart,) = figures.scales(equal), figures.scales(run)
    assert [s.name for s in figure["legend"]] == ["vision tower and text tower (the same line)"]
    assert [s.name for s in apart["legend"]] == ["vision tower", "text tower"]


def test_best_marks_ties_and_leaves_out_models_that_cannot_forget(tmp_path: Path) -> None:
    run = runs.load_run(make_run(tmp_path, "a"))
    zero = runs.load_run(make_run(tmp_path, "z", "zero-shot"))
    lora = runs.load_run(make_run(tmp_path, "l", "lora"))
    found = compare.entries(run, [zero, lora])
    assert [e.label for e in found] == [
        "KeepLoRA++",
        "Zero-shot",
        "Sequential LoRA",
    ]  # the zero-shot run is the untouched model
    assert zero.metrics["forgetting"] == 0
    assert compare.best(found, "forgetting", False) == {0}
    assert compare.best(found, "last", True) == {0}
    assert compare.best(found[:1], "last", True) == set()
    twin = compare.Entry("twin", run, dict(run.metrics))
    assert compare.best([found[0], twin, found[2]], "last", True) == {0, 1}
    joint = compare.Entry("joint", runs.load_run(make_run(tmp_path, "j", "joint")), {"last": 99.0})
    assert compare.best([found[0], joint, found[2]], "last", True) == {0}  # what could be had, no rival


def test_headline_says_the_numbers(runs: dict[str, Path]) -> None:
    from keeplora.report.runs import load_others, load_run

    run = load_run(runs["keeplora++"])
    text = " ".join(compare.headline(run, compare.entries(run, load_others(run)))).replace("\u00a0", " ")
    text = re.sub("<[^>]*>", "", text)
    lora = load_run(runs["lora"])
    assert f"it names {run.metrics['last']:.1f} % of the test pictures right" in text
    assert f"ended {run.metrics['forgetting']:.1f} points below its earlier best" in text
    assert f"Last +{run.metrics['last'] - lora.metrics['last']:.1f}" in text
    assert "One run of each method" in text


def test_capacity_adds_up(tmp_path: Path) -> None:
    run = runs.load_run(make_run(tmp_path, "a"))
    layers = [layer for layer in run.layers if layer["tower"] == "vision" and layer["depth"] == 3]
    shares = figures._shares(layers, 6)
    assert len(layers) == 4
    assert sum(shares) == pytest.approx(100 * sum(layer["used"][-1] for layer in layers) / (4 * 384))
    assert shares[0] == pytest.approx(100 * layers[0]["used"][0] / 384)
