"""Runs that answer questions: their samples, what became of every answer, their metrics and words; and older runs beside them."""

from __future__ import annotations

import base64
import doctest
import itertools
import json
import re
from pathlib import Path

import pytest
from fake_answers import ITEMS, make_answers, picture, rows_of, write_predictions, write_samples
from fake_runs import make_run
from test_browser import BROWSER, browse
from test_html import edit, rendered
from test_terminal_and_plots import printed, results, row

from keeplora.errors import KeepLoraError
from keeplora.evaluation import summary
from keeplora.report import answers, compare, kinds, render_report, terminal
from keeplora.report.answers import FATES, read_answers
from keeplora.report.plots import plot_summary
from keeplora.report.runs import load_run

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two tasks whose six answers of task 1 meet every fate, in the order of `FATES`."""
    path = make_answers(tmp_path / "runs", "run")
    edit(path, "results.json", {"tasks": ["counting", "signs"]})
    result = json.loads((path / "results.json").read_text())
    result["accuracy"] = [line[:2] for line in result["accuracy"][:3]]
    result["probe_accuracy"] = result["probe_accuracy"][:3]
    result["metrics"] = summary(result["accuracy"], result["probe_accuracy"])
    (path / "results.json").write_text(json.dumps(result))
    before, learned, end = [0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1]
    for after, scores in enumerate((before, learned, end)):
        write_predictions(path, after, "counting", rows_of("counting", list(map(float, scores))))
    write_samples(path, "counting", 6)
    return path


@pytest.mark.parametrize("module", [answers, kinds, terminal])
def test_docstring_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# --- what became of an answer ----------------------------------------------------------------------------------------


def test_each_answer_has_the_fate_that_its_words_say(run: Path) -> None:
    counting, _, general = read_answers(load_run(run))
    assert counting.counts == dict.fromkeys(FATES, 1)
    assert [item.fate for item in counting.shown] == list(FATES)[:4]
    assert [item.fate for item in counting.others] == list(FATES)[4:]
    assert [moment.after for moment in counting.moments] == [0, 1, 2]
    assert [[a.score for _, a in item.answers if a] for item in counting.shown[:2]] == [[0, 1, 1], [0, 1, 0]]
    assert [moment.after for moment in general.moments] == [0, 2]


def test_fates_of_three_moments_are_told_apart_and_none_is_missing() -> None:
    found = {
        states: answers.fate(dict(zip(("before", "learned", "end"), states, strict=True)))
        for states in itertools.product([False, True], repeat=3)
    }
    assert set(found.values()) == set(FATES)
    assert all((one in ("forgotten", "lost", "never")) == (not states[2]) for states, one in found.items())
    assert {s for s, one in found.items() if one == "forgotten"} == {(False, True, False), (True, True, False)}
    assert answers.fate({"before": True}) is None
    assert answers.fate({"before": True, "end": None}) is None
    assert answers.fate({"learned": True, "end": False}) == "forgotten"


def test_counts_are_over_the_whole_test_set_and_graded_answers_are_right_from_a_half(tmp_path: Path) -> None:
    path = make_answers(tmp_path, "run", "lora")
    for one in read_answers(load_run(path)):
        assert one.total == ITEMS == sum(one.counts.values())
        assert len(one.shown) + len(one.others) == 12
    write_predictions(path, 0, "captions", rows_of("captions", [0.0, 0.0, 0.6, 0.49]))
    write_predictions(path, 3, "captions", rows_of("captions", [0.5, 0.49, 0.51, 1.0]))
    captions = read_answers(load_run(path))[2]
    assert captions.graded
    assert captions.counts == {"learned": 2, "never": 1, "kept": 1}
    page = rendered(path)
    assert "In the counts an answer with a score of 0.5 or more is right." in page.text
    assert "◐ partly · 0.60" in page.text
    assert "2 (50\u00a0%)" in page.cells


def test_samples_shown_do_not_depend_on_what_was_answered_well(run: Path) -> None:
    """One of each fate, the earliest of it; the others follow, so that nothing that was stored is hidden."""
    assert answers.choose(["never", "never", "kept", "kept", "learned"], 4) == [4, 2, 0, 3]
    assert answers.choose([None, None], 4) == [0, 1]
    text = rendered(run).text
    assert "drawn by the run’s seed before anything was answered" in text
    assert "The other 2 samples of counting" in text


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_shows_picture_question_reference_and_three_marked_answers(run: Path) -> None:
    source = render_report(run).read_text(encoding="utf-8")
    page = rendered(run)
    first = source.split('<li class="sample">')[1]
    data = re.search(r'<img src="data:image/webp;base64,([^"]+)" alt="[^"]+">', first)
    assert data is not None
    assert base64.b64decode(data[1]) == picture(1, 0)
    assert "How many discs are there?" in first
    assert re.findall(r"<dt>(.*?)</dt><dd><span[^>]*>(.*?)</span> <b class=\"mark-(\w+)\">(\S) \w+", first) == [
        ("before", "answer 0 worth 0", "wrong", "✗"),
        ("when learned", "answer 0 worth 1", "right", "✓"),
        ("at the end", "answer 0 worth 1", "right", "✓"),
    ]
    assert page.cells.count("1 (17\u00a0%)") == len(FATES)
    assert "answers" in page.ids


def test_page_stays_one_file_without_requests_or_scripts(run: Path) -> None:
    page = rendered(run)
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(|srcset", source)
    assert all(t.startswith(("#", "data:image/webp;base64,")) or t == "data:," for t in page.targets)
    assert sum(t.startswith("data:image") for t in page.targets) == 6 + 12 + 12
    assert "img-src data:" in source


def test_everything_from_data_and_model_is_escaped(run: Path) -> None:
    rows = [*rows_of("counting", [1.0] * 6, EVIL), {"key": "x"}]
    for line in rows:
        line |= {"prediction": EVIL + "\x00", "references": [EVIL]}
    for after in range(3):
        write_predictions(run, after, "counting", rows)
    write_samples(run, "counting", 6, EVIL)
    edit(run, "results.json", {"scorers": {"counting": EVIL}, "components": {EVIL: {EVIL: 1.0}}})
    page = rendered(run)
    assert "script" not in page.tags
    assert all(not t.startswith("x") for t in page.targets)
    assert page.text.count(EVIL) >= 6 * 4 + 2
    assert "\x00" not in page.text


@pytest.mark.parametrize(
    "place", ["../../secret.webp", "/etc/hostname", "samples/counting/none.webp", 7, "config.yaml", ""]
)
def test_only_pictures_of_the_run_are_embedded(run: Path, place: object) -> None:
    (run.parent.parent / "secret.webp").write_bytes(picture(1, 99))
    entries = json.loads((run / "samples" / "counting.json").read_text())
    entries[0]["picture"] = place
    (run / "samples" / "counting.json").write_text(json.dumps(entries))
    item = read_answers(load_run(run))[0].shown[0]
    assert item.picture is None
    assert item.missing
    assert item.missing in rendered(run).text


def test_pictures_have_a_limit_and_those_shown_first_come_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_answers(load_run(run))
    need = sum(len(item.picture or "") for one in whole for item in one.shown)
    monkeypatch.setattr(answers, "PAGE_BYTES", need + 40)
    cut = read_answers(load_run(run))
    assert all(item.picture for one in cut for item in one.shown)
    assert all(item.missing == "left out, to keep this page small" for one in cut for item in one.others)
    monkeypatch.setattr(answers, "PICTURE_BYTES", 10)
    assert read_answers(load_run(run))[0].shown[0].missing == "too large for this page"


def test_run_under_way(tmp_path: Path) -> None:
    path = make_answers(tmp_path, "run", done=1, state="running")
    page = rendered(path)
    found = {one.name: [m.role for m in one.moments] for one in read_answers(load_run(path))}
    assert found == {
        "counting": ["before", "learned"],
        **{name: ["before", "end"] for name in ("signs", "captions", "general")},
    }
    assert "now: after task 1, before its own" in page.text
    assert "right after it was learned (task 1, the latest)" in page.text
    young = make_answers(tmp_path, "young", done=0, state="running")
    assert [len(one.moments) for one in read_answers(load_run(young))] == [1] * 4
    assert "learned" not in rendered(young).cells


@pytest.mark.parametrize("gone", ["predictions", "samples", "predictions/after-0", "predictions/after-1", "both"])
def test_missing_files(run: Path, gone: str) -> None:
    import shutil

    for name in ("predictions", "samples") if gone == "both" else (gone,):
        shutil.rmtree(run / name)
    page = rendered(run)
    assert "matrix" in page.ids
    assert ("answers" in page.ids) == (gone not in ("predictions", "both"))
    if gone == "predictions/after-1":  # as of joint training, which has no moment after task 1 alone
        assert [m.after for m in read_answers(load_run(run))[0].moments] == [0, 2]


def test_damaged_lines_and_samples_do_not_stop_the_page(run: Path) -> None:
    file = run / "predictions" / "after-1" / "counting.jsonl"
    file.write_text(file.read_text().splitlines()[0] + '\n{"key": "counting-1", "pre\n[]\n')
    (run / "samples" / "counting.json").write_text("{")
    assert "No samples of this set were kept." in rendered(run).text
    assert read_answers(load_run(run))[0].counts == {"learned": 1}


def test_zero_shot_has_one_moment(tmp_path: Path) -> None:
    path = make_answers(tmp_path, "run", "zero-shot")
    assert [[m.role for m in one.moments] for one in read_answers(load_run(path))] == [["before"]] * 4
    page = rendered(path)
    assert "The untouched model’s answers score" in page.text
    assert "without any training" in page.text


# --- metrics and words -----------------------------------------------------------------------------------------------


def test_words_and_metrics_of_generation(tmp_path: Path) -> None:
    path = make_answers(tmp_path / "runs", "kpp")
    make_answers(tmp_path / "runs", "lora", "lora")
    page = rendered(path)
    metrics = results(path)["metrics"]
    head = [cell for cell in page.cells if cell.endswith((" ↑", " ↓"))]
    assert head == ["MFT ↑", "MFN ↑", "MAA ↑", "BWT ↑", "General ↑"]
    for key in ("mft", "mfn", "maa", "bwt", "probe"):
        assert f"{metrics[key]:.1f}".replace("-", "−") in {cell.removesuffix(" ★") for cell in page.cells}
    assert f"its answers score {metrics['mfn']:.1f} %" in page.text
    assert "Score after every task" in page.text
    assert "captions rouge-l" in page.text  # the scorer beside its set
    assert {"rouge-l-plain", "41.2"} <= set(page.cells)
    for word in ("Accuracy", "accuracy", "pictures right", "Class names", "Transfer"):
        assert word not in page.text, word


def test_untouched_levels_are_the_metrics_of_a_matrix_that_never_moves(tmp_path: Path) -> None:
    loaded = load_run(make_answers(tmp_path, "run"))
    still = summary([loaded.accuracy[0]] * 4, [loaded.probe_accuracy[0]] * 4)
    for key, value in compare.untouched(loaded).items():
        assert value == pytest.approx(still[key]), key


def test_captions_are_no_mean_over_items_and_can_pass_100(tmp_path: Path) -> None:
    path = make_answers(tmp_path, "run")
    result = results(path)
    result["scorers"]["captions"] = "cider"
    result["accuracy"][3][2] = 134.5
    result["test_counts"]["captions"] = 7
    (path / "results.json").write_text(json.dumps(result))
    page = rendered(path)
    assert "A cell rests on 40 test questions" in page.text
    assert "That does not hold for captions" in page.text
    ys = [float(y) for y in re.findall(r'cy="(-?[\d.]+)"', (path / "report.html").read_text())]
    assert min(ys) >= 0
    make_answers(tmp_path, "b", "lora")
    assert plot_summary([path, tmp_path / "b"], tmp_path / "p.svg").exists()


def test_terminal(tmp_path: Path) -> None:
    one, two = results(make_answers(tmp_path, "a")), results(make_answers(tmp_path, "b", "lora"))
    text = printed(terminal.results_table([one, two]))
    assert row(text, "method")[1:] == ["MFT", "MFN", "MAA", "BWT", "General", "time"]
    wanted = [f"{two['metrics'][k]:.1f}".replace("-", "−") for k in ("mft", "mfn", "maa", "bwt", "probe")]
    assert [cell.removesuffix("★") for cell in row(text, "Sequential LoRA")[1:6]] == wanted
    assert row(text, "Untouched model")[4] == "–"
    assert "score in percent (exact; captions: rouge-l)" in printed(terminal.matrix_table(one))
    found = printed(terminal.answers_tables(tmp_path / "a")[0])
    counts = read_answers(load_run(tmp_path / "a"))[0].counts
    assert row(found, "1 · counting")[2] == f"{counts['learned']} ({100 * counts['learned'] / ITEMS:.0f}\u00a0%)"
    assert terminal.answers_tables(make_run(tmp_path, "c")) == []


def test_results_of_before_there_were_kinds_are_classification(tmp_path: Path) -> None:
    path = make_run(tmp_path, "old")
    assert "kind" not in results(path)
    page = rendered(path)
    assert "Accuracy after every task" in page.text
    assert "Transfer ↑" in page.cells
    assert "answers" not in page.ids
    assert load_run(path).kind is kinds.CLASSIFICATION
    with_kind = make_run(tmp_path / "b", "old")
    edit(with_kind, "results.json", {"kind": "classification"})
    render_report(with_kind)
    assert (with_kind / "report.html").read_bytes() == (path / "report.html").read_bytes()


def test_kind_before_there_are_results_and_unknown_kind(tmp_path: Path) -> None:
    path = make_answers(tmp_path, "run", done=0, state="running")
    edit(path, "results.json", {"kind": "generatoin"})
    with pytest.raises(KeepLoraError, match=r"results.json: 'kind' is 'generatoin'; did you mean 'generation'"):
        load_run(path)
    (path / "results.json").unlink()
    assert load_run(path).kind is kinds.GENERATION
    page = rendered(path)
    assert "Class names" not in page.text
    assert "rouge-l" in page.cells


def test_other_kind_is_refused_beside_a_run(tmp_path: Path) -> None:
    one, two = make_answers(tmp_path / "a", "run"), make_run(tmp_path / "b", "run", key="questions")
    with pytest.raises(KeepLoraError, match=r"it names pictures \(classification\), the other answers questions"):
        render_report(one, against=[two])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
def test_fits_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    path = make_answers(tmp_path / "runs", "run")
    for after in range(4):
        lines = rows_of("counting", [after / 3] * ITEMS)
        for line in lines:
            line["prediction"] = "Wort" * 60
        write_predictions(path, after, "counting", lines)
    write_samples(path, "counting", 12, "Donaudampfschifffahrt" * 8)
    found, console = browse(render_report(path).read_text(encoding="utf-8"), tmp_path, width=width, dark=dark)
    assert console == ""
    assert found["scroll"] <= width, found["wide"]
    assert found["wide"] == []
