"""What of a ledger may leave the machine, piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import HubError
from keeplora.experiment.portable import (
    check_clean,
    is_learned,
    portable_name,
    portable_records,
    without_paths,
    write_portable,
)
from keeplora.methods import get_method, method_names
from keeplora.tuner import TaskRecord
from keeplora.tuner.ledger import Ledger
from tests.tuner.blocks import config, learn, make_net


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/models/clip", "clip"),
        ("/home/ann/models/clip/", "clip"),
        ("~/models/clip", "clip"),
        ("C:\\Users\\ann\\clip", "clip"),
        ("\\\\server\\share\\clip", "clip"),
        ("no file /data/x/y.png, sample 3", "no file y.png, sample 3"),
        ("'/a/b' and \"/c/d\"", "'b' and \"d\""),
        ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("50 / 50, and/or, 3/4", "50 / 50, and/or, 3/4"),
        ("a photo of a {}.", "a photo of a {}."),
    ],
)
def test_paths_are_cut_and_nothing_else_is(text, expected):
    assert without_paths({"why": [text]}) == {"why": [expected]}
    assert without_paths({"classes": [text], "templates": [text], "prompt": text}) == {
        "classes": [text], "templates": [text], "prompt": text,
    }  # fmt: skip


def test_names_of_models(tmp_path):
    (tmp_path / "models/clip").mkdir(parents=True)
    assert portable_name(str(tmp_path / "models/clip")) == "clip"
    assert portable_name("models/clip", tmp_path) == "clip"  # beside the configuration
    assert portable_name("models/clip") == "models/clip"  # a name on the hub, for all that is known
    assert portable_name("/gone/away/clip") == "clip"
    assert portable_name("embedded") == "embedded"


def test_every_method_s_tensors_are_decided():
    """A method that keeps something new must be looked at: is it learned, or is it data?"""
    import inspect
    import re

    named = set()
    for name in method_names():
        text = Path(inspect.getfile(get_method(name).learner)).read_text(encoding="utf-8")
        named |= set(re.findall(r'"((?:[a-z_]+/)+)(?:\{|")', text)) | set(re.findall(r'"(rail/\w+)"', text))
    decided = {name: is_learned(name + "x" if name.endswith("/") else name) for name in named}
    assert {name for name, learned in decided.items() if learned} == {
        "fisher/", "reglora/", "moelora/", "rail/G", "rail/C", *(n for n in named if n.startswith("sd_lora/")),
    }  # fmt: skip
    assert {name for name, learned in decided.items() if not learned} == {
        "replay/", "replay/text/", "replay/samples/", "rail/", "rail/features", "rail/labels",
        "average/",  # of a checkpoint: no record holds it
    }  # fmt: skip


def test_records_are_left_as_they_are_where_nothing_is_to_be_hidden():
    record = TaskRecord("a", tensors={"head": torch.ones(2, 2)}, info={"classes": ["x", "y"], "model": "me/net"})
    (clean,), left_out = portable_records([record], "me/net", False)
    assert left_out == []
    assert clean.info == record.info
    assert clean.tensors is not record.tensors
    assert torch.equal(clean.tensors["head"], record.tensors["head"])


def test_a_rewritten_ledger_is_whole_and_opens(tmp_path):
    learner = learn(learn(ContinualLearner(make_net(), config(), base_name="/home/ann/net"), "a", 1), "b", 2)
    learner.save_pretrained(tmp_path / "saved")
    left_out = write_portable(Ledger.open(tmp_path / "saved/ledger"), tmp_path / "out", "net")
    again = ContinualLearner.from_pretrained(tmp_path / "out", make_net())
    assert left_out == []  # no task tells a path; the base's name was one
    assert again.base_name == "net"
    for mine, theirs in zip(learner.records, again.records, strict=True):
        assert all(
            torch.equal(f.B, theirs.factors[n].B) and f.s == theirs.factors[n].s for n, f in mine.factors.items()
        )
        assert mine.explained == theirs.explained
        assert mine.trace == theirs.trace
        assert mine.info == theirs.info
    assert all(torch.equal(U, again.U[name]) for name, U in learner.U.items())


def test_a_damaged_ledger_is_not_published(tmp_path):
    from keeplora.errors import LedgerError

    learn(ContinualLearner(make_net(), config(), base_name="me/net"), "a", 1).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/ledger/0001-a/tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(LedgerError, match="SHA-256"):
        write_portable(Ledger.open(tmp_path / "saved/ledger"), tmp_path / "out", "me/net")


def test_what_lies_beside_the_ledger_is_not_copied(tmp_path):
    learn(ContinualLearner(make_net(), config(), base_name="me/net"), "a", 1).save_pretrained(tmp_path / "saved")
    own = sorted(p.relative_to(tmp_path / "saved/ledger").as_posix() for p in (tmp_path / "saved/ledger").rglob("*"))
    assert {"0001-a/record.json", "0001-a/tensors.safetensors", "base.safetensors", "ledger.json"} < set(own)
    (tmp_path / "saved/ledger/notes.txt").write_text("mine")
    (tmp_path / "saved/ledger/0001-a/.hidden").write_text("mine")
    (tmp_path / "saved/ledger/.0002-b.part").mkdir()
    write_portable(Ledger.open(tmp_path / "saved/ledger"), tmp_path / "out", "me/net")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")) == own


def test_the_last_look(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").write_text('{"x": "/home/annette/y and http://h/home/ann"}')
    check_clean(tmp_path, ["/home/ann", "/"])
    with pytest.raises(HubError, match=r"merged/config.json would tell a path of this machine \(/home/annette\)"):
        check_clean(tmp_path, ["/home/annette"])
    with pytest.raises(HubError, match="looks like a token"):
        check_clean(tmp_path, [], ["annette"])
