"""The ledger and save_pretrained: bit-exact, whole or not at all, and whatever was changed is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel

from keeplora import ContinualLearner
from keeplora.errors import LedgerError
from keeplora.tuner import Ledger
from keeplora.tuner import ledger as ledger_module
from keeplora.tuner import persistence as persistence_module
from keeplora.tuner.persistence import concatenated
from tests.tuner.blocks import Samples, config, learn, loader, loss_fn, make_net, same, train, weights

X = Samples(6, 4).x


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A learner of three tasks (the last one with shrunk ranks) and the folder it was saved to."""
    learner = ContinualLearner(
        make_net(), config(keep_covariance=True, lora_alpha=7, r={"default": 5}), base_name="net"
    )
    outputs = []
    for i, name in enumerate(("First task", "second / task", "third")):
        learner.start_task(name, loader(seed=i), loss_fn, info={"classes": ["a", "b", "ü"]})
        train(learner.model, loader(seed=i))
        learner.finish_task(tensors={"head": torch.randn(2, 3)}, info={"seconds": {"training": 0.5}})
        with torch.no_grad():
            outputs.append(learner.model.eval()(X))
    folder = learner.save_pretrained(tmp_path_factory.mktemp("saved") / "out")
    return learner, folder, outputs


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def test_records_come_back_bit_for_bit(saved):
    learner, folder, _ = saved
    found = Ledger.open(folder / "ledger").records()
    assert [r.name for r in found] == ["First task", "second / task", "third"]
    for a, b in zip(found, learner.records, strict=True):
        assert a.factors.keys() == b.factors.keys()
        for name in a.factors:
            assert torch.equal(a.factors[name].A, b.factors[name].A)
            assert torch.equal(a.factors[name].B, b.factors[name].B)
            assert a.factors[name].s == b.factors[name].s
        assert all(same(getattr(a, kind), getattr(b, kind)) for kind in ("basis", "covariance", "tensors", "full"))
        assert b.covariance
        assert b.tensors
        assert (a.explained, a.trace, a.used, a.info) == (b.explained, b.trace, b.used, b.info)


def test_from_pretrained_gives_the_same_bits(saved):
    learner, folder, outputs = saved
    again = ContinualLearner.from_pretrained(folder, make_net())
    assert same(weights(again.model), weights(learner.model))
    assert same(again.U, learner.U)
    assert again.config == learner.config
    assert again.targets == learner.targets
    assert again.base_name == "net"
    with torch.no_grad():
        assert torch.equal(again.model.eval()(X), outputs[-1])
    assert again.audit().to_dict() == learner.audit().to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_goes_on_with_the_same_numbers(dtype, tmp_path):
    """Two tasks in one go, and one task, a new process's worth of forgetting, and the other: the same bits."""
    cast = lambda m, b: loss_fn(m, (b[0].to(dtype), b[1]))  # noqa: E731

    def one(learner, name, seed):
        with learner.task(name, loader(seed=seed), cast) as model:
            torch.manual_seed(seed)  # dropout
            train(model, loader(seed=seed), loss=cast)

    straight = ContinualLearner(make_net(dtype=dtype), config())
    one(straight, "a", 0)
    one(straight, "b", 1)
    first = ContinualLearner(make_net(dtype=dtype), config(), ledger=tmp_path / "ledger")
    one(first, "a", 0)
    resumed = ContinualLearner.from_pretrained(tmp_path / "ledger", make_net(dtype=dtype), append=True)
    one(resumed, "b", 1)
    assert same(weights(resumed.model), weights(straight.model))
    assert same(resumed.U, straight.U)
    once_more = ContinualLearner.from_pretrained(tmp_path / "ledger", make_net(dtype=dtype))
    assert [r.name for r in once_more.records] == ["a", "b"]
    assert same(weights(once_more.model), weights(straight.model))


def test_without_append_the_ledger_is_left_alone(saved, folder):
    again = ContinualLearner.from_pretrained(folder, make_net())
    learn(again, "fourth", 8)
    assert len(Ledger.open(folder / "ledger").records()) == 3


def test_other_base_model_is_refused(folder):
    other = make_net(seed=1)
    before = weights(other)
    with pytest.raises(
        LedgerError, match=r"belongs to another base model \(net\).*load the untouched base model first"
    ):
        ContinualLearner.from_pretrained(folder, other)
    assert same(weights(other), before)
    with pytest.raises(LedgerError, match="another base model"):  # the same numbers, rounded: another model
        ContinualLearner.from_pretrained(folder, make_net(dtype=torch.bfloat16))
    learned = ContinualLearner.from_pretrained(folder, make_net()).model
    with pytest.raises(LedgerError, match="load the untouched base model first"):
        ContinualLearner.from_pretrained(folder, learned)


def record(folder, index):
    (found,) = (folder / "ledger").glob(f"{index:04d}-*")
    return found


def refused(folder, file, text=""):
    net = make_net()
    before = weights(net)
    with pytest.raises(LedgerError) as error:
        ContinualLearner.from_pretrained(folder, net)
    assert str(file) in str(error.value)
    assert text in str(error.value)
    assert same(weights(net), before)


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize("key", ["s", "explained", "used"])
def test_changed_record_is_named(folder, index, key):
    file = record(folder, index) / "record.json"
    value = json.loads(file.read_text())
    value["layers"]["encoder.layers.0.q"][key] = 1
    file.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    refused(folder, file, "changed after it was written")


def test_changed_head_is_named(folder):
    file = folder / "ledger" / "ledger.json"
    file.write_text(file.read_text().replace('"gamma": 0.2', '"gamma": 0.3'))
    refused(folder, file, "changed after it was written")


@pytest.mark.parametrize("where", ["base", 1, 3])
@pytest.mark.parametrize("offset", [0.02, 0.5, 0.999])
def test_flipped_bit_in_a_tensor_file_is_named(folder, where, offset):
    file = folder / "ledger" / "base.safetensors" if where == "base" else record(folder, where) / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[int(offset * len(data))] ^= 1
    file.write_bytes(data)
    refused(folder, file, "SHA-256")


def test_cut_off_files_are_named(folder):
    file = record(folder, 2) / "record.json"
    file.write_text(file.read_text()[:40])
    refused(folder, file, "not readable JSON")
    shutil.rmtree(folder / "ledger" / "0002-second-task")
    refused(folder, folder / "ledger", "record 0002 is missing before 0003-third")


@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
def test_missing_file_is_named(folder, name):
    file = record(folder, 2) / name
    file.unlink()
    refused(folder, file, "is missing")


def test_reordered_records_are_refused(folder):
    ledger = folder / "ledger"
    (ledger / "0002-second-task").rename(ledger / "swap")
    (ledger / "0003-third").rename(ledger / "0002-third")
    (ledger / "swap").rename(ledger / "0003-second-task")
    refused(folder, ledger / "0002-third" / "record.json", "does not follow the record before it")


def test_record_of_another_ledger_is_refused(folder, tmp_path):
    learner = ContinualLearner(make_net(), config(r=2), ledger=tmp_path / "other")
    learn(learner, "third", 0)
    learn(learner, "x", 1)
    learn(learner, "third one", 2)
    shutil.rmtree(record(folder, 3))
    shutil.copytree(tmp_path / "other" / "0003-third-one", folder / "ledger" / "0003-third-one")
    refused(folder, folder / "ledger" / "0003-third-one" / "record.json", "does not follow")


@pytest.mark.parametrize("file", ["ledger.json", "0002-second-task/record.json"])
def test_newer_format_is_refused(folder, file):
    path = folder / "ledger" / file
    value = json.loads(path.read_text())
    value["version"] = 7
    path.write_text(json.dumps(value))
    refused(folder, path, "has format version 7; this keeplora reads up to version 1: upgrade keeplora")


def test_folder_that_is_no_ledger(tmp_path):
    with pytest.raises(LedgerError, match="is not a folder"):
        ContinualLearner.from_pretrained(tmp_path / "nothing", make_net())
    with pytest.raises(LedgerError, match="holds no run and no ledger"):
        ContinualLearner.from_pretrained(tmp_path, make_net())
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(LedgerError, match="is not a keeplora ledger"):
        ContinualLearner.from_pretrained(tmp_path, make_net())


@pytest.mark.parametrize("module", [ledger_module, persistence_module], ids=["ledger", "adapters"])
@pytest.mark.parametrize("after", [0, 1])
def test_save_that_fails_midway_leaves_nothing(saved, tmp_path, monkeypatch, module, after):
    learner, _, _ = saved
    real, calls = module.save_file, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        learner.save_pretrained(tmp_path / "out")
    assert len(calls) == after + 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    learner.save_pretrained(tmp_path / "out")


def test_folders_are_never_written_over(saved, tmp_path):
    learner, folder, _ = saved
    with pytest.raises(LedgerError, match="is not empty"):
        learner.save_pretrained(folder)
    with pytest.raises(LedgerError, match="exists already"):
        ContinualLearner(make_net(), config(), ledger=folder / "ledger")
    (tmp_path / "empty").mkdir()
    assert (learner.save_pretrained(tmp_path / "empty") / "ledger" / "ledger.json").is_file()


def test_adapters_load_in_stock_peft_with_equal_outputs(saved):
    """Task by task on top of one another; ranks differ between layers, and so do the scales that were folded into B."""
    learner, folder, outputs = saved
    folders = sorted((folder / "adapters").iterdir())
    assert [f.name for f in folders] == ["0001-first-task", "0002-second-task", "0003-third"]
    ranks = {f.A.shape[0] for f in learner.records[2].factors.values()}
    assert len(ranks) > 1, "no rank shrank: the test shows too little"
    model = make_net()
    for path, expected in zip(folders, outputs, strict=True):
        peft_model = PeftModel.from_pretrained(model, path).eval()
        with torch.no_grad():
            got = peft_model(X)
        assert float((got - expected).abs().max()) <= 1e-5
        model = peft_model.merge_and_unload()
        values = json.loads((path / "adapter_config.json").read_text())
        assert values["init_lora_weights"] is True  # what old and new servers read alike
        assert values["lora_alpha"] == values["r"]


def test_all_tasks_as_one_adapter_are_exact(saved):
    learner, _, _ = saved
    for name, f in concatenated(learner.records).items():
        total = sum(r.factors[name].delta.double() for r in learner.records if name in r.factors)
        assert float((f.delta.double() - total).norm()) <= 1e-6 * float(total.norm())
