"""Push, fetch elsewhere, use: what lies in the repository, what does not, and that it is the trained model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from published import ADAPTER, features, held, run_card, tells
from safetensors.torch import load
from torch import nn

from keeplora import ContinualLearner, TrainedModel, publish
from keeplora.errors import HubError, LedgerError
from keeplora.experiment.card_facts import Told, collect, open_source
from keeplora.models import load_model
from keeplora.report.card import Contents
from keeplora.tuner.ledger import Ledger
from tests.cli.tiny_world import TASKS, ledger_tensors, same_tensors
from tests.fake_hub import TOKEN
from tests.tuner.blocks import config, learn, make_net, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def pushed(hub, world, base):
    path, _ = world.run()
    done = publish(path, "me/three", licence="mit", languages=["en"], base_model=base)
    return path, done, held(hub, "me/three")


def test_the_repository_holds_this_and_nothing_else(pushed, hub, world):
    path, done, files = pushed
    ledger = {
        p.relative_to(path).as_posix() for p in (path / "ledger").rglob("*") if p.suffix in (".json", ".safetensors")
    }
    assert len(ledger) >= 2 + 2 * len(TASKS)
    assert set(files) == {"README.md", "figures/curves.png", *ledger, *ADAPTER}
    assert done.files == len(files)
    assert hub.repos["me/three"].messages[done.commit] == "3 tasks, with keeplora"
    assert tells(files, str(world.root), str(Path.home()), str(path), TOKEN) == []
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny/clip"
    assert Image.open(io.BytesIO(files["figures/curves.png"])).size[0] > 400


def test_the_ledger_is_the_run_s_but_for_the_path_of_its_base(pushed, tmp_path):
    path, _, files = pushed
    there = {k: load(v) for k, v in files.items() if k.startswith("ledger/") and k.endswith(".safetensors")}
    flat = {f"{k.split('/')[-2]}/{name}": t for k, tensors in there.items() for name, t in tensors.items()}
    assert same_tensors(flat, ledger_tensors(path))
    head, mine = (json.loads(x) for x in (files["ledger/ledger.json"], (path / "ledger/ledger.json").read_bytes()))
    assert head["base"] == {**mine["base"], "name": "tiny/clip"}
    for key in ("targets", "config", "versions", "tensors_sha256"):
        assert head[key] == mine[key]
    for i, name in enumerate(TASKS, 1):
        record, own = (json.loads(x) for x in (files[f"ledger/{i:04d}-{name}/record.json"],
                                               (path / f"ledger/{i:04d}-{name}/record.json").read_bytes()))  # fmt: skip
        assert record["info"] == {**own["info"], "model": "tiny/clip"}
        assert record["layers"] == own["layers"]


def test_a_ledger_without_paths_is_copied_byte_for_byte(hub, tmp_path):
    learner = learn(learn(ContinualLearner(make_net(), config(), base_name="me/net"), "a", 1), "b", 2)
    learner.save_pretrained(tmp_path / "saved")
    publish(tmp_path / "saved", "me/net-learned")
    mine = {
        p.relative_to(tmp_path / "saved").as_posix(): p.read_bytes() for p in (tmp_path / "saved/ledger").rglob("*.*")
    }
    mine = {k: v for k, v in mine.items() if (tmp_path / "saved" / k).is_file()}
    assert {k: v for k, v in held(hub, "me/net-learned").items() if k.startswith("ledger/")} == mine


def test_the_card_s_code_runs_and_opens_the_trained_model(pushed, hub):
    path, _, files = pushed
    trained = features(TrainedModel(path, device="cpu").family.model)
    out = run_card(files["README.md"].decode())
    torch.testing.assert_close(features(out["model"]), trained, atol=1e-5, rtol=1e-4)  # stock PEFT
    torch.testing.assert_close(features(out["learner"].model), trained, atol=1e-6, rtol=1e-5)
    assert [record.name for record in out["learner"].records] == list(TASKS)
    fresh = load_model("tiny/clip").model
    assert not torch.allclose(features(fresh), trained, atol=1e-4)


def test_learning_goes_on_from_the_hub_as_it_would_here(pushed):
    path, _, _ = pushed
    local = TrainedModel(path, device="cpu").learner
    remote = ContinualLearner.from_pretrained("me/three", load_model("tiny/clip").model)
    generator = torch.Generator().manual_seed(1)
    pixels, ids = torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([[3, 9, 1], [3, 12, 1], [3, 20, 1]])
    batches = [({"pixel_values": pixels, "input_ids": ids}, torch.tensor([0, 1, 2, 0, 1, 2]))]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(**batch[0]).logits_per_image, batch[1])

    for learner in (local, remote):
        with learner.task("next", batches, loss) as model:
            train(model, batches, loss=loss)
    mine, theirs = local.records[-1], remote.records[-1]
    assert mine.factors.keys() == theirs.factors.keys()
    assert all(
        torch.equal(f.A, theirs.factors[n].A) and torch.equal(f.B, theirs.factors[n].B) for n, f in mine.factors.items()
    )
    assert all(torch.equal(U, remote.U[name]) for name, U in local.U.items())
    assert remote.audit().passed


def test_a_ledger_on_the_hub_is_not_appended_to(pushed):
    with pytest.raises(LedgerError, match="me/three is on the hub: to append to it, save_pretrained"):
        ContinualLearner.from_pretrained("me/three", load_model("tiny/clip").model, append=True)


def test_a_revision_is_opened(pushed, hub, world):
    _, done, _ = pushed
    repo = hub.repos["me/three"]
    repo.commit("main", {k: v for k, v in hub.files("me/three").items() if not k.startswith("ledger/")})
    with pytest.raises(HubError, match=r"holds no ledger/\*"):
        ContinualLearner.from_pretrained("me/three", load_model("tiny/clip").model)
    learner = ContinualLearner.from_pretrained("me/three", load_model("tiny/clip").model, revision=done.commit)
    assert len(learner.records) == 3


def test_another_base_is_refused(pushed, hub, tmp_path):
    model = load_model("tiny/clip").model
    with torch.no_grad():
        model.vision_model.encoder.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(LedgerError, match=r"belongs to another base model \(tiny/clip\)"):
        ContinualLearner.from_pretrained("me/three", model)


def test_the_card_s_head_is_what_the_hub_reads(pushed):
    _, _, files = pushed
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.library_name, data.license, data.language) == ("tiny/clip", "peft", "mit", ["en"])
    assert data.pipeline_tag == "zero-shot-image-classification"
    found = {e.dataset_name: (e.metric_type, e.metric_value, e.metric_name) for e in data.eval_results or []}
    results = json.loads((pushed[0] / "results.json").read_text())
    assert found == {
        name: ("accuracy", round(value, 2), f"accuracy in percent after 3 tasks, n = {results['test_counts'][name]}")
        for name, value in zip(TASKS, results["accuracy"][-1], strict=True)
    }
    assert "| the base model, tiny/clip | bsd-3-clause |" in files["README.md"].decode()


@pytest.mark.parametrize("method", ["keeplora++", "lora"])
def test_room_and_leak_are_what_the_learner_says(world, method):
    path, results = world.run(method=method)
    learner = TrainedModel(path, device="cpu").learner
    facts = collect(open_source(path), "me/three", Told(), Contents())
    if method == "lora":
        assert (facts.rooms, facts.fullest, facts.leak) == ((), None, None)
        return
    used = {t.name: learner.U[t.name].shape[1] for t in learner.targets}
    assert {room.name: room.used for room in facts.rooms} == {
        tower: sum(used[t.name] for t in learner.targets if t.tower == tower)
        for tower in {t.tower for t in learner.targets}
    }
    assert {room.name: room.of for room in facts.rooms} == {
        tower: sum(t.n_in for t in learner.targets if t.tower == tower) for tower in {t.tower for t in learner.targets}
    }
    assert sum(room.start for room in facts.rooms) == sum(U.shape[1] for U in learner.start_bases().values())
    assert facts.fullest is not None
    assert facts.fullest.left / facts.fullest.of == min((t.n_in - used[t.name]) / t.n_in for t in learner.targets)
    audit = learner.audit()
    assert facts.leak is not None
    assert facts.leak.factors == pytest.approx(audit.factor_leak_max, rel=1e-6)
    row = max(audit.rows, key=lambda row: row.factor_leak)
    assert (facts.leak.layer, facts.leak.task) == (row.layer, row.task)
    assert facts.leak.weights == max(row["weight_leak"] for row in results["audit"]["rows"])


def test_pushing_again_after_a_task_was_taken_back(pushed, hub, world, tmp_path):
    path = world.copied(pushed[0], tmp_path / "run")
    ledger: Any = Ledger.open(path / "ledger")
    if hasattr(ledger, "rollback"):
        ledger.rollback("stripes")
    else:
        shutil.rmtree(path / "ledger/0003-dots")
    publish(path, "me/three", base_model="tiny/clip")
    files = held(hub, "me/three")
    assert {k for k in files if "/0003" in k} == set()
    card = files["README.md"].decode()
    assert "(removed or rolled back since): dots" in card
    # The scores are of a model that had learned dots too: they stand there under that word, and on no leaderboard.
    assert "not those of the model here" in card
    assert "measured with dots in it" in " ".join(card.split())
    assert not ModelCard(card).data.eval_results
    assert len(ContinualLearner.from_pretrained("me/three", load_model("tiny/clip").model).records) == 2


def test_merged_and_single_adapters(hub, world, base):
    from peft import PeftModel
    from transformers import CLIPModel

    path, _ = world.run()
    publish(path, "me/all", base_model=base, merged=True, adapters=True)
    files = held(hub, "me/all")
    assert {k.split("/")[1] for k in files if k.startswith("adapters/")} == {
        f"{i:04d}-{n}" for i, n in enumerate(TASKS, 1)
    }
    assert tells(files, str(world.root), str(Path.home())) == []
    out = run_card(files["README.md"].decode())
    trained = features(TrainedModel(path, device="cpu").family.model)
    torch.testing.assert_close(features(out["merged"]), trained, atol=1e-5, rtol=1e-4)
    one = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), "me/all", subfolder="adapters/0002-stripes")
    W = one.base_model.model.vision_model.encoder.layers[1].self_attn.q_proj
    record = (
        TrainedModel(path, device="cpu").learner.records[1].factors["vision_model.encoder.layers.1.self_attn.q_proj"]
    )
    torch.testing.assert_close(W.get_delta_weight("default"), record.delta, atol=1e-6, rtol=1e-5)
