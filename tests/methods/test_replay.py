"""Experience replay: what is stored, that it stays within its budget, what is drawn, and that it can be done again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.pictures import Collate
from keeplora.methods.replay import PREFIX, TEXT, dequantise, narrow, quantise, shuffled_by_class
from keeplora.models import load_model
from tests.methods.families import FamilyTask
from tests.methods.steps import check_resumes, learn, make_learner, start, train
from tests.models import tiny
from tests.tuner.blocks import same

PICTURE = 3 * 32 * 32 + 2 * 3 * 4 + 4
"""Bytes of a stored 32 × 32 picture: pixels, two ranges per channel, a label."""


@pytest.fixture
def clip(clip_folder):
    return load_model(clip_folder)


class Pictures(Dataset):
    """Noise around a level that tells the class; two thirds are of class 0. Notes what was read."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = [int(i % 3 == 0) for i in range(n)]
        level = torch.tensor(self.labels, dtype=torch.float32)[:, None, None, None]
        self.pixels = level - 0.5 + torch.randn(n, 3, 32, 32, generator=generator)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, object]:
        self.read.append(i)
        return {"pixel_values": self.pixels[i], "labels": self.labels[i], "index": i}


class LoaderTask(FamilyTask):
    """A `FamilyTask` with 18 pictures behind a shuffling loader, as in an experiment."""

    def __init__(self, encoder, name: str, n: int = 18, seed: int = 0) -> None:
        super().__init__(encoder, name)
        self.data = Pictures(n, seed)
        self.batches = DataLoader(
            self.data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed),
            collate_fn=Collate(self.text),
        )  # fmt: skip


def stored(record) -> dict[str, torch.Tensor]:
    return {key: value for key, value in record.tensors.items() if key.startswith(PREFIX)}


def prompt_bytes(record) -> int:
    return sum(t.numel() * t.element_size() for key, t in record.tensors.items() if key.startswith(TEXT))


def test_quantised_pictures_come_back_within_half_a_step():
    generator = torch.Generator().manual_seed(0)
    picture = 3 * torch.randn(3, 8, 8, generator=generator) + torch.tensor([0.0, 5, -50])[:, None, None]
    picture[2] = -7.25  # a constant channel
    pixels, low, high = quantise(picture)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == picture.shape
    assert low.shape == high.shape == (3, 1, 1)
    back = dequantise(pixels, low, high)
    step = (high - low) / 255
    assert bool(((back - picture).abs() <= step / 2 + 1e-5).all())
    assert float((back - picture).abs().max()) > 1e-4  # it is not the picture itself
    assert torch.equal(back[2], picture[2])
    assert torch.equal(back.amax((1, 2)), picture.amax((1, 2)))
    assert torch.equal(back.amin((1, 2)), picture.amin((1, 2)))


def test_the_grid_of_packed_patches_comes_back_exactly():
    packed = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    for grid in ((3.0, 5.0), (7.0, 2.0), (13.0, 11.0)):
        packed[:, -2:] = torch.tensor(grid)
        packed[11:] = 0.0  # padding
        back = dequantise(*quantise(packed))
        assert torch.equal(back[:, -2:], packed[:, -2:])
        assert float((back - packed).abs().max()) < 0.02


@pytest.mark.parametrize("packed", [False, True])
def test_clips_come_back_frame_by_frame(packed):
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(4, 16, 10, generator=generator) if packed else torch.randn(4, 3, 8, 8, generator=generator)
    clip[1] += 90  # a bright frame does not cost the others their steps
    clip[3] = torch.nan  # a frame that is absent
    if packed:
        clip[:3, :, -2:] = torch.tensor([3.0, 5.0])
    pixels, low, high = quantise(clip, clip=True)
    assert pixels.dtype == torch.uint8
    assert low.shape == ((4, 1, 10) if packed else (4, 3, 1, 1))
    back = dequantise(pixels, low, high)
    assert bool(back[3].isnan().all())
    assert float((back - clip)[:3].abs().max()) < 0.02
    if packed:
        assert torch.equal(back[:3, :, -2:], clip[:3, :, -2:])


def test_order_is_balanced_from_the_start():
    labels = [0] * 7 + [1] * 2 + [2] * 4
    order = shuffled_by_class(labels, torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(13))
    for k in range(1, 14):
        counts = Counter(labels[i] for i in order[:k])
        for a in range(3):
            for b in range(3):  # b is behind only if it has no more
                assert counts[a] <= counts[b] + 1 or counts[b] == labels.count(b)
    again = shuffled_by_class(labels, torch.Generator().manual_seed(1))
    assert order == again
    assert order != shuffled_by_class(labels, torch.Generator().manual_seed(2))


def test_prompts_are_stored_narrow():
    assert narrow(torch.tensor([0, 255])).dtype == torch.uint8
    for values in ([0, 256], [-1, 2]):
        assert narrow(torch.tensor(values)).dtype == torch.int32
        assert narrow(torch.tensor(values)).tolist() == values
    assert narrow(torch.tensor([0.5])).dtype == torch.float32


# 0.01863: a third is two pictures and 10 bytes, which do not hold the prompts.
@pytest.mark.parametrize("megabytes", [0.012, 0.01863, 0.2])
def test_budget_is_shared_and_never_exceeded(clip, megabytes):
    budget = int(megabytes * 1e6)
    learner = make_learner("replay", clip, {"budget_mb": megabytes})
    assert learner.state_bytes() == 0
    first = None
    for i, name in enumerate(("one", "two", "one"), 1):
        task = LoaderTask(clip, name, seed=i)
        learn(learner, task, f"{name}{i}", lr=1e-3)
        memories = learner.memories()
        assert len(memories) == i
        assert learner.state_bytes() == sum(m.bytes for m in memories) <= budget
        for record, memory in zip(learner.records, memories, strict=True):
            prompts = prompt_bytes(record)
            assert 0 < prompts
            assert memory.bytes == prompts + memory.samples * PICTURE <= budget // i
            all_of_it = len(record.tensors[PREFIX + "labels"])
            assert memory.samples == all_of_it or prompts + (memory.samples + 1) * PICTURE > budget // i
        record = learner.records[-1]
        assert sum(t.numel() * t.element_size() for t in stored(record).values()) <= budget // i
        labels = record.tensors[PREFIX + "labels"].tolist()
        for k in range(1, len(labels) + 1):
            ones = sum(labels[:k])
            assert abs(k - 2 * ones) <= 1 or ones == sum(task.data.labels)
        first = first or memories[0].samples
    if megabytes < 0.05:
        assert learner.memories()[0].samples < first  # the others took from it


def test_stored_pictures_are_the_tasks_own(clip):
    learner = make_learner("replay", clip, {"budget_mb": 0.03})
    task = LoaderTask(clip, "one")
    learn(learner, task, "one")
    record = learner.records[0]
    pixels = dequantise(*(record.tensors[PREFIX + key] for key in ("pixels", "low", "high")))
    distance = (pixels[:, None] - task.data.pixels[None]).abs().amax((2, 3, 4))
    nearest = distance.argmin(1).tolist()
    assert float(distance.min(1).values.max()) < 0.03
    assert len(set(nearest)) == len(nearest) < len(task.data)
    assert [task.data.labels[i] for i in nearest] == record.tensors[PREFIX + "labels"].tolist()
    for key, value in task.text.items():
        memory = learner.memories()[0]
        assert torch.equal(memory.prompts[key], value)
        assert memory.prompts[key].dtype == value.dtype


def test_storing_reads_the_chosen_and_draws_no_random_number(clip):
    learner = make_learner("replay", clip, {"budget_mb": 0.03})
    task = LoaderTask(clip, "one")
    start(learner, task, "one")
    task.data.read.clear()
    states = torch.random.get_rng_state(), task.batches.generator.get_state()
    learner.finish_task()
    kept = len(learner.records[0].tensors[PREFIX + "labels"])
    assert kept < len(task.data)
    assert len(task.data.read) == kept + 1  # one to see how large a picture is
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert torch.equal(task.batches.generator.get_state(), states[1])


def choice(clip_folder, seed: int):
    encoder = load_model(clip_folder)
    learner = make_learner("replay", encoder, {"budget_mb": 0.03, "batch": 2}, seed=seed)
    learn(learner, LoaderTask(encoder, "one"), "one")
    task = LoaderTask(encoder, "two")
    penalties = learn(learner, task, "two", steps=1)
    return stored(learner.records[0]), penalties


def test_choice_and_draws_follow_the_seed(clip_folder):
    first = choice(clip_folder, 0)
    torch.rand(3)  # whatever else drew numbers
    again = choice(clip_folder, 0)
    assert same(first[0], again[0])
    assert first[1] == again[1]
    other = choice(clip_folder, 1)
    assert not same(first[0], other[0])
    assert first[1] != other[1]


def test_penalty_is_the_old_tasks_cross_entropy_against_its_own_prompts(clip):
    learner = make_learner("replay", clip, {"weight": 0.5, "batch": 100})
    one, two = FamilyTask(clip, "one"), FamilyTask(clip, "two")
    assert all(p != p for p in learn(learner, one, "one"))  # nothing to replay
    model = start(learner, two, "two")
    batch = two.batches[0]
    penalty = learner.penalty(batch, two.logits(batch))
    penalty.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    memory = learner.memories()[0]
    assert memory.samples == 8
    pixels = dequantise(*(memory.tensors[PREFIX + key] for key in ("pixels", "low", "high")))
    logits = clip.logits(clip.image_features(pixels), clip.text_features(one.text))
    expected = 0.5 * torch.nn.functional.cross_entropy(logits, memory.tensors[PREFIX + "labels"].long())
    expected.backward()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    for g, p in zip(grads, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in grads) > 1e-4
    learner.abort_task()


def test_draws_come_from_every_old_task_and_all_its_samples(clip):
    learner = make_learner("replay", clip, {"batch": 3})
    for i, name in enumerate(("one", "two")):
        learn(learner, LoaderTask(clip, name, n=6, seed=i), name)
    task = LoaderTask(clip, "one", seed=5)
    start(learner, task, "three")
    seen: list[tuple[str, torch.Tensor]] = []
    real = task.logits
    task.logits = lambda batch, model=None: (
        seen.append((str(batch["input_ids"].tolist()), batch["pixel_values"])) or real(batch)
    )
    for _ in range(40):
        learner.penalty({}, torch.zeros(0))
    counts = Counter(text for text, _ in seen)
    assert len(counts) == 2
    assert min(counts.values()) > 8
    for text in counts:
        pictures = torch.cat([pixels for t, pixels in seen if t == text])
        assert len(pictures.flatten(1).unique(dim=0)) == 6
    assert all(len(pixels.flatten(1).unique(dim=0)) == 3 for _, pixels in seen)  # no picture twice in a batch
    learner.abort_task()


def test_replay_keeps_the_old_task(clip_folder):
    losses = {}
    for name in ("lora", "replay"):
        encoder = load_model(clip_folder)
        learner = make_learner(name, encoder)
        one, two = FamilyTask(encoder, "one"), FamilyTask(encoder, "two")
        learn(learner, one, "one", lr=2e-2)
        learn(learner, two, "two", lr=2e-2, steps=6)
        losses[name] = one.mean_loss()
    assert losses["replay"] < losses["lora"]


def test_a_budget_that_is_too_small_is_told(clip):
    learner = make_learner("replay", clip, {"budget_mb": 0.001})
    task = FamilyTask(clip, "one")
    start(learner, task, "one")
    with pytest.warns(UserWarning, match="replay keeps nothing of task 'one'.*raise tuner.options.budget_mb"):
        learner.finish_task()
    assert stored(learner.records[0]) == {}
    assert learner.state_bytes() == 0
    # Room for one picture of one task, and none of two.
    learner = make_learner("replay", clip, {"budget_mb": 0.0035})
    learn(learner, task, "two")
    assert learner.memories()[0].samples == 1
    start(learner, FamilyTask(clip, "two"), "three")
    with pytest.warns(UserWarning, match="replay keeps nothing of task 'three'"):
        learner.finish_task()
    assert learner.memories()[0].samples == 1  # the share is among those who have something


def test_a_task_that_fails_while_storing_leaves_nothing(clip, monkeypatch):
    learner = make_learner("replay", clip)
    learn(learner, FamilyTask(clip, "one"), "one")
    before = {n: p.detach().clone() for n, p in clip.model.named_parameters()}
    kept = learner.state_bytes()
    task = FamilyTask(clip, "two")
    model = start(learner, task, "two")
    train(learner, model, task)
    monkeypatch.setattr("keeplora.methods.replay.quantise", lambda picture, clip: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.finish_task()
    assert same({n: p.detach() for n, p in clip.model.named_parameters()}, before)
    assert learner.state_bytes() == kept
    assert len(learner.records) == 1


@pytest.mark.parametrize("family", ["siglip", "siglip2", "vision-text"])
def test_other_families(family, tmp_path):
    encoder = load_model(tiny.make_tiny(family, tmp_path / family))
    learner = make_learner("replay", encoder, {"batch": 100})
    one = FamilyTask(encoder, "one")
    learn(learner, one, "one", lr=1e-2)
    start(learner, FamilyTask(encoder, "two"), "two")
    penalty = learner.penalty({}, torch.zeros(0))
    assert penalty.item() == pytest.approx(one.mean_loss(), rel=0.05)  # all eight pictures, but for their rounding
    learner.abort_task()


def test_objective_is_asked_for(clip):
    learner = make_learner("replay", clip)
    task = FamilyTask(clip, "one")
    with pytest.raises(KeepLoraError, match=r"task 'one': replay .* start_task\(objective=...\)"):
        learner.start_task("one", task.batches, task.loss)


def test_resumes(clip_folder, tmp_path):
    penalties = check_resumes("replay", clip_folder, tmp_path / "out", {"budget_mb": 0.02, "batch": 3}, lr=1e-2)
    assert min(penalties) > 0
    assert len(set(penalties)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_mb": 0}, r"tuner.options.budget_mb must be a finite number above 0, got 0.0"),
        ({"batch": 0}, r"tuner.options.batch must be at least 1, got 0"),
        ({"weight": float("nan")}, r"tuner.options.weight must be a finite number of at least 0, got nan"),
    ],
)
def test_bad_options(options, message, clip):
    with pytest.raises(ConfigError, match=message):
        make_learner("replay", clip, options)
