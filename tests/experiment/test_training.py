"""The training loop on a model of one linear layer: what it trains, what it keeps, when it stops."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from keeplora.errors import KeepLoraError, TrainingError
from keeplora.experiment.config import load_config
from keeplora.experiment.device import Precision
from keeplora.experiment.objective import TaskObjective
from keeplora.experiment.order import ShuffledBatches
from keeplora.experiment.pictures import Collate, MixedBatches, TaskBatches, shuffled_loader
from keeplora.experiment.progress import Progress
from keeplora.experiment.training import Selection, train_task

N = 20


class Points(Dataset):
    """Pictures are points of a plane; the class is the sign of the first coordinate."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, 2, generator=generator)
        self.labels = (self.x[:, 0] > 0).long().tolist()

    def where(self, i: int) -> str:
        return f"point-{i}.png"

    videos = False

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.x[i], "labels": self.labels[i], "index": i}


class Plane(TaskObjective):
    """A TaskObjective whose logits are those of a linear model, and of a head that adds to them."""

    def __init__(self, model: nn.Module, head: nn.Parameter | None = None) -> None:
        self.model, self.head = model, head
        self.precision = Precision("fp32", torch.device("cpu"))
        self.collate, self.text_batch = Collate(), {}
        self.family = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
        self.task = SimpleNamespace(name="plane")  # type: ignore[assignment]
        self.order: list[int] = []
        self.broken_at: int | None = None
        self.modes: set[bool] = set()

    def logits(self, batch, model=None) -> torch.Tensor:
        self.order += batch["index"].tolist()
        self.modes.add(self.model.training)
        out = self.model(batch["pixel_values"])
        if self.head is not None:
            out = out + batch["pixel_values"] @ self.head.T
        return out * math.inf if self.broken_at is not None and len(self.order) > self.broken_at else out


def training(**changes):
    values = {
        "epochs": 3, "batch_size": 8, "learning_rate": 0.05, "schedule": "constant", "precision": "fp32", **changes
    }  # fmt: skip
    config = load_config(
        {"tasks": [{"name": "plane", "source": "folder"}], "model": "m", "method": "lora", "training": values}
    )
    return config.training


class Hooks:
    model: nn.Module
    penalty_of_batch: ClassVar[bool] = False
    largest: tuple[str, float] | None = None

    def penalty(self, batch, logits):
        return None

    def largest_update(self):
        return self.largest

    def after_step(self):
        pass


def cut(part, size):
    return [{k: v[i : i + size] for k, v in part.items()} for i in range(0, len(part["labels"]), size)]


def batches_of(data, size, collate, seed):
    order = ShuffledBatches(len(data), size, seed)
    return TaskBatches(data, order, shuffled_loader(data, order, collate), cut)


def run(*, hooks=None, head=False, selection=None, seed=3, frozen=(), broken_at=None, **changes):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    objective = Plane(model, nn.Parameter(torch.zeros(2, 2)) if head else None)
    objective.broken_at = broken_at
    hooks = hooks or Hooks()
    hooks.model = model
    told: list[dict] = []
    stream = io.StringIO()
    config = training(**changes)
    batches = batches_of(Points(), config.batch_size, objective.collate, seed)
    log = train_task(
        model, objective, batches, config, hooks=hooks, progress=Progress(True, stream),  # type: ignore[arg-type]
        on_epoch=told.append, selection=selection(model) if selection else None,
    )  # fmt: skip
    return SimpleNamespace(model=model, hooks=hooks, objective=objective, log=log, told=told, text=stream.getvalue())


def scores(values: list[float], *, best_epoch=True, patience=None):
    """A selection that returns ``values`` and keeps the weight that each of them was measured on."""

    def make(model: nn.Linear) -> Selection:
        states.clear()

        def validate() -> float:
            states.append(model.weight.detach().clone())
            return values[len(states) - 1]

        return Selection(validate, best_epoch, patience)

    states: list[torch.Tensor] = []
    make.states = states  # type: ignore[attr-defined]
    return make


def test_it_learns_and_tells_every_epoch():
    done = run(epochs=20)
    assert [e["epoch"] for e in done.told] == list(range(1, 21))
    assert done.told == done.log.epochs
    assert done.told[-1]["loss"] < 0.5 * done.told[0]["loss"]
    assert done.told[-1]["train_accuracy"] > 90
    assert done.log.best_epoch is None
    assert done.log.seconds > 0
    assert done.objective.modes == {False}  # evaluation mode: no dropout


def test_first_epoch_is_plain_adamw():
    done = run(epochs=1, batch_size=N)
    torch.manual_seed(0)
    model, data = nn.Linear(2, 2), Points()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    loss = nn.functional.cross_entropy(model(data.x), torch.tensor(data.labels))
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(done.model.weight, model.weight)
    assert done.told[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_every_epoch_sees_every_picture_once_in_an_order_of_the_seed():
    a, b, c = run(seed=3).objective.order, run(seed=3).objective.order, run(seed=4).objective.order
    assert a == b != c
    epochs = [a[i : i + N] for i in range(0, 3 * N, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(N))


def test_only_what_requires_a_gradient_is_trained():
    done = run(frozen=["bias"], weight_decay=0.1)
    torch.manual_seed(0)
    start = nn.Linear(2, 2)
    assert torch.equal(done.model.bias, start.bias)
    assert not torch.equal(done.model.weight, start.weight)


def test_head_is_trained_with_the_model():
    done = run(head=True)
    assert done.objective.head.abs().max() > 0


def test_nothing_to_train_is_no_epoch():
    done = run(frozen=["weight", "bias"])
    assert (done.log.epochs, done.told, done.objective.order) == ([], [], [])


def test_the_best_epoch_is_kept_and_not_the_last():
    choice = scores([40, 70, 70])
    done = run(selection=choice)
    assert done.log.best_epoch == 2  # the first of equals
    assert torch.equal(done.model.weight, choice.states[1])
    assert not torch.equal(choice.states[1], choice.states[2])
    assert [e["validation_accuracy"] for e in done.told] == [40, 70, 70]


def test_the_best_epoch_of_a_head_is_kept_too():
    short = run(head=True, selection=scores([9]), epochs=1)
    best = run(head=True, selection=scores([9, 1, 1]))
    last = run(head=True)
    assert torch.equal(best.objective.head, short.objective.head)
    assert not torch.equal(last.objective.head, short.objective.head)


def test_early_stopping_counts_epochs_without_a_rise():
    done = run(epochs=9, selection=scores([10, 20, 20, 15, 30], patience=2))
    assert len(done.told) == 4
    assert done.log.best_epoch == 2
    assert "stopped early: no better validation accuracy for 2 epochs" in done.text
    patient = run(epochs=5, selection=scores([10, 20, 20, 15, 30], patience=3))
    assert (len(patient.told), patient.log.best_epoch) == (5, 5)


def test_early_stopping_alone_keeps_the_last_weights():
    choice = scores([50, 40], best_epoch=False, patience=1)
    done = run(epochs=9, selection=choice)
    assert len(done.told) == 2
    assert done.log.best_epoch is None
    assert torch.equal(done.model.weight, choice.states[1])


def test_a_loss_that_is_not_finite_names_step_and_pictures():
    with pytest.raises(FloatingPointError) as caught:
        run(broken_at=N + 8)
    order = run().objective.order[N + 8 : N + 11]
    told = str(caught.value)
    assert "task 'plane', epoch 2, step 2: the loss is" in told
    assert f"point-{order[0]}.png, point-{order[1]}.png, point-{order[2]}.png, …" in told
    assert "no weight has taken it in" in told


def test_gradients_are_clipped():
    # AdamW does not see the length of a constant gradient; a clip that shrinks it to 1e-9 falls below its epsilon.
    torch.manual_seed(0)
    start = nn.Linear(2, 2).weight
    free, clipped = (run(epochs=1, batch_size=N, grad_clip=clip).model.weight - start for clip in (None, 1e-9))
    assert free.abs().min() > 0.9 * 0.05
    assert clipped.abs().max() < 0.1 * 0.05


def test_schedule_is_stepped_once_per_batch():
    done = run(schedule="cosine", epochs=2)  # 3 batches an epoch, 6 steps; told is the rate of the epoch's last step
    rates = [0.05 * (1 + math.cos(math.pi * k / 6)) / 2 for k in (2, 5)]
    assert [e["lr"] for e in done.told] == pytest.approx(rates, abs=1e-12)


def test_a_penalty_pulls_and_after_step_has_the_last_word():
    class Decay(Hooks):
        def penalty(self, batch, logits):
            assert len(batch["labels"]) == len(logits)
            return 100.0 * self.model.weight.square().sum()

    class Fixed(Hooks):
        calls = 0

        def after_step(self):
            self.calls += 1
            with torch.no_grad():
                self.model.weight.fill_(7.0)

    free, pulled, held = run(epochs=20), run(hooks=Decay(), epochs=20), run(hooks=Fixed(), epochs=20)
    assert pulled.model.weight.norm() < 0.5 * free.model.weight.norm()
    assert pulled.told[-1]["penalty"] > 0
    assert "penalty" not in free.told[-1]
    assert torch.equal(held.model.weight, torch.full((2, 2), 7.0))
    assert held.hooks.calls == 20 * 3  # batches of 8 from 20 points


def test_joint_training_mixes_whole_batches_of_every_task_with_their_own_prompts():
    first, second = Points(), Points()
    second.x = second.x + 100
    tasks = [
        batches_of(data, 8, Collate({"input_ids": torch.tensor([i])}), i) for i, data in enumerate((first, second))
    ]
    mixed = MixedBatches(tasks, seed=0)
    assert len(mixed) == 6
    epochs = [list(mixed), list(mixed)]
    for epoch in epochs:
        assert sorted(int(b["index"].numel()) for b in epoch) == [4, 4, 8, 8, 8, 8]
        for b in epoch:
            assert int(b["input_ids"]) == b["task"] == int(b["pixel_values"][0, 0] > 50)
        for task in (0, 1):
            assert sorted(i for b in epoch if b["task"] == task for i in b["index"].tolist()) == list(range(N))
    assert [b["task"] for b in epochs[0]] != [b["task"] for b in epochs[1]]
    assert mixed.where(epochs[0][0])[0].startswith("point-")


class Tokens:
    """Stands for a generative objective: a batch in parts, several losses a sample, no classes."""

    head = None
    task = SimpleNamespace(name="tokens")

    def __init__(self, model: nn.Linear, size: int) -> None:
        self.model, self.size = model, size

    def parts(self, batch):
        x, y = batch["pixel_values"], batch["labels"]
        return [{"x": x[i : i + self.size], "y": y[i : i + self.size]} for i in range(0, len(x), self.size)]

    def count(self, part):
        return int((part["y"] + 1).sum())  # a sample of class 1 has two losses, one of class 0 has one

    def part_loss(self, part, total):
        losses = self.model(part["x"]).square().sum(dim=1) * (part["y"] + 1)
        return losses.sum() / total, None


@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_of_a_batch_add_up_to_the_batch(size):
    def trained(size):
        torch.manual_seed(0)
        model, calls = nn.Linear(2, 2), []

        class Counting(Hooks):
            def penalty(self, batch, logits):
                calls.append(len(batch["x"]))
                return model.weight.square().sum()

        data, stream = Points(), io.StringIO()
        log = train_task(
            model, Tokens(model, size), batches_of(data, 8, Collate(), 1), training(epochs=2), hooks=Counting(),
            progress=Progress(True, stream), on_epoch=lambda entry: None,
        )  # fmt: skip
        return model.weight.detach(), log, calls

    whole, parts = trained(8), trained(size)
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-4, atol=1e-6)
    assert len(parts[2]) == len(whole[2]) == 2 * 3  # the penalty is the step's, not each part's
    for one, other in zip(whole[1].epochs, parts[1].epochs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["penalty"] == pytest.approx(other["penalty"], rel=1e-5)
        assert "train_accuracy" not in other


# ---- what must not reach a weight, and what must be told ----------------------------------------------------------------


class Spoilt(Hooks):
    """The gradient of one parameter is no number, though the loss is finite: of step ``at`` alone."""

    at, calls = 5, 0

    def penalty(self, batch, logits):
        self.calls += 1
        if self.calls != self.at:
            return None
        zero = self.model.bias.sum() * 0
        zero.register_hook(lambda gradient: gradient * torch.nan)
        return zero


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_refused_before_a_weight_moves(clip):
    hooks = Spoilt()
    with pytest.raises(TrainingError) as caught:
        run(hooks=hooks, grad_clip=clip)
    order = run().objective.order[N + 8 : N + 11]
    told = str(caught.value)
    assert "task 'plane', epoch 2, step 2: the gradient of bias holds NaN or infinity" in told
    assert f"(samples point-{order[0]}.png, point-{order[1]}.png, point-{order[2]}.png, …)" in told
    assert "keeplora resume RUN -o training.learning_rate=0.005" in told
    before = Stopped()
    with pytest.raises(KeyError):
        run(hooks=before, grad_clip=clip)
    assert torch.equal(hooks.model.weight, before.model.weight)  # as the step before left them
    assert torch.equal(hooks.model.bias, before.model.bias)


class Stopped(Hooks):
    """Leaves the loop as the fifth step begins."""

    calls = 0

    def penalty(self, batch, logits):
        self.calls += 1
        if self.calls == 5:
            raise KeyError


def test_a_gradient_s_norm_beyond_float32_is_refused_too():
    class Huge(Hooks):
        def penalty(self, batch, logits):
            return self.model.weight.sum() * 1e30

    with pytest.raises(TrainingError, match="step 1: the gradients' norm is beyond float32"):
        run(hooks=Huge())


def test_an_update_that_outgrows_its_weights_is_told_once():
    class Grown(Hooks):
        asked = 0

        def largest_update(self):
            self.asked += 1
            return "block.3.q", 0.9 if self.asked < 2 else 1.5

    hooks = Grown()
    done = run(hooks=hooks, epochs=4)
    line = (
        "task 'plane', epoch 2, step 3: the update of block.3.q has grown to 1.5 times the norm of its weights; a lower "
        "training.learning_rate is advised"
    )
    assert done.text.count(line) == 1
    assert done.text.count("has grown") == 1
    assert hooks.asked == 2  # at the end of each epoch, until it was told


# ---- a GPU whose memory is full ------------------------------------------------------------------------------------------


class Small(Plane):
    """A model whose memory holds ``most`` samples."""

    most = 3
    sizes: list[int]

    def part_loss(self, part, total):
        self.sizes.append(len(part["labels"]))
        if len(part["labels"]) > self.most:
            (self.model.weight * torch.zeros(())).sum().backward()  # part of a gradient is there already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")
        return super().part_loss(part, total)


def trained_in(most: int, hooks: Hooks | None = None, **changes):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    objective = Small(model)
    objective.most, objective.sizes = most, []
    objective.text_batch = {}
    hooks = hooks or Hooks()
    hooks.model = model
    stream, gradients = io.StringIO(), []
    config = training(epochs=2, **changes)
    inner = hooks.after_step

    def after_step():
        inner()
        gradients.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]

    hooks.after_step = after_step  # type: ignore[method-assign]
    log = train_task(
        model, objective, batches_of(Points(), 8, objective.collate, 1), config, hooks=hooks,
        progress=Progress(True, stream), on_epoch=lambda entry: None,
    )  # fmt: skip
    return SimpleNamespace(model=model, log=log, sizes=objective.sizes, text=stream.getvalue(), gradients=gradients)


@pytest.mark.parametrize(("most", "sizes"), [(3, [8, 4, 2]), (4, [8, 4]), (1, [8, 4, 2, 1])])
def test_a_full_memory_halves_the_batch_and_keeps_its_gradient(most, sizes):
    whole, parts = trained_in(8), trained_in(most)
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert parts.sizes[: len(sizes)] == sizes  # tried, and halved
    assert max(parts.sizes[len(sizes) :]) == sizes[-1]  # remembered for the rest of the task
    assert parts.text.count("the memory did not hold") == len(sizes) - 1
    assert (
        f"task 'plane', epoch 1, step 1: the memory did not hold 8 samples at once; from here on the task's batches go "
        f"through the model in parts of at most {sizes[1]}"
    ) in parts.text
    for one, other in zip(whole.log.epochs, parts.log.epochs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["train_accuracy"] == other["train_accuracy"]


def test_a_memory_that_holds_no_sample_is_a_sentence():
    with pytest.raises(KeepLoraError) as caught:
        trained_in(0)
    told = str(caught.value)
    assert told.startswith("task 'plane', epoch 1, step 1: not even one sample fits the memory (CUDA out of memory.")
    assert "more words" not in told
    assert "learning_rate" not in told


def test_a_penalty_made_of_the_batch_is_taken_of_every_part():
    class OfBatch(Hooks):
        penalty_of_batch = True

        def penalty(self, batch, logits):
            return logits.square().mean()

    class OfStep(Hooks):
        def penalty(self, batch, logits):
            return self.model.weight.square().sum()

    for hooks in (OfBatch, OfStep):
        whole, parts = trained_in(8, hooks()), trained_in(2, hooks())
        for one, other in zip(whole.gradients, parts.gradients, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert whole.log.epochs[0]["penalty"] == pytest.approx(parts.log.epochs[0]["penalty"], rel=1e-5)
