"""The three policies for a full layer, each to the very end of a stream that fills every layer; and the gauge on the way."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import CapacityError, KeepLoraError
from keeplora.tuner.capacity import Capacity, Forecast, LayerGauge, frozen_targets, gauge_ledger
from keeplora.tuner.ledger import Ledger
from tests.methods.lifecycle import make_learner
from tests.tuner.blocks import TARGETS, make_net, same, weights
from tests.tuner.stream import accuracy, batch, learn, logits, make_wide, settings

POLICIES = ("shrink", "freeze", "raise")
MOST = 12


class Stream:
    """A learner taught until it refuses, with what it said and how it answered when each task was learned."""

    def __init__(self, policy: str, folder) -> None:
        self.folder = folder
        self.learner = ContinualLearner(make_wide(), settings(when_full=policy), ledger=folder / "ledger")
        self.told, self.logits, self.accuracy, self.W = [], [], [], [self._weights()]
        self.refused: CapacityError | None = None
        for i in range(MOST):
            try:
                self.told.append(learn(self.learner, i))
            except CapacityError as error:
                self.refused = error
                self.before = weights(self.learner.model)
                self.learner.sit_out(f"task {i}", {"not_learned": str(error)})
                break
            self.logits.append(logits(self.learner, i))
            self.accuracy.append(accuracy(self.learner, i))
            self.W.append(self._weights())

    def _weights(self):
        return {t.name: self.learner.store.current(t.name).clone() for t in self.learner.targets}

    @property
    def learned(self):
        return [record for record in self.learner.records if "not_learned" not in record.info]


@pytest.fixture(scope="module", params=POLICIES)
def stream(request, tmp_path_factory):
    return Stream(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return {policy: Stream(policy, tmp_path_factory.mktemp(f"all-{policy}")) for policy in POLICIES}


def test_it_ends_because_it_is_full_and_in_a_sentence(stream):
    policy = stream.learner.config.when_full
    assert stream.refused is not None, "never full: the test shows nothing"
    assert len(stream.learned) >= 3
    left = {t.name: t.n_in - stream.learner.U.dims()[t.name] for t in stream.learner.targets}
    if policy == "raise":
        assert min(left.values()) < 3
        assert re.fullmatch(
            r"task 'task \d+' is not started \(when_full: raise\): \d of 4 targets have not the room for their rank: "
            r"blocks\.\d\.\w+ \(\d left, rank 3\).*; lower energy_features or energy_weights, lower r, or set when_full: "
            r"shrink or freeze",
            str(stream.refused),
        )
    else:
        assert max(left.values()) == 0
        assert ("no target has residual space left" if policy == "shrink" else "full and frozen") in str(stream.refused)


def test_old_tasks_are_answered_as_when_they_were_learned(stream):
    """Everything that a task uses is protected here (ε_f = 1), so nothing that comes later moves its outputs."""
    assert max(stream.accuracy) == 1.0
    assert min(stream.accuracy) > 1 / 3, "nothing was learned"
    for i, then in enumerate(stream.logits):
        assert accuracy(stream.learner, i) == stream.accuracy[i]
        assert float((logits(stream.learner, i) - then).abs().max()) <= 2e-5


def test_protected_inputs_of_every_layer_are_answered_as_before(stream):
    moved = 0
    for t in stream.learner.targets:
        for i in range(1, len(stream.W)):
            U, later = stream.learner.U.after(t.name, i), stream.W[-1][t.name] - stream.W[i][t.name]
            assert float((later @ U).norm()) <= 1e-5 * max(1.0, float(later.norm()))
            moved += float(later.norm()) > 1e-2
    assert moved >= 4, "hardly a layer learned anything after the first task: the test shows nothing"


def test_what_a_refused_task_leaves_is_nothing(stream):
    assert same(weights(stream.learner.model), stream.before)
    assert stream.learner._open is None
    last = stream.learner.records[-1]
    assert last.factors == {}
    assert last.used == stream.learner.U.dims()


def test_the_ledger_of_a_full_learner_opens(stream):
    again = ContinualLearner.from_pretrained(stream.folder, make_wide())
    assert same(weights(again.model), weights(stream.learner.model))
    assert same(again.U, stream.learner.U)
    assert again.audit().passed
    assert again.capacity().to_dict() == stream.learner.capacity().to_dict()
    assert gauge_ledger(Ledger.open(stream.folder / "ledger")).to_dict() == again.capacity().to_dict()
    with pytest.raises(CapacityError):
        again.start_task("one more", [batch(99)], lambda m, b: m(b[0]).sum())


def test_the_policies_agree_until_a_layer_is_full(streams):
    first = {name: s.learned for name, s in streams.items()}
    common = len(first["raise"])  # "raise" stops first
    assert common < len(first["shrink"])
    for i in range(common):
        for name in streams["shrink"].learner.U:
            deltas = [first[policy][i].factors.get(name) for policy in POLICIES]
            assert all(torch.equal(deltas[0].B, d.B) for d in deltas[1:])


def test_a_frozen_layer_is_never_adapted_again_and_goes_on_protecting(streams):
    s = streams["freeze"]
    frozen: set[str] = set()
    for record in s.learned:
        now = set(record.info.get("frozen", []))
        assert frozen <= now
        assert not now & set(record.factors)
        assert set(record.explained) == {t.name for t in s.learner.targets}
        frozen = now
    assert frozen
    assert frozen != {t.name for t in s.learner.targets}
    shrunk = streams["shrink"].learned[-1]
    assert set(shrunk.info["not_adapted"]) == frozen
    # Switched back, they stay frozen in what was learned and are adapted again by the new policy's rule alone.
    s.learner.config.when_full = "shrink"
    assert frozen_targets(s.learner, "x") == frozenset()
    s.learner.config.when_full = "freeze"


def test_a_layer_freezes_where_its_rank_does_not_fit_and_not_before():
    learner = ContinualLearner(make_wide(), settings(when_full="freeze", r={"default": 3}))
    learn(learner, 0)
    left = {t.name: t.n_in - learner.U.dims()[t.name] for t in learner.targets}
    smallest = min(left, key=left.get)
    learner.targets = [replace(t, r=left[smallest]) for t in learner.targets]
    assert frozen_targets(learner, "x") == frozenset()
    learner.targets = [replace(t, r=left[smallest] + 1) for t in learner.targets]
    expected = {t.name for t in learner.targets if left[t.name] < min(t.r, t.n_in, t.n_out)}
    assert frozen_targets(learner, "x") == expected
    assert smallest in expected
    learn(learner, 1)  # room for a lower rank is left in them, and is not taken
    assert set(learner.records[-1].info["frozen"]) == expected
    assert not expected & set(learner.records[-1].factors)


@pytest.mark.parametrize("method", ["gpm-lora", "inflora"])
@pytest.mark.parametrize("policy", ["freeze", "raise"])
def test_other_methods_that_protect_obey_the_policy(method, policy):
    options = {"options": {"eps_start": 1.0}} if method == "inflora" else {"energy_features": 1.0}
    learner = make_learner(method, make_wide(), ["up", "down"], when_full=policy, **options)
    frozen = set()

    def to_the_end() -> None:
        for i in range(MOST):
            learner.start_task(f"t{i}", [batch(i)], _loss)
            frozen.update(learner._open.info.get("frozen", []))
            assert not frozen & set(learner._open.adapter.targets)
            learner.finish_task()

    with pytest.raises(CapacityError, match=r"when_full|no target has residual space"):
        to_the_end()
    assert bool(frozen) == (policy == "freeze")


def _loss(model, item):
    return torch.nn.functional.cross_entropy(model(item[0]), item[1])


def test_methods_that_protect_nothing_have_no_policy_and_no_gauge():
    learner = make_learner("lora", make_net(), TARGETS, when_full="raise", max_basis_bytes=1)
    learner.start_task("a", [(torch.randn(4, 3, 12), torch.zeros(4, dtype=torch.long))], _loss)
    learner.abort_task()
    with pytest.raises(KeepLoraError, match="protects no subspace"):
        learner.capacity()


# ---- warnings -----------------------------------------------------------------------------------------------------------


def test_layers_are_named_before_they_are_full_and_once(stream):
    told = [line for lines in stream.told for line in lines if "no room for another" in line or "one more task" in line]
    assert told
    for t in stream.learner.targets:
        lines = [line for line in told if t.name in line]
        assert len(lines) == len(set(lines)) <= 2
    first = next(i for i, lines in enumerate(stream.told) if any("task like it" in line for line in lines))
    tight = next((i for i, r in enumerate(stream.learned) if r.info["not_adapted"] or r.info.get("frozen")), None)
    assert tight is None or first < tight
    assert f"(when_full: {stream.learner.config.when_full})" in told[0]


# ---- the gauge ----------------------------------------------------------------------------------------------------------


def gauge_of(width, used, wanted=2, growth=None, frozen=False):
    growth = tuple(b - a for a, b in itertools.pairwise(used)) if growth is None else growth
    return LayerGauge("x", "", 0, width, wanted, tuple(used), growth, frozen, (None,) * (len(used) - 1))


@pytest.mark.parametrize(("layer", "forecast", "state"), [
    (gauge_of(20, [2]), Forecast(None, None, None, 0), "free"),
    (gauge_of(20, [2, 6]), Forecast(4, 4, 4, 1), "free"),                    # starts at 14, 10, 6 and 2 left
    (gauge_of(20, [2, 8, 10]), Forecast(5, 2, 5, 2), "free"),
    (gauge_of(20, [2, 10, 17]), Forecast(1, 1, 1, 2), "last"),
    (gauge_of(20, [2, 19]), Forecast(0, 0, 0, 1), "tight"),
    (gauge_of(20, [2, 20]), Forecast(0, 0, 0, 1), "full"),
    (gauge_of(20, [2, 8, 8]), Forecast(None, 2, None, 2), "free"),           # the last task added nothing
    (gauge_of(20, [2, 8], frozen=True), Forecast(0, 0, 0, 1), "frozen"),
])  # fmt: skip
def test_forecast_of_a_layer(layer, forecast, state):
    assert layer.forecast == forecast
    assert layer.state == state


def test_the_forecast_is_what_happens_when_tasks_go_on_alike():
    """A simulation: as many tasks start with their rank free as the forecast says."""
    for width, start, growth, rank in [(30, 4, 3, 2), (17, 0, 5, 5), (12, 11, 1, 1), (40, 8, 7, 3)]:
        layer, used, fits = gauge_of(width, [start, start + growth], rank), start + growth, 0
        while width - used >= rank:
            fits, used = fits + 1, min(width, used + growth)
        assert layer.forecast.likely == fits


def test_first_half_and_all_of_the_layers():
    layers = tuple(gauge_of(w, [2, 6]) for w in (8, 12, 20, 40))  # one, two, four and nine more
    found = Capacity(layers, ("a",), "shrink", 100, None, ())
    assert [layer.forecast.likely for layer in layers] == [1, 2, 4, 9]
    assert [found.until(share).likely for share in (0, 0.5, 1)] == [1, 2, 9]
    endless = replace(found, layers=(*layers, gauge_of(20, [4, 4])))
    assert endless.until(1).likely is None
    assert endless.until(0).likely == 1


def test_gauge_table_and_json(streams):
    learner = streams["shrink"].learner
    found = learner.capacity()
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert value["used"] + value["left"] == sum(t.n_in for t in learner.targets)
    assert set(value["forecast"]) == {"first", "half", "all"}
    for row, t in zip(value["layers"], learner.targets, strict=True):
        assert (row["layer"], row["in"], row["used"][-1]) == (t.name, t.n_in, learner.U.dims()[t.name])
        assert row["used"][0] == learner.start_bases()[t.name].shape[1]
        assert len(row["used"]) == len(value["tasks"]) + 1
    text = str(found)
    assert repr(found) == text
    assert "\x1b" not in text  # readable without colour
    for t in learner.targets:
        assert re.search(rf"{re.escape(t.name)} +[▒█·]{{20}} +{t.n_in}/{t.n_in} +0 +3 +full +0 ", text)
    assert "100 %" in text


def test_the_bar_is_full_only_for_a_full_layer():
    texts = [
        str(Capacity((gauge_of(1000, [100, used]),), ("a",), "shrink", 1, None, ())) for used in (100, 500, 999, 1000)
    ]
    assert ["·" in text for text in texts] == [True, True, True, False]
    assert texts[1].count("█") == 8
    assert texts[1].count("▒") == 2
