"""The numbers of a study against values worked out by hand: pooling, pairs, gaps, ranks, cost, settings."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from statistics import fmean

import pytest
from scipy.stats import t as student

from keeplora.errors import ConfigError
from keeplora.evaluation import stats
from keeplora.report.runs import Run
from keeplora.report.study_data import Study, StudyCell
from keeplora.study import tables

A = {  # last accuracy of a and b by (order, seed)
    "a": {("1", 0): 60.0, ("2", 0): 64.0, ("1", 1): 62.0, ("2", 1): 70.0, ("1", 2): 61.0, ("2", 2): 65.0},
    "b": {("1", 0): 50.0, ("2", 0): 56.0, ("1", 1): 55.0, ("2", 1): 57.0, ("1", 2): 58.0, ("2", 2): 54.0},
}


def cell(
    method: str, order: str, seed: int, state: str = "finished", cost: dict | None = None, **metrics: float | None
) -> StudyCell:
    results = {"method": method, "tasks": ["x", "y"], "metrics": metrics, "cost": cost or {}}
    return StudyCell(method, order, seed, state, Path("nowhere"), Run(Path("nowhere"), results))


def study(values: dict[str, dict[tuple[str, int], float | None]], **more) -> Study:
    cells = [cell(m, order, seed, last=v) for m, of in values.items() for (order, seed), v in of.items()]
    return tables.summarise(cells, name="s", **{"against": "b", "orders": ["1", "2"], **more})


def by_hand(values: list[float]) -> tuple[float, float, float]:
    mean = fmean(values)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(student.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, mean - half, mean + half


def test_pooled_means_are_over_orders_first_and_then_over_seeds() -> None:
    found = study(A).estimates["a", None, "last"]
    # Seeds' means over the two orders: 62, 66, 63. Not six independent values.
    assert found["n"] == 3
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(by_hand([62.0, 66.0, 63.0]))
    alone = study(A).estimates["a", "2", "last"]
    assert (alone["mean"], alone["low"], alone["high"]) == pytest.approx(by_hand([64.0, 70.0, 65.0]))


def test_one_seed_has_no_interval_however_many_orders() -> None:
    few = {m: {k: v for k, v in of.items() if k[1] == 0} for m, of in A.items()}
    found = study(few)
    assert found.estimates["a", None, "last"] == {"mean": 62.0, "low": None, "high": None, "n": 1, "sd": None}
    one = found.differences["a", None, "last"]
    assert (one.interval["mean"], one.interval["low"], one.t_p, one.t_p_holm) == (9.0, None, None, None)


def test_seed_without_an_order_is_left_out_of_what_is_pooled() -> None:
    part = {**A, "a": {k: v for k, v in A["a"].items() if k != ("2", 1)}}
    found = study(part)
    assert found.estimates["a", None, "last"]["mean"] == pytest.approx((62 + 63) / 2)
    assert found.estimates["a", "1", "last"]["n"] == 3
    assert found.estimates["a", "2", "last"]["n"] == 2
    assert found.differences["a", None, "last"].interval["n"] == 2
    assert found.differences["a", None, "last"].pairs == 2
    assert (found.n_text("a", None), found.n_text("b", None), found.n_text("a", "2")) == ("2 × 2 (+1)", "3 × 2", "2")


def test_orders_are_compared_on_the_same_seeds() -> None:
    part = {**A, "a": {k: v for k, v in A["a"].items() if k != ("2", 1)}}
    found = study(part)
    assert found.order_means["a", "1", "last"] == pytest.approx((60 + 61) / 2)
    assert found.order_means["a", "2", "last"] == pytest.approx((64 + 65) / 2)
    assert study({"a": {("1", 0): 1.0}, "b": {("1", 0): 1.0}}).order_means == {}


def test_differences_are_between_cells_of_equal_seed_and_order() -> None:
    """And every test is over seeds: six cells of three seeds are three values."""
    one = study(A).differences["a", None, "last"]
    # By cell: 10, 8, 7, 13, 3, 11; by seed: 9, 10, 7.
    assert (one.interval["mean"], one.interval["low"], one.interval["high"]) == pytest.approx(by_hand([9.0, 10.0, 7.0]))
    assert one.t_p == pytest.approx(stats.paired_t_test([9.0, 10.0, 7.0], [0.0] * 3))
    assert (one.wilcoxon_n, one.wilcoxon_p, one.wilcoxon_smallest) == (3, pytest.approx(2 / 8), pytest.approx(2 / 8))
    alone = study(A).differences["a", "1", "last"]
    assert (alone.interval["mean"], alone.wilcoxon_n) == (pytest.approx((10 + 7 + 3) / 3), 3)


def test_methods_that_ignore_the_seed_have_no_p() -> None:
    """Eight times the same difference is one difference: Wilcoxon's 2⁻⁷ would star it."""
    values = {"a": 63.0, "b": 60.0}
    found = study({name: {(o, s): last for o in "12" for s in range(8)} for name, last in values.items()})
    one = found.differences["a", None, "last"]
    assert (one.interval["mean"], one.t_p, one.wilcoxon_p) == (3.0, None, None)


def test_unequal_seeds_are_never_paired() -> None:
    found = study({"a": {("1", 0): 60.0, ("2", 0): 60.0}, "b": {("1", 1): 10.0, ("2", 1): 10.0}})
    assert found.differences == {}
    assert {(m, n) for (m, _), n in found.counts.items() if n} == {("a", 1), ("b", 1)}


def test_holm_is_over_the_methods_of_one_metric() -> None:
    values = {**A, "c": {k: v - 1.0 - 0.1 * k[1] for k, v in A["b"].items()}}
    found = study(values)
    a, c = (found.differences[m, None, "last"] for m in "ac")
    assert [a.t_p_holm, c.t_p_holm] == pytest.approx(stats.holm([a.t_p, c.t_p]))
    assert (a.t_p_holm, c.t_p_holm) == (a.t_p, pytest.approx(2 * c.t_p))  # c has the smaller p of the two
    assert [a.wilcoxon_p_holm, c.wilcoxon_p_holm] == pytest.approx([4 / 8, 4 / 8])


def test_cells_that_are_not_finished_count_nowhere() -> None:
    cells = [cell("a", "1", s, last=50.0 + s) for s in range(2)]
    for state in ("running", "failed", "interrupted", "pending"):
        cells.append(cell("a", "1", len(cells), state, last=0.0))
    found = tables.summarise(cells, name="s")
    assert found.estimates["a", None, "last"]["mean"] == 50.5
    assert [one.state for one in found.missing] == ["running", "failed", "interrupted", "pending"]
    assert found.matrices["a", "1"].n == 2
    assert found.counts["a", None] == found.counts["a", "1"] == 2


def test_metrics_that_do_not_exist_stay_away() -> None:
    cells = [
        cell(m, "1", s, last=50.0 + s, transfer=None if m == "joint" else 40.0 + s)
        for m in ("lora", "joint")
        for s in range(2)
    ]
    found = tables.summarise(cells, name="s")
    assert found.against == "lora"
    assert ("joint", None, "transfer") not in found.estimates
    assert ("joint", None, "transfer") not in found.differences
    assert found.differences["joint", None, "last"].interval["mean"] == 0.0
    assert found.differences["joint", None, "last"].t_p == 1.0


def test_empty_study() -> None:
    found = tables.summarise([cell("a", "1", 0, "pending")], name="s")
    assert (found.estimates, found.differences, found.rankings, found.matrices, found.against) == ({}, {}, (), {}, None)


def test_best_leaves_out_bounds_and_what_never_learns() -> None:
    rows = {"zero-shot": (20.0, 0.0), "lora": (50.0, 9.0), "ewc": (50.04, 4.0), "joint": (90.0, 0.0)}
    cells = [cell(m, "1", 0, last=last, forgetting=f) for m, (last, f) in rows.items()]
    found = tables.summarise(cells, name="s")
    assert found.top(None, "last", True) == {"lora", "ewc"}  # equal as they are shown
    assert found.top(None, "forgetting", False) == {"ewc"}
    assert found.top(None, "probe", True) == set()
    assert found.best(None, "last", True) == set()  # one seed makes none the best


@pytest.mark.parametrize(("seeds", "best"), [(2, set()), (3, {"b"})])
def test_a_mean_of_few_seeds_is_never_the_best(seeds: int, best: set[str]) -> None:
    cells = [cell(m, "1", s, last=v + s, probe=7.0) for s in range(seeds) for m, v in (("a", 50.0), ("b", 60.0))]
    found = tables.summarise(cells, name="s")
    assert found.best(None, "last", True) == best
    assert found.top(None, "last", True) == {"b"}
    assert found.top(None, "probe", True) == set()  # all are equal


def test_ranks_are_over_the_blocks_that_all_have() -> None:
    values = {**A, "c": {("1", 0): 70.0, ("2", 0): 55.0, ("1", 1): 56.0}, "d": {("1", 0): 1.0}}
    (found,) = study(values).rankings
    assert (found.methods, found.left_out) == (("a", "b", "c"), ("d",))
    # Ranks by block: c a b; a b c; a c b.
    assert found.ranking.ranks == pytest.approx([4 / 3, 8 / 3, 2.0])
    assert found.ranking.blocks == 3
    assert study(A).rankings == ()  # two methods need no ranks
    assert study({m: {("1", 0): 1.0} for m in "abc"}).rankings == ()  # nor does one block


def test_matrices_are_averaged_cell_by_cell() -> None:
    rows = [[[10.0, 20.0], [50.0, 22.0], [48.0, 60.0]], [[10.0, 20.0], [54.0, 26.0], [None, 64.0]]]
    cells = []
    for seed, accuracy in enumerate(rows):
        results = {
            "method": "a",
            "tasks": ["x", "y"],
            "probes": ["p"],
            "accuracy": accuracy,
            "probe_accuracy": [[30.0 + seed]] * 3,
        }
        cells.append(StudyCell("a", "1", seed, "finished", Path("n"), Run(Path("n"), results)))
    found = tables.summarise(cells, name="s").matrices["a", "1"]
    assert found.rows == ((10.0, 20.0), (52.0, 24.0), (48.0, 62.0))
    assert found.probe_rows == ((30.5,),) * 3
    assert (found.tasks, found.probes, found.n) == (("x", "y"), ("p",), 2)


def test_joints_matrix_with_one_row_only() -> None:
    results = {"method": "joint", "tasks": ["x", "y"], "accuracy": [[1.0, 2.0], [None, None], [3.0, 4.0]]}
    found = tables.summarise([StudyCell("joint", "1", 0, "finished", Path("n"), Run(Path("n"), results))], name="s")
    assert found.matrices["joint", "1"].rows == ((1.0, 2.0), (None, None), (3.0, 4.0))


def test_costs_are_means_and_old_runs_may_lack_some() -> None:
    costs = [{"seconds": 10.0, "state_bytes": 100}, {"seconds": 30.0}]
    found = tables.summarise([cell("a", "1", s, cost=c) for s, c in enumerate(costs)], name="s")
    assert found.costs["a"] == {"seconds": 20.0, "state_bytes": 100}


def test_untouched_model_needs_every_order() -> None:
    def begun(order: str) -> StudyCell:
        results = {"method": "a", "tasks": ["x", "y"], "accuracy": [[10.0, 30.0] if order == "1" else [30.0, 10.0]]}
        return StudyCell("a", order, 0, "running", Path("n"), Run(Path("n"), results))

    found = tables.summarise([begun("1"), begun("2")], name="s").untouched
    assert (found["1", "transfer"], found["2", "transfer"], found[None, "transfer"]) == (30.0, 10.0, 20.0)
    part = tables.summarise([begun("1"), cell("a", "2", 0, "pending")], name="s", orders=["1", "2"]).untouched
    assert (None, "last") not in part


def test_reference_method() -> None:
    assert tables.choose_reference(["zero-shot", "lora", "ewc"], None) == "lora"
    assert tables.choose_reference(["zero-shot", "lora", "ewc"], "ewc") == "ewc"
    assert tables.choose_reference(["lora"], None) is None
    with pytest.raises(ConfigError, match=r"'lra' is not a method of this study; did you mean 'lora'"):
        tables.choose_reference(["lora", "ewc"], "lra")


def test_settings_that_differ_between_methods_are_shown_and_within_a_method_told() -> None:
    cells = [cell(m, "1", s) for m in ("a", "b") for s in range(2)]
    rates = [0.1, 0.1, 0.2, 0.3]
    configs = [
        (c, {"seed": c.seed, "training": {"learning_rate": rate, "epochs": 3, "warmup": 0}, "tuner": {"options": {}}})
        for c, rate in zip(cells, rates, strict=True)
    ]
    found = tables.settings_of(configs, ["a", "b"])
    assert found.rows == [
        ("training.learning_rate", {"a": "0.1", "b": "0.2 / 0.3"}),
        ("training.epochs", {"a": "3", "b": "3"}),
    ]
    assert found.notes == [
        "b: its runs differ in training.learning_rate (0.2 in 1, 0.3 in 1), so their mean is one over different settings."
    ]


def test_docstring_examples() -> None:
    result = doctest.testmod(tables)
    assert result.attempted > 0
    assert result.failed == 0


def test_variants_of_one_method_stand_under_their_own_names() -> None:
    results = {"method": "keeplora++", "tasks": ["x"], "metrics": {"last": 1.0}}
    cells = [
        StudyCell(name, "1", 0, "finished", Path("nowhere"), Run(Path("nowhere"), results))
        for name in ("keeplora++", "sketched", "gamma 1")
    ]
    titles = [row.title for row in tables.summarise(cells, name="s").methods]
    assert titles == ["KeepLoRA++", "sketched", "gamma 1"]
