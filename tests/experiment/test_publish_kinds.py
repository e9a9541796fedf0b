"""Publishing where the method leaves no factors or keeps samples, where the model answers in words, or the loop is one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from published import ADAPTER, features, held, pictures, run_card, tells
from safetensors.torch import load, load_file

from keeplora import ContinualLearner, Experiment, TrainedModel, publish
from keeplora.errors import HubError, LedgerError
from keeplora.experiment.card_facts import Told
from keeplora.experiment.publish import write_repository
from keeplora.models import load_model
from tests.fake_hub import TOKEN
from tests.models.tiny import make_tiny
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


# ---- other methods and models -----------------------------------------------------------------------------------------


def test_whole_weights_have_no_adapter_and_say_so(hub, world, base):
    path, _ = world.run(method="full-ft")
    publish(path, "me/whole", base_model=base, merged=True)
    files = held(hub, "me/whole")
    assert not ADAPTER & set(files)
    card = files["README.md"].decode()
    assert "There is no adapter for `peft` here: the method leaves whole weights" in card
    assert "This method protects no subspace" in card
    assert ModelCard(card).data.library_name == "keeplora"
    out = run_card(card)
    trained = features(TrainedModel(path, device="cpu").family.model)
    torch.testing.assert_close(features(out["merged"]), trained, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features(out["learner"].model), trained, atol=1e-6, rtol=1e-5)
    assert not out["learner"].protects


def test_pictures_for_replay_stay_here(hub, world, base):
    path, _ = world.run(method="replay")
    publish(path, "me/replay", base_model=base)
    files = held(hub, "me/replay")
    names = {
        name for k, v in files.items() if k.startswith("ledger/") and k.endswith(".safetensors") for name in load(v)
    }
    assert any(name.startswith("extra/replay") for name in ledger_names(path))
    assert not any("replay" in name for name in names)
    card = files["README.md"].decode()
    assert "Left out: what the method keeps of its training data (replay), so going on here does without it" in card
    assert "samples of the training data**" not in card
    out = run_card(card)
    trained = features(TrainedModel(path, device="cpu").family.model)
    torch.testing.assert_close(features(out["learner"].model), trained, atol=1e-6, rtol=1e-5)
    assert out["learner"].memories() == []


def ledger_names(run: Path) -> set[str]:
    return {name for file in (run / "ledger").rglob("*.safetensors") for name in load_file(file)}


def test_pictures_for_replay_go_along_where_that_is_said(hub, world, base):
    path, _ = world.run(method="replay")
    publish(path, "me/replay", base_model=base, with_samples=True)
    files = held(hub, "me/replay")
    names = {
        name for k, v in files.items() if k.startswith("ledger/") and k.endswith(".safetensors") for name in load(v)
    }
    assert names == ledger_names(path)
    assert "**`ledger/` holds samples of the training data**" in files["README.md"].decode()


def test_a_method_that_answers_with_its_training_data(hub, world):
    path, _ = world.run(method="rail-dual")
    with pytest.raises(HubError, match=r"task 'paint': the method answers with its training data \(rail/features\)"):
        publish(path, "me/rail")
    assert hub.repos == {}
    publish(path, "me/rail", with_samples=True)
    card = held(hub, "me/rail")["README.md"].decode()
    assert "no adapter for `peft` here: the method answers through a regression beside the model" in card


def test_nothing_learned_is_nothing_to_publish(hub, world):
    path, _ = world.run(method="zero-shot")
    with pytest.raises(HubError, match="nothing was learned yet"):
        publish(path, "me/nothing")
    assert hub.requests == []


def test_a_generative_run(hub, tmp_path):
    from generation_world import make_world
    from transformers import LlavaForConditionalGeneration

    path = tmp_path / "run"
    Experiment({**make_world(tmp_path), "output": str(path)}, quiet=True).run()
    hub.add("tiny/llava", tmp_path / "model")
    publish(path, "me/asked", base_model="tiny/llava", merged=True)
    files = held(hub, "me/asked")
    assert not [k for k in files if k.split("/")[0] in ("predictions", "samples", "judgements.jsonl", "config.yaml")]
    assert tells(files, str(tmp_path), "What colour is it?", "Is it red?") == []
    card = files["README.md"].decode()
    data = ModelCard(card).data
    assert data.pipeline_tag == "image-text-to-text"
    assert {(e.dataset_name, e.metric_type) for e in data.eval_results or []} == {
        ("colours", "exact"),
        ("answers", "exact"),
    }
    assert "| MFN |" in card
    assert "questions (exact)" in card
    out = run_card(card)
    model = TrainedModel(path, device="cpu")
    name = next(iter(model.learner.records[0].factors))
    W = model.family.model.get_submodule(name).weight
    torch.testing.assert_close(out["learner"].model.get_submodule(name).weight, W, atol=1e-6, rtol=1e-5)
    assert isinstance(out["merged"], LlavaForConditionalGeneration)
    torch.testing.assert_close(out["merged"].get_submodule(name).weight, W, atol=1e-6, rtol=1e-5)
    x = torch.randn(2, W.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(
            out["model"].base_model.model.get_submodule(name)(x), model.family.model.get_submodule(name)(x), atol=1e-5, rtol=1e-4
        )  # fmt: skip


# ---- people with a loop of their own -----------------------------------------------------------------------------------


def test_a_learner_pushes_itself(hub):
    learner = learn(learn(ContinualLearner(make_net(), config()), "a", 1), "b", 2)
    x = next(iter(loader(seed=7)))[0]
    with torch.no_grad():
        expected = learner.model.eval()(x)
    done = learner.push_to_hub("me/net", private=True, licence="apache-2.0")
    assert hub.repos["me/net"].private
    assert done.commit == hub.repos["me/net"].branches["main"]
    again = ContinualLearner.from_pretrained("me/net", make_net())
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(x), expected, atol=1e-6, rtol=1e-5)
    from peft import PeftModel

    stock = PeftModel.from_pretrained(make_net(), "me/net").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(x), expected, atol=1e-5, rtol=1e-4)
    card = held(hub, "me/net")["README.md"].decode()
    assert "on the untouched base model, a `Net`" in card
    assert "No results came with this ledger" in card
    out = run_card(card, base=make_net())
    assert len(out["learner"].records) == 2
    learn(again, "c", 3)
    assert again.audit().passed


def test_a_removed_task_leaves_its_directions_alone(hub, tmp_path):
    learner: Any = ContinualLearner(make_net(), config(), base_name="/home/ann/net", ledger=tmp_path / "run/ledger")
    for i, name in enumerate("abcd"):
        learn(learner, name, i)
    learner.remove("b")
    learner.remove("d")
    x = next(iter(loader(seed=7)))[0]
    with torch.no_grad():
        expected = learner.model.eval()(x)
    publish(tmp_path / "run", "me/net")
    files = held(hub, "me/net")
    kinds = {
        k.split("/")[1]: {n.split("/")[0] for n in load(v)}
        for k, v in files.items()
        if k.endswith("/tensors.safetensors")
    }
    directions = {"basis", "values"}
    assert kinds == {"0001-a": {"A", "B"} | directions, "0002-b": directions, "0003-c": {"A", "B"} | directions}
    assert "Taken out again: b." in files["README.md"].decode()
    again: Any = ContinualLearner.from_pretrained("me/net", make_net())
    assert [record.name for record in again.records] == ["a", "c"]
    with torch.no_grad():
        assert torch.equal(again.model.eval()(x), expected)
    assert all(torch.equal(U, again.U[name]) for name, U in learner.U.items())
    learn(again, "e", 9)
    assert again.audit().passed


def test_modules_trained_in_full_go_into_the_adapter(hub):
    from peft import PeftModel

    learner = learn(ContinualLearner(make_net(), config(free_modules=["head"])), "a", 1)
    x = next(iter(loader(seed=7)))[0]
    with torch.no_grad():
        expected = learner.model.eval()(x)
    learner.push_to_hub("me/free")
    stock = PeftModel.from_pretrained(make_net(), "me/free").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(x), expected, atol=1e-5, rtol=1e-4)


def test_modules_trained_in_full_need_the_learner(hub, tmp_path):
    learn(ContinualLearner(make_net(), config(free_modules=["head"])), "a", 1).save_pretrained(tmp_path / "saved")
    publish(tmp_path / "saved", "me/free")
    files = held(hub, "me/free")
    assert not ADAPTER & set(files)
    assert "trains modules in full" in files["README.md"].decode()
    assert len(ContinualLearner.from_pretrained("me/free", make_net()).records) == 1


def test_the_learner_s_model_merged(hub, world):
    model = load_model(world.model).model
    targets = ["vision_model.encoder.layers.1.self_attn.q_proj"]
    learner = ContinualLearner(model, config(target_modules=targets))
    batches = [pictures()]

    def loss(m, x):
        out = m.get_image_features(pixel_values=x)
        return getattr(out, "pooler_output", out).square().mean(-1)

    with learner.task("a", batches, loss) as adapted:
        train(adapted, batches, loss=lambda m, x: loss(m, x).mean())
    learner.push_to_hub("me/merged", merged=True)
    from transformers import CLIPModel

    torch.testing.assert_close(features(CLIPModel.from_pretrained("me/merged", subfolder="merged")), features(model))


def test_what_cannot_be_merged_says_why(hub, tmp_path, world):
    learner = learn(ContinualLearner(make_net(), config()), "a", 1)
    learner.save_pretrained(tmp_path / "saved")
    for source, says in ((tmp_path / "saved", "has no base model at hand"), (learner, "has no base model at hand"),
                         (world.run(method="rail-dual")[0], "--merged: the method answers through a regression")):  # fmt: skip
        with pytest.raises(HubError, match=says):
            publish(source, "me/x", merged=True, with_samples=True)
    assert hub.repos == {}


def test_tensors_that_nobody_vouches_for_stay_here(hub):
    learner = ContinualLearner(make_net(), config(keep_covariance=True))
    batches = loader(seed=1)
    with learner.task("a", batches, loss_fn) as model:
        train(model, batches)
    learner.records[0].tensors["mine/memory"] = torch.ones(3)
    learner.push_to_hub("me/net")
    files = held(hub, "me/net")
    names = set(load(files["ledger/0001-a/tensors.safetensors"]))
    assert not any(name.startswith(("extra/", "covariance/")) for name in names)
    card = files["README.md"].decode()
    assert "training data (mine)" in card
    assert "covariances" in card
    learner.push_to_hub("me/net", with_samples=True)
    names = set(load(held(hub, "me/net")["ledger/0001-a/tensors.safetensors"]))
    assert "extra/mine/memory" in names
    assert any(name.startswith("covariance/") for name in names)


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrstuvwxyz", "sk-proj-0123456789abcdef", TOKEN])
def test_a_secret_in_the_ledger_stops_the_push(hub, secret):
    learner = ContinualLearner(make_net(), config())
    learn(learner, "a", 1, info={"note": f"key {secret}"})
    with pytest.raises(HubError, match=r"ledger/0001-a/record.json would tell what looks like a token") as caught:
        learner.push_to_hub("me/net")
    assert secret not in str(caught.value)
    assert hub.requests == []


def test_a_path_that_hides_in_a_name_stops_the_push(hub):
    learner = ContinualLearner(make_net(), config())
    learn(learner, "a", 1, info={"classes": [f"see {Path.home()}"]})  # classes are the model's words and never touched
    with pytest.raises(HubError, match=r"would tell a path of this machine"):
        learner.push_to_hub("me/net")
    assert hub.requests == []


def test_bad_words(hub, world, tmp_path):
    path, _ = world.run()
    with pytest.raises(HubError, match="--base-model '/models/clip' is not a name on the hub"):
        publish(path, "me/three", base_model="/models/clip")
    (tmp_path / "there").mkdir()
    with pytest.raises(HubError, match="exists already"):
        write_repository(path, tmp_path / "there", "me/three", Told())
    with pytest.raises(LedgerError, match="is not a folder"):
        publish(tmp_path / "nowhere", "me/three")
    assert hub.requests == []


def test_a_push_that_fails_leaves_nothing_behind(hub, world, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(p for p in world.run()[0].rglob("*"))
    hub.owners.clear()
    with pytest.raises(HubError, match="403"):
        publish(world.run()[0], "me/three")
    assert list(tmp_path.iterdir()) == []
    assert sorted(p for p in world.run()[0].rglob("*")) == before


def test_the_embedded_model_has_a_loader_of_its_own(hub, tmp_path, monkeypatch, world):
    from keeplora.models import assets

    folder = make_tiny("embedded", tmp_path / "embedded")
    monkeypatch.setattr(assets, "embedded_path", lambda: folder)
    path = tmp_path / "run"
    Experiment({**world.config(), "model": "embedded", "output": str(path)}, quiet=True).run()
    publish(path, "me/embedded", merged=True)
    card = held(hub, "me/embedded")["README.md"].decode()
    assert ModelCard(card).data.base_model is None
    assert 'load_model("embedded")' in card
    out = run_card(card)
    model = TrainedModel(path, device="cpu").family.model
    with torch.no_grad():
        expected = model.get_image_features(pictures(28))
        for found in (out["model"], out["learner"].model, out["merged"]):
            torch.testing.assert_close(found.eval().get_image_features(pictures(28)), expected, atol=1e-5, rtol=1e-4)
