"""Every method that can, on tiny generative models: it learns, leaves the rest alone, and comes back from disk as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keeplora.methods import get_method, method_names
from keeplora.methods.regularised import FISHER, empirical_fisher
from tests.methods.generative import KINDS, GenerationTask, World, learn, save_model, train
from tests.tuner.blocks import hooks, same, weights

METHODS = [n for n in method_names() if "generation" in get_method(n).kinds]
WHOLE_WEIGHTS = {"full-ft", "full-ft-all", "l2", "ewc", "wise-ft"}
STILL = {"zero-shot", "oracle", "moelora"}  # the model's own weights never move
RATES = {**dict.fromkeys(WHOLE_WEIGHTS, 2e-3), "nusa-cl": 1e-1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("generative")
    return {kind: save_model(kind, root / kind) for kind in KINDS}


def make_learner(name: str, world: World, **values: Any) -> Any:
    method = get_method(name)
    values = {"r": 4, "lora_alpha": 4, "gamma": 0.2, "energy_weights": 0.3, "energy_features": 0.8,
              "target_modules": world.targets, **values}  # fmt: skip
    return method.learner(world.model, method.make_config(values))


def reopen(learner: Any, kind: str, folder: Path, saved: Path) -> tuple[World, Any]:
    world = World(kind, folder)
    return world, type(learner).from_pretrained(saved, world.model)


def check_generation(world: World, task: GenerationTask) -> tuple[list[int], torch.Tensor]:
    """The KV cache changes nothing: same tokens, and the logits of the whole text read at once."""
    tokens, logits = world.generate(task.prompt)
    again, whole = world.generate(task.prompt, use_cache=False)
    assert tokens == again
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    return tokens, logits


def test_the_kinds_of_every_method():
    only = {n for n in method_names() if "generation" not in get_method(n).kinds}
    assert only == {"lwf", "zscl", "rail-primal", "rail-dual", "keeplora-cls", "keeplora++-cls"}
    assert all("classification" in get_method(n).kinds for n in method_names())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_two_tasks_and_back_from_disk(name, kind, folders, tmp_path):
    world = World(kind, folders[kind])
    model = world.model
    learner = make_learner(name, world)
    before, modules = weights(model), dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    targets = {f"{t.name}.weight" for t in learner.targets}
    tasks = {task: GenerationTask(world, task) for task in ("one", "two")}
    first = check_generation(world, tasks["one"])
    hooked = hooks(model)  # transformers puts some of its own there in the first pass
    for task_name, task in tasks.items():
        with learner.serving(task_name):
            start = task.mean_loss()
        opened = task.start(learner, task_name)
        assert task.mean_loss() == pytest.approx(start, rel=1e-4)  # no method moves the model by starting
        assert learner._open.info["trained_parameters"] <= learner.planned_parameters()
        train(learner, opened, task, lr=RATES.get(name, 2e-2))
        live = task.mean_loss()
        record = learner.finish_task()
        assert record is learner.records[-1]
        with learner.serving(task_name):
            loss = task.mean_loss()
        if name == "zero-shot":
            assert loss == start
        else:
            assert loss < start - 0.05, "nothing was learned"
        if name != "wise-ft":
            assert loss == pytest.approx(live, rel=1e-3)  # what was trained is what is served
        assert hooks(model) == hooked
        assert dict(model.named_modules()) == modules
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags

    after = weights(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    if name in STILL:
        assert changed == set()
    elif name == "full-ft-all":
        assert targets < changed
    else:
        assert changed == targets
    if learner.protects:
        assert learner.audit().passed

    other, again = reopen(learner, kind, folders[kind], learner.save_pretrained(tmp_path / "out"))
    assert same(weights(other.model), after)
    assert again.state_bytes() == learner.state_bytes()
    for task_name, task in tasks.items():
        with learner.serving(task_name):
            here, logits = check_generation(world, task), world.logits(task.batches[0])
        with again.serving(task_name):
            there = other.generate(task.prompt)
            assert torch.equal(other.logits(task.batches[0]), logits)
        assert here[0] == there[0]
        assert torch.equal(here[1], there[1])
        if task_name == "one":
            assert torch.equal(here[1], first[1]) == (name == "zero-shot")


@pytest.mark.parametrize("name", [n for n in METHODS if n != "zero-shot"])
def test_a_dropped_task_leaves_no_trace_and_the_next_goes_on_from_disk(name, folders, tmp_path):
    world = World("llama", folders["llama"])
    learner = make_learner(name, world)
    one, two = GenerationTask(world, "one"), GenerationTask(world, "two")
    rate = RATES.get(name, 2e-2)
    learn(learner, one, "one", lr=rate)
    before, hooked, state, held = weights(world.model), hooks(world.model), learner.state_bytes(), set(vars(learner))
    with learner.serving("one"):
        served = world.logits(one.batches[0])
    train(learner, two.start(learner, "two"), two, lr=rate)
    learner.abort_task()
    assert same(weights(world.model), before)
    assert hooks(world.model) == hooked
    assert learner.state_bytes() == state
    assert set(vars(learner)) == held
    assert all(p.grad is None for p in world.model.parameters())
    with learner.serving("one"):
        assert torch.equal(world.logits(one.batches[0]), served)

    saved = learner.save_pretrained(tmp_path / "out")
    other, again = reopen(learner, "llama", folders["llama"], saved)
    here = learn(learner, two, "two", lr=rate)
    there = learn(again, GenerationTask(other, "two"), "two", lr=rate)
    assert torch.tensor(here).nan_to_num(-1).tolist() == torch.tensor(there).nan_to_num(-1).tolist()
    assert same(weights(world.model), weights(other.model))
    assert same(learner.records[-1].tensors, again.records[-1].tensors)
    with learner.serving("two"), again.serving("two"):
        assert torch.equal(world.logits(two.batches[0]), other.logits(two.batches[0]))


def test_joint_trains_once_on_what_the_others_had_one_by_one(folders):
    world = World("llava", folders["llava"])
    learner = make_learner("joint", world)
    one, two = GenerationTask(world, "one"), GenerationTask(world, "two")
    starts = one.mean_loss(), two.mean_loss()
    assert get_method("joint").learner.schedule == "joint"
    learner.sit_out("one")
    both = GenerationTask(world, "two")
    both.batches = [*one.batches, *two.batches]
    learn(learner, both, "two", lr=2e-2)
    assert one.mean_loss() < starts[0] - 0.05
    assert two.mean_loss() < starts[1] - 0.05


@pytest.mark.parametrize("name", ["lora", "full-ft-all", "moelora", "oracle", "sd-lora"])
def test_a_free_projector_trains_beside_the_method_and_comes_back(name, folders, tmp_path):
    world = World("llava", folders["llava"])
    projector = [n for n in world.targets if "projector" in n]
    values = {"target_modules": [n for n in world.targets if n not in projector], "free_modules": projector}
    learner = make_learner(name, world, **values)
    before = weights(world.model)
    tasks = {task: GenerationTask(world, task) for task in ("one", "two")}
    for task_name, task in tasks.items():
        opened = task.start(learner, task_name)
        assert learner._open.info["trained_parameters"] <= learner.planned_parameters()
        train(learner, opened, task, lr=2e-3)
        live = task.mean_loss()
        learner.finish_task()
        with learner.serving(task_name):
            assert task.mean_loss() == pytest.approx(live, rel=1e-3)
    with learner.serving("two"):
        served = weights(world.model)
    assert all(
        not torch.equal(served[f"{n}.{key}"], before[f"{n}.{key}"]) for n in projector for key in ("weight", "bias")
    )
    other, again = reopen(learner, "llava", folders["llava"], learner.save_pretrained(tmp_path / "out"))
    for task_name, task in tasks.items():
        with learner.serving(task_name), again.serving(task_name):
            assert torch.equal(world.logits(task.batches[0]), other.logits(task.batches[0]))


@pytest.mark.parametrize("kind", ["llava", "qwen2-5-vl"])
def test_the_fisher_of_ewc_is_of_whole_answers_one_by_one(kind, folders):
    world = World(kind, folders[kind])
    learner = make_learner("ewc", world, options={"fisher_samples": 3})
    task = GenerationTask(world, "one")
    learn(learner, task, "one", steps=1, lr=1e-3)
    name = learner.targets[0].name
    p = world.model.get_submodule(name).weight
    squares = torch.zeros_like(p)
    chosen = [item for item in task.items if any(_equal(item, s) for s in _read(task, 3, learner.config.seed))]
    assert len(chosen) == 3
    for item in chosen:
        p.requires_grad_(True)
        (g,) = torch.autograd.grad(task.token_losses(item).sum(), p, allow_unused=True)
        squares += 0 if g is None else g.square() / 3  # the sample without a picture never meets the projector
    torch.testing.assert_close(learner.records[0].tensors[FISHER + name], squares, rtol=1e-4, atol=1e-8)
    whole = empirical_fisher(world.model, learner.store, task.batches, task.loss)[name] / 2
    assert not torch.allclose(whole, squares, rtol=0.05)  # a batch's squared gradient is another number


def _read(task: GenerationTask, n: int, seed: int) -> list[Any]:
    from keeplora.tuner.sampling import statistics_batches

    return list(statistics_batches(task.single_batches, n, seed))


def _equal(a: Any, b: Any) -> bool:
    return same(dict(a), dict(b))


@pytest.mark.parametrize("name", ["ewc", "replay"])
def test_samples_one_by_one_are_asked_for_at_the_start(name, folders):
    world = World("llama", folders["llama"])
    task = GenerationTask(world, "one")
    with pytest.raises(ValueError, match=r"task 'one': .* give start_task\(single_batches=...\)"):
        task.start(make_learner(name, world), "one", single_batches=None)


def test_what_cannot_be_merged_says_so():
    said = {n for n in method_names() if get_method(n).unmergeable}
    assert said == {"oracle", "moelora", "rail-primal", "rail-dual"}
