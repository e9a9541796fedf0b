"""Every file of a ledger × every kind of change: refused with a sentence that names the place, or it made no difference."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keeplora import ContinualLearner
from keeplora.errors import LedgerError
from keeplora.tuner import Ledger
from keeplora.tuner.ledger_check import verify
from tests.tuner.blocks import config, learn, make_net, same, weights
from tests.tuner.forge import edit, edit_tensors, entry, hash_anew

LAYER = "encoder.layers.1.up"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three tasks, one removed and purged, a rollback and the way back: every kind of file there is."""
    path = tmp_path_factory.mktemp("tampering") / "ledger"
    learner = ContinualLearner(make_net(), config(keep_covariance=True), ledger=path, base_name="net")
    for i, name in enumerate(("a", "b", "c")):
        learn(learner, name, i)
    ledger = Ledger.open(path)
    ledger.write_metrics(1, {"score": 50.0})
    ledger.remove("b")
    ledger.purge("b")
    ledger.rollback(4)
    return path, weights(ContinualLearner.from_pretrained(path, make_net()).model)


@pytest.fixture
def ledger(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "ledger")


FILES = (
    "ledger.json", "base.safetensors", "HEAD.json", "0001-a/record.json", "0001-a/tensors.safetensors",
    "0001-a/metrics.json", "0003-c/tensors.safetensors", "0004-remove-b/record.json", "0005-purge-b/record.json",
    "0005-purge-b/tensors.safetensors", "0006-rollback-remove-b/record.json",
)  # fmt: skip


def refused(ledger, place="", text=""):
    """Both by who opens it and by who verifies it, or by the latter alone; no weight moves."""
    net = make_net()
    before = weights(net)

    def both():
        verify(Ledger.open(ledger))
        ContinualLearner.from_pretrained(ledger, net)

    with pytest.raises(LedgerError) as error:
        both()
    assert str(place) in str(error.value)
    assert text in str(error.value)
    assert "\n" not in str(error.value).strip()
    assert same(weights(net), before)
    return str(error.value)


def test_the_files_are_all_there(made):
    found = {str(p.relative_to(made[0])) for p in made[0].rglob("*") if p.is_file()}
    rollback = entry(made[0], 6).name
    named = {f.replace("0006-rollback-remove-b", rollback) for f in FILES}
    assert found == named | {"0002-b/record.json", "0003-c/record.json"}
    assert len(verify(Ledger.open(made[0]))) > 10


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["gone", "empty", "cut", "link", "folder", "garbage", "foreign"])
def test_every_file_and_every_change(ledger, file, how, tmp_path):
    path = entry(ledger, 6) / "record.json" if file.startswith("0006") else ledger / file
    data = path.read_bytes()
    if how == "link":  # the contents are right, but somebody else may change them
        shutil.move(path, tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", path)
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how in ("empty", "cut", "garbage"):
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"\xff\x00{" * 50}[how])
    elif how == "foreign":
        other = {".json": "0002-b/record.json", ".safetensors": "0003-c/tensors.safetensors"}[path.suffix]
        if file.startswith("0003"):
            other = "0001-a/tensors.safetensors"
        shutil.copy(ledger / other, path)
    if (file, how) == ("0001-a/metrics.json", "gone"):
        verify(Ledger.open(ledger))  # nothing has to have been measured
        return
    refused(ledger, path)


@given(place=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_refused_or_changes_nothing(made, tmp_path, place, where, bit):
    copy = tmp_path / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(made[0], copy)
    path = entry(copy, 6) / "record.json" if place.startswith("0006") else copy / place
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    net = make_net()
    try:
        verify(Ledger.open(copy))
        found = weights(ContinualLearner.from_pretrained(copy, net).model)
    except LedgerError as error:
        told = str(error)
    else:
        told = None
    if told is not None:
        assert str(copy) in told
        return
    assert path.suffix == ".json"  # white space
    assert json.loads(data) == json.loads((made[0] / path.relative_to(copy)).read_bytes())
    assert same(found, made[1])


def swap(a, b):
    def change(tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


TENSORS = {
    "NaN in A": (lambda t: t[f"A/{LAYER}"].__setitem__((0, 0), float("nan")), "holds NaN, infinity"),
    "infinity in B": (lambda t: t[f"B/{LAYER}"].__setitem__((0, 0), float("inf")), "holds NaN, infinity"),
    "NaN in the basis": (lambda t: t[f"basis/{LAYER}"].__setitem__((0, 0), float("nan")), "holds NaN, infinity"),
    "wrong width of A": (lambda t: t.update({f"A/{LAYER}": t[f"A/{LAYER}"][:, 1:]}), "but the layer asks for"),
    "wrong height of B": (lambda t: t.update({f"B/{LAYER}": t[f"B/{LAYER}"][1:]}), "but the layer asks for"),
    "another rank": (lambda t: t.update({f"A/{LAYER}": t[f"A/{LAYER}"][1:]}), "has rank"),
    "a vector": (lambda t: t.update({f"basis/{LAYER}": t[f"basis/{LAYER}"][:, 0]}), "but the layer asks for"),
    "whole numbers": (lambda t: t.update({f"A/{LAYER}": t[f"A/{LAYER}"].int()}), "other numbers than float32"),
    "values of another length": (lambda t: t.update({f"values/{LAYER}": t[f"values/{LAYER}"][1:]}), "tells of"),
    "values missing": (lambda t: t.pop(f"values/{LAYER}"), f"but no values/{LAYER}"),
    "layer missing": (lambda t: [t.pop(f"{k}/{LAYER}") for k in "AB"], "has rank"),
    "B missing": (lambda t: t.pop(f"B/{LAYER}"), "one factor"),
    "layer too many": (lambda t: t.update({"A/x": torch.ones(2, 3), "B/x": torch.ones(2, 3)}), "knows nothing"),
    "path as a layer": (lambda t: t.update({"basis/../../x": torch.ones(2, 3)}), "knows nothing"),
    "A swapped": (swap("A/encoder.layers.0.q", "A/encoder.layers.1.q"), "over the limit"),
    "bases swapped": (swap("basis/encoder.layers.0.q", "basis/encoder.layers.1.q"), "over the limit"),
    "A scaled row by row": (lambda t: t[f"A/{LAYER}"][0].mul_(1.1), "over the limit"),
    "A in the protected space": (
        lambda t: t[f"A/{LAYER}"].__setitem__(0, torch.nn.functional.normalize(torch.ones(12), dim=0)), "over the limit",
    ),
    "fewer directions": (
        lambda t: t.update({f"basis/{LAYER}": t[f"basis/{LAYER}"][:, 1:], f"values/{LAYER}": t[f"values/{LAYER}"][1:]}),
        "columns of U are used",
    ),
    "a direction without its worth": (lambda t: t.update({f"basis/{LAYER}": t[f"basis/{LAYER}"][:, 1:]}), "tells of"),
    "a foreign delta": (lambda t: t.update({f"delta/{LAYER}": torch.ones(2, 2)}), "but the layer asks for"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_contents_tell_against_a_forger_who_hashes_everything_anew(ledger, name):
    change, sentence = TENSORS[name]
    # Of the first task, which the second was learned behind: what it gave to U is relied on.
    edit_tensors(ledger / "0001-a/tensors.safetensors", change)
    hash_anew(ledger)
    if "over the limit" in sentence and "bases" not in name:
        ContinualLearner.from_pretrained(ledger, make_net())  # only a recomputation can tell
    with pytest.raises(LedgerError) as error:
        verify(Ledger.open(ledger))
    assert sentence in str(error.value)
    assert "0001-a" in str(error.value)


RECORDS = {
    "no layers": lambda v: v.pop("layers"),
    "layers a list": lambda v: v.update(layers=[1]),
    "a layer that is no object": lambda v: v["layers"].update({LAYER: 3}),
    "s a word": lambda v: v["layers"][LAYER].update(s="0.5"),
    "s missing": lambda v: v["layers"][LAYER].update(s=None),
    "rank a float": lambda v: v["layers"][LAYER].update(rank=1.5),
    "used a word": lambda v: v["layers"][LAYER].update(used="3"),
    "explained true": lambda v: v["layers"][LAYER].update(explained=True),
    "no name": lambda v: v.pop("name"),
    "name a number": lambda v: v.update(name=3),
    "info a list": lambda v: v.update(info=[]),
    "index a word": lambda v: v.update(index="1"),
    "another index": lambda v: v.update(index=2),
    "no base hash": lambda v: v.pop("base_hash"),
    "another base": lambda v: v.update(base_hash="0" * 64),
    "unknown kind": lambda v: v.update(kind="compact"),
    "an operation": lambda v: v.update(kind="remove", subject=9),
    "kind a number": lambda v: v.update(kind=1),
    "version true": lambda v: v.update(version=True),
    "version below zero": lambda v: v.update(version=-1),
    "another format": lambda v: v.update(format="zip"),
    "no hash of its tensors": lambda v: v.update(tensors_sha256=None),
    "purged by nobody": lambda v: v.update(purged=True),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_key_of_a_record_is_looked_at(ledger, name):
    file = ledger / "0001-a/record.json"
    edit(file, RECORDS[name])
    hash_anew(ledger)
    refused(ledger, ledger / "0001-a")


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (4, lambda v: v.update(subject=4)), (4, lambda v: v.update(subject="2")), (4, lambda v: v.pop("subject")),
        (5, lambda v: v.update(subject=1)), (6, lambda v: v.update(subject=3)), (6, lambda v: v.update(subject=99)),
        (6, lambda v: v.update(subject=-1)),
    ],
)  # fmt: skip
def test_operations_that_do_not_fit_are_named(ledger, index, change):
    file = entry(ledger, index) / "record.json"
    edit(file, change)
    hash_anew(ledger)
    refused(ledger, file)


HEADS = {
    "targets a word": lambda v: v.update(targets="all"),
    "a target without a name": lambda v: v["targets"][0].pop("name"),
    "a target that is none": lambda v: v["targets"].append(3),
    "a target less": lambda v: v["targets"].pop(),
    "no base": lambda v: v.pop("base"),
    "no hash": lambda v: v["base"].pop("hash"),
    "config a list": lambda v: v.update(config=[]),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_key_of_the_head_is_looked_at(ledger, name):
    edit(ledger / "ledger.json", HEADS[name])
    hash_anew(ledger)
    refused(ledger, ledger)


def test_a_config_of_later_times_is_one_sentence(ledger):
    edit(ledger / "ledger.json", lambda v: v["config"].update(surprise=1))
    hash_anew(ledger)
    with pytest.raises(LedgerError, match=r"its 'config' is not one of this keeplora .*surprise"):
        ContinualLearner.from_pretrained(ledger, make_net())


def test_json_that_is_none(ledger):
    file = ledger / "0001-a/record.json"
    for text in ("[" * 100_000, '{"a": NaN}', "[]", "3", '{"a": ' + "9" * 5000 + "}"):
        file.write_text(text)
        refused(ledger, file)


def test_the_end_cannot_be_cut_off(ledger):
    """Version 0 took a missing last record for a rollback."""
    shutil.rmtree(entry(ledger, 6))
    assert "record 0006 and what follows were deleted" in refused(ledger, ledger)
    shutil.rmtree(entry(ledger, 5))
    refused(ledger, ledger, "record 0005 and what follows were deleted")


def test_the_end_cannot_be_moved(ledger):
    edit(ledger / "HEAD.json", lambda v: v.update(entries=3))
    refused(ledger, ledger / "HEAD.json", "names 3 entries and there are 6")
    edit(ledger / "HEAD.json", lambda v: v.update(entries=5))
    refused(ledger, ledger / "HEAD.json", "names another record 0005")
    edit(ledger / "HEAD.json", lambda v: v.update(entries="six"))
    refused(ledger, ledger / "HEAD.json", "'entries' is of the wrong kind")
    (ledger / "HEAD.json").unlink()
    refused(ledger, ledger / "HEAD.json", "is missing: it says where the ledger ends")


def test_links_and_strange_folders(ledger, tmp_path):
    shutil.move(ledger / "0003-c", tmp_path / "c")
    os.symlink(tmp_path / "c", ledger / "0003-c")
    refused(ledger, ledger / "0003-c", "is a symbolic link")
    (ledger / "0003-c").unlink()
    shutil.move(tmp_path / "c", ledger / "0003-c")
    (ledger / "notes").mkdir()  # no entry
    verify(Ledger.open(ledger))
    shutil.copytree(ledger / "0003-c", ledger / "0003-d")
    refused(ledger, ledger, "record 0004 is missing before 0003-d")


def test_names_lead_nowhere(tmp_path):
    learner = ContinualLearner(make_net(), config(), ledger=tmp_path / "in" / "ledger")
    learn(learner, "../../../out", 0)
    learner.remove("../../../out")
    Ledger.open(tmp_path / "in" / "ledger").purge("../../../out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert sorted(p.name for p in (tmp_path / "in" / "ledger").iterdir() if p.is_dir()) == [
        "0001-out", "0002-remove-out", "0003-purge-out",
    ]  # fmt: skip


def test_metrics_belong_to_their_record(ledger):
    shutil.copy(ledger / "0001-a/metrics.json", ledger / "0003-c/metrics.json")
    refused(ledger, ledger / "0003-c/metrics.json", "belongs to another record")


def test_an_entry_that_was_sealed_anew_breaks_the_chain(ledger):
    edit(ledger / "0001-a/record.json", lambda v: v["info"].update(classes=["x"]))
    refused(ledger, ledger / "0002-b/record.json", "does not follow the record before it")


def test_the_last_entry_cannot_be_sealed_anew_either(ledger):
    edit(entry(ledger, 6) / "record.json", lambda v: v.update(time="1999-01-01T00:00:00+00:00"))
    refused(ledger, ledger / "HEAD.json", "names another record 0006 than is there")
