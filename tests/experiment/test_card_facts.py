"""What a card is told, where a whole run would be long to make: other bases, other data, other machines."""

from __future__ import annotations

import dataclasses

import pytest

from keeplora import ContinualLearner
from keeplora.experiment.card_facts import Source, Told, collect, open_source
from keeplora.report.card import Contents, render_card
from keeplora.report.runs import Run
from tests.tuner.blocks import config, learn, make_net


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Source:
    path = tmp_path_factory.mktemp("saved") / "learner"
    learner = ContinualLearner(make_net(), config(), base_name="liuhaotian/llava")
    learn(learner, "a", 1, info={"scorer": "exact"})
    learn(learner, "b", 2, info={"scorer": "exact"})
    learner.save_pretrained(path)
    return open_source(path)


def as_run(saved: Source, cls: str = "LlavaForConditionalGeneration", gpus: int = 0, **settings) -> Source:
    """The same ledger as one that a run on another model would leave."""
    head = {**saved.ledger.head, "base": {**saved.ledger.head["base"], "class": cls}}
    ledger = type(saved.ledger)(saved.ledger.path, head)
    run = Run(saved.path, results={"kind": "generation"}, environment={"torch": {"gpus": [{"name": "x"}] * gpus}})
    values = {"method": "keeplora++", "model": {"name": "liuhaotian/llava", **settings}, "base_dir": str(saved.path)}
    return dataclasses.replace(
        saved, ledger=ledger, run=run, config={**values, "device": settings.pop("device", "auto")}
    )


def code(source: Source, **told) -> str:
    return render_card(collect(source, "me/asked", Told(**told), Contents(adapter=True)))


@pytest.mark.parametrize(
    ("gpus", "settings", "dtype"),
    [
        (0, {}, None),
        (1, {}, "bf16"),
        (1, {"dtype": "fp32"}, "fp32"),
        (0, {"dtype": "bf16"}, "bf16"),
        (1, {"dtype": "auto"}, "bf16"),
    ],
)
def test_the_base_is_opened_in_the_type_that_its_hash_is_of(saved, gpus, settings, dtype):
    text = code(as_run(saved, gpus=gpus, **settings))
    stock = "bfloat16" if dtype == "bf16" else "float32"
    assert f'LlavaForConditionalGeneration.from_pretrained("liuhaotian/llava", dtype=torch.{stock})' in text
    own = f', dtype="{dtype}"' if dtype else ""
    assert f'base = load_model("liuhaotian/llava"{own}).model' in text


def test_a_revision_and_a_size_are_given_again(saved):
    text = code(as_run(saved, revision="abc", image_size=336, trust_remote_code=False))
    assert 'load_model("liuhaotian/llava", revision="abc", image_size=336).model' in text
    assert 'from_pretrained("liuhaotian/llava", revision="abc", dtype=torch.float32)' in text
    assert "abc" not in code(as_run(saved, revision="abc"), base_model="other/name")


def test_a_quantised_base_has_no_stock_lines(saved):
    text = code(as_run(saved, quantize="4bit"))
    assert 'load_model("liuhaotian/llava", quantize="4bit").model' in text
    assert "On the base model, opened as it was, `peft.PeftModel.from_pretrained" in text
    assert "LlavaForConditionalGeneration.from_pretrained" not in text


def test_data_sets_of_the_hub_are_named_and_local_ones_are_not(saved):
    source = as_run(saved)
    (saved.path / "mine/data").mkdir(parents=True, exist_ok=True)
    specs = [
        {"name": "a", "source": "datasets", "path": "me/pets"},
        {"name": "b", "source": "datasets", "path": "mine/data"},
    ]
    source = dataclasses.replace(source, config={**source.config, "tasks": specs})
    facts = collect(source, "me/asked", Told(), Contents())
    assert [task.dataset for task in facts.tasks] == ["me/pets", None]
    assert "datasets:\n- me/pets\n" in render_card(facts)


@pytest.mark.parametrize(
    ("info", "fate"),
    [
        ({"undone": True, "not_learned": "x"}, "undone: it was not accepted"),
        ({"not_learned": "no room, see /home/ann/log.txt/x"}, "not learned: no room, see x"),
        ({"deferred": True}, "learned with the last task, jointly"),
        ({}, "nothing was learned of it"),
    ],
)
def test_a_task_that_left_nothing(saved, info, fate):
    record = dataclasses.replace(saved.records[1], factors={}, full={}, tensors={}, basis={}, info=info)
    facts = collect(dataclasses.replace(saved, records=[saved.records[0], record]), "me/asked", Told(), Contents())
    assert [task.fate for task in facts.tasks] == ["learned", fate]


def test_another_method_s_class_is_imported_from_where_it_is(saved):
    from keeplora.methods import get_method

    learner = get_method("inflora").learner
    text = code(dataclasses.replace(as_run(saved), learner=learner))
    assert f"from {learner.__module__} import {learner.__name__}\n" in text
    assert f'learner = {learner.__name__}.from_pretrained("me/asked", base)' in text
