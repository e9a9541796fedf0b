"""Replay on generative models: conversations are kept compactly, come back as they were, and are drawn and weighed rightly."""

from __future__ import annotations

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.methods.replay import SAMPLES
from keeplora.methods.samples import chosen_samples, compact, count_samples, pack_samples, unpack_sample
from keeplora.tuner.task import OpenTask
from tests.methods.generative import KINDS, GenerationTask, World, learn, save_model
from tests.methods.test_generative import make_learner
from tests.tuner.blocks import same


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("replay")
    return {kind: save_model(kind, root / kind) for kind in KINDS}


def replay(world: World, **options):
    return make_learner("replay", world, options=options)


def is_sample(found, item) -> bool:
    """The same but for the rounding of pictures to float16."""
    if found.keys() != item.keys():
        return False
    for key, value in item.items():
        if found[key].dtype != value.dtype or found[key].shape != value.shape:
            return False
        rounded = value.half().to(value.dtype) if value.is_floating_point() else value
        if not torch.equal(found[key], rounded):
            return False
    return True


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], torch.uint8), ([-100, 5], torch.int8), ([-100, 128], torch.int16), ([0, 32000], torch.int16),
        ([0, 151_655], torch.int32), ([0, 2**40], torch.int64), ([0.5, -2.0], torch.float16), ([0.5, 1e6], torch.float32),
    ],
)  # fmt: skip
def test_values_are_kept_in_the_smallest_type(values, dtype):
    tensor = torch.tensor(values)
    assert compact(tensor).dtype == dtype
    assert torch.equal(compact(tensor).to(tensor.dtype), tensor)


def test_other_types_stay():
    for tensor in (
        torch.tensor([True, False]),
        torch.tensor([1.5], dtype=torch.bfloat16),
        torch.zeros(0, dtype=torch.int64),
    ):
        assert compact(tensor) is tensor


def test_ragged_samples_come_back():
    samples = [
        {"ids": torch.tensor([[5, 70_000]]), "pixels": torch.arange(6.0).reshape(1, 2, 3), "note": "dropped"},
        {"ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100]])},
        {"ids": torch.tensor([[4]]), "pixels": torch.ones(2, 1, 3), "mask": torch.tensor([True])},
    ]
    packed = pack_samples(samples)
    assert count_samples(packed) == 3
    assert packed["values/ids"].tolist() == [5, 70_000, 1, 2, 3, 4]
    assert packed["shapes/pixels"].tolist() == [[1, 2, 3], [-1, -1, -1], [2, 1, 3]]
    for i, sample in enumerate(samples):
        found = unpack_sample(packed, i)
        wanted = {key: value for key, value in sample.items() if isinstance(value, torch.Tensor)}
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value)
            assert found[key].dtype == value.dtype


def test_samples_of_unlike_dimensions_are_refused():
    with pytest.raises(ValueError, match="the samples' 'x' have different numbers of dimensions"):
        pack_samples([{"x": torch.zeros(1)}, {"x": torch.zeros(1, 1)}])


@pytest.mark.parametrize(("percent", "n"), [(1.0, 1), (50.0, 2), (70.0, 3), (100.0, 4)])
def test_the_share_that_is_kept(percent, n, folders):
    task = GenerationTask(World("llama", folders["llama"]), "one")
    for batches in (task.single_batches, list(task.single_batches)):  # a loader, or any list
        opened = OpenTask("one", task.batches, task.loss, single_batches=batches)
        kept = [s["input_ids"].tolist() for s in chosen_samples(opened, percent, 3)]
        assert len(kept) == n
        assert kept == [s["input_ids"].tolist() for s in chosen_samples(opened, percent, 3)]
    choices = {str([s["input_ids"].tolist() for s in chosen_samples(opened, 25, seed)]) for seed in range(8)}
    assert len(choices) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_are_the_tasks_own_samples(kind, folders, tmp_path):
    world = World(kind, folders[kind])
    learner = replay(world, share=100.0)
    task = GenerationTask(world, "one")
    learn(learner, task, "one", steps=1)
    (packed,) = learner.packed()
    found = [unpack_sample(packed, i) for i in range(count_samples(packed))]
    assert len(found) == 4
    for item in task.items:
        assert sum(is_sample(sample, item) for sample in found) == 1
    stored = sum(
        t.numel() * t.element_size() for key, t in learner.records[0].tensors.items() if key.startswith(SAMPLES)
    )
    assert learner.state_bytes() == stored
    whole = sum(t.numel() * t.element_size() for item in task.items for t in item.values())
    assert stored < 0.55 * whole
    assert not learner.memories()  # nothing of classification
    other = World(kind, folders[kind])
    again = type(learner).from_pretrained(learner.save_pretrained(tmp_path / "out"), other.model)
    assert same(again.packed()[0], packed)


def test_penalty_is_the_mean_loss_of_old_answers(folders):
    world = World("llava", folders["llava"])
    learner = replay(world, share=100.0, batch=2, weight=0.5)
    one, two = GenerationTask(world, "one"), GenerationTask(world, "two")
    assert all(p != p for p in learn(learner, one, "one", steps=1))  # nothing to replay
    model = two.start(learner, "two")
    seen = []
    real = two.token_losses
    two.token_losses = lambda batch, model=None: seen.append(batch) or real(batch, model)
    penalty = learner.penalty(two.batches[0], None)
    penalty.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    (batch,) = seen
    assert len(batch["labels"]) == 2
    assert penalty.item() == pytest.approx(0.5 * float(real(batch).mean().detach()), rel=1e-5)
    own = [item["labels"][item["labels"] != -100].tolist() for item in one.items]
    assert all(row[row != -100].tolist() in own for row in batch["labels"])
    learner.abort_task()


def test_draws_come_from_all_old_tasks_and_no_more_than_the_batch_holds(folders):
    world = World("llama", folders["llama"])
    learner = replay(world, share=50.0, batch=3)
    one, two = GenerationTask(world, "one"), GenerationTask(world, "two")
    learn(learner, one, "one", steps=1)
    learn(learner, two, "two", steps=1)
    task = GenerationTask(world, "one")
    task.start(learner, "three")
    joined = []
    task.join = lambda items: joined.append(items) or GenerationTask.join(task, items)
    for _ in range(20):
        learner.penalty(task.batches[0], None)  # a batch of two
    assert {len(items) for items in joined} == {2}
    ids = {tuple(item["input_ids"][0].tolist()) for items in joined for item in items}
    assert len(ids) == 4  # two of each task
    whole = task.join(task.items)
    learner.penalty(whole, None)
    assert len(joined[-1]) == 3  # the option's own limit
    learner.abort_task()


def test_replay_keeps_the_old_task(folders):
    losses = {}
    for name in ("lora", "replay"):
        world = World("llava", folders["llava"])
        learner = make_learner(name, world, **({"options": {"share": 100.0}} if name == "replay" else {}))
        one, two = GenerationTask(world, "one"), GenerationTask(world, "two")
        learn(learner, one, "one", lr=2e-2)
        learn(learner, two, "two", lr=2e-2, steps=6)
        losses[name] = one.mean_loss()
    assert losses["replay"] < losses["lora"] - 0.1


@pytest.mark.parametrize("share", [0.0, 100.5, -1.0])
def test_bad_share(share, folders):
    message = f"tuner.options.share must lie above 0 and up to 100 percent, got {share}"
    with pytest.raises(ConfigError, match=message):
        replay(World("llama", folders["llama"]), share=share)
