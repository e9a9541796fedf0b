"""A from a sketch of the gradient: the same sums as Ψ G of the exact one, the rule for "auto", and whole tasks of it."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.errors import CapacityError, ConfigError
from keeplora.math import sketch_matrix
from keeplora.tuner import sketching
from keeplora.tuner.passes import collect_gradients
from keeplora.tuner.sketching import SketchObserver, gradient_mode
from tests.models import tiny
from tests.tuner import llama
from tests.tuner.blocks import Samples, config, learn, loader, loss_fn, make_net, per_sample, same, train, weights
from tests.tuner.test_memory import Memory

SKETCH: dict[str, Any] = {"residual_gradient": "sketch", "sketch_oversampling": 2}


def both(model: nn.Module, settings: KeepLoraConfig, data: Any, loss: Any, mask_fn: Any = None, **kwargs: Any) -> Any:
    """(G, Z, Ψ per target)."""
    learner = ContinualLearner(model, settings)
    more = (mask_fn,) if mask_fn else ()
    G = collect_gradients(model, learner.targets, learner.store, data, loss, *more)
    made: list[SketchObserver] = []

    def observe(targets: Any, store: Any) -> SketchObserver:
        made.append(SketchObserver(targets, store, oversampling=2, key="k"))
        return made[-1]

    Z = collect_gradients(model, learner.targets, learner.store, data, loss, *more, observe=observe, **kwargs)
    return G, Z, {t.name: made[-1]._matrix(t, torch.device("cpu")) for t in learner.targets}


def check(G: Any, Z: Any, Psi: Any, tolerance: float = 1e-5) -> None:
    assert G.keys() == Z.keys() == Psi.keys()
    for name, z in Z.items():
        assert z.dtype == torch.float64
        assert z.shape == (min(5, G[name].shape[0]), G[name].shape[1])
        expected = Psi[name].double() @ G[name]
        assert float((z - expected).norm()) <= tolerance * float(G[name].norm()), name
        assert float(z.norm()) > 0


def test_it_is_the_sketch_of_the_gradient_in_any_batches():
    for size in (1, 3, 10):
        check(*both(make_net(), config(), loader(batch_size=size), per_sample))


def test_weighted_positions_padding_and_a_language_model():
    weighted = lambda b: {"": b["attention_mask"] * torch.linspace(0.5, 2, b["attention_mask"].shape[1])}  # noqa: E731
    for mask_fn in (None, weighted):
        check(*both(llama.load(), llama.config(), llama.batches(), llama.token_losses, mask_fn))


def test_under_autocast_it_is_summed_in_float32():
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    check(*both(make_net(), config(), loader(), loss))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointed_blocks_every_sample_counts_once(reentrant):
    model: Any = llama.load()
    learner = ContinualLearner(model, llama.config())
    exact = collect_gradients(model, learner.targets, learner.store, llama.batches(), llama.mean_loss)
    start = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
    (start or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    with SketchObserver(learner.targets, learner.store, oversampling=2) as observer:
        for batch in llama.batches():
            llama.mean_loss(model, batch).mul(len(batch["labels"])).backward()
    total = sum(len(batch["labels"]) for batch in llama.batches())
    Psi = {t.name: observer._matrix(t, torch.device("cpu")) for t in learner.targets}
    check(exact, {name: z / total for name, z in observer.G.items()}, Psi)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_on_a_quantised_base(kind):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    check(*both(llama.load(kind), llama.config(), llama.batches(), llama.token_losses))


def test_a_full_memory_gives_the_same_factors():
    def begun(loss: Any) -> dict[str, torch.Tensor]:
        learner = ContinualLearner(make_net(blocks=3), config(**SKETCH))
        learner.start_task("a", DataLoader(Samples(12, 4), batch_size=12), loss)
        assert learner._open is not None
        assert learner._open.adapter is not None
        return learner._open.adapter.A0

    whole = begun(loss_fn)
    with pytest.warns(UserWarning, match="the gradient pass did not fit the memory"):
        small = begun(Memory(3))
    for name, A in whole.items():
        torch.testing.assert_close(A.T @ A, small[name].T @ small[name], rtol=0, atol=1e-4)


def test_one_matrix_per_height_and_another_for_every_task_and_seed():
    net = make_net()
    learner = ContinualLearner(net, config())
    by_name = {t.name: t for t in learner.targets}
    cpu = torch.device("cpu")
    make = partial(SketchObserver, learner.targets, learner.store, oversampling=1)
    one = make(key="0/a")
    q, other_q = (by_name[f"encoder.layers.{i}.q"] for i in (0, 1))
    assert one._matrix(q, cpu) is one._matrix(other_q, cpu)
    assert torch.equal(one._matrix(q, cpu), make(key="0/a")._matrix(q, cpu))
    for key in ("0/b", "1/a"):
        assert not torch.equal(one._matrix(q, cpu), make(key=key)._matrix(q, cpu))


def opened(**kwargs: Any) -> ContinualLearner:
    learner = ContinualLearner(make_net(), config(**kwargs))
    learner.start_task("a", loader(), loss_fn)
    return learner


def factors(learner: ContinualLearner) -> dict[str, torch.Tensor]:
    assert learner._open is not None
    assert learner._open.adapter is not None
    return learner._open.adapter.A0


def test_the_same_seed_gives_the_same_A_and_the_record_says_how_it_was_made():
    exact, one, again, other = opened(), opened(**SKETCH), opened(**SKETCH), opened(**SKETCH, seed=1)
    assert same(factors(one), factors(again))
    assert not same(factors(one), factors(other))
    assert not same(factors(one), factors(exact))
    assert not same(factors(one), factors(opened(**{**SKETCH, "sketch_oversampling": 0})))
    for learner, mode in ((exact, "exact"), (one, "sketch")):
        record = learner.finish_task()
        assert record is not None
        assert record.info["residual_gradient"] == mode
        assert learner.audit().passed


def test_auto_is_exact_up_to_a_fixed_size(monkeypatch):
    shapes = [(12, 12), (12, 18)]
    exactly = 8 * 12 * (12 + 18)
    for limit, mode in ((exactly, "exact"), (exactly - 1, "sketch")):
        monkeypatch.setattr(sketching, "EXACT_BYTES", limit)
        assert gradient_mode(KeepLoraConfig(), shapes) == mode
        assert gradient_mode(KeepLoraConfig(residual_gradient="exact"), shapes) == "exact"
        assert gradient_mode(KeepLoraConfig(residual_gradient="sketch"), shapes) == "sketch"
        assert gradient_mode(KeepLoraConfig(memory="gradients"), shapes) == "exact"  # M8g holds them all anyway
    monkeypatch.setattr(sketching, "EXACT_BYTES", 0)
    assert same(factors(opened(sketch_oversampling=2)), factors(opened(**SKETCH)))


def test_the_exact_mode_is_the_default_and_unchanged_bit_for_bit():
    assert same(factors(opened()), factors(opened(residual_gradient="exact", sketch_oversampling=5)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"residual_gradient": "sketched"}, r"residual_gradient: unknown mode 'sketched'.*did you mean 'sketch'"),
        ({"sketch_oversampling": -1}, "sketch_oversampling must be an integer of at least 0, or None for 3 r, got -1"),
        ({"sketch_oversampling": 1.5}, "sketch_oversampling must be an integer"),
        (
            {"residual_gradient": "sketch", "memory": "gradients"},
            "sketch never holds a whole gradient.*set memory: feat",
        ),
    ],
)
def test_bad_settings_are_a_sentence(values, message):
    with pytest.raises(ConfigError, match=message):
        KeepLoraConfig(**values)


def test_ranks_shrink_and_full_layers_refuse_as_with_the_exact_gradient():
    found = []
    for more in ({}, SKETCH):
        learner = opened(**more, r=7)
        learner.finish_task()
        learner.start_task("b", loader(seed=0), loss_fn)
        assert learner._open is not None
        found.append([learner._open.info["rank_shrunk"], {name: len(A) for name, A in factors(learner).items()}])
        # Every direction that the data uses is protected: what is left of Ψ G is rounding noise, and no rank is made of it.
        full = opened(**more, energy_weights=0.0, energy_features=1.0)
        full.finish_task()
        with pytest.raises(CapacityError, match="no target has residual space left"):
            full.start_task("b", loader(seed=0), loss_fn)
    assert found[0] == found[1]
    assert found[0][0]


def test_a_ledger_of_sketched_tasks_is_opened_and_gone_on_with(tmp_path):
    straight = ContinualLearner(make_net(), config(**SKETCH), ledger=tmp_path / "ledger")
    torch.manual_seed(1)
    learn(straight, "a", 0)
    again = ContinualLearner.from_pretrained(
        shutil.copytree(tmp_path / "ledger", tmp_path / "copy"), make_net(), append=True
    )
    assert again.config == straight.config
    assert again.records[0].info["residual_gradient"] == "sketch"
    for learner in (straight, again):
        torch.manual_seed(2)
        learn(learner, "b", 1)
    assert same(weights(straight.model), weights(again.model))


def test_a_task_goes_on_in_another_process_without_another_pass():
    learner = opened(**SKETCH)
    saved = learner.task_state()
    passes = []

    def counted(model: nn.Module, batch: Any) -> torch.Tensor:
        passes.append(model)
        return loss_fn(model, batch)

    other = ContinualLearner(make_net(), config(**SKETCH))
    other.start_task("a", loader(), counted, saved=saved)
    assert passes == []
    assert same(factors(learner), factors(other))
    for one in (learner, other):
        torch.manual_seed(1)
        train(one.model, loader())
        record = one.finish_task()
        assert record is not None
        assert record.info["residual_gradient"] == "sketch"
    assert same(weights(learner.model), weights(other.model))


@pytest.mark.parametrize("family", ["clip", "llava"])
def test_a_vision_language_model_from_start_to_end(family, tmp_path):
    if family == "clip":
        from tests.methods.lifecycle import check_lifecycle

        folder = tiny.make_tiny("clip", tmp_path / "model")
        check_lifecycle("keeplora++", folder, tmp_path / "out", residual_gradient="sketch")
        return
    from tests.methods import generative, test_generative

    folder = generative.save_model("llava", tmp_path / "model")
    world = generative.World("llava", folder)
    learner = test_generative.make_learner("keeplora++", world, residual_gradient="sketch")
    for name in ("one", "two"):
        task = generative.GenerationTask(world, name)
        start = task.mean_loss()
        generative.train(learner, task.start(learner, name), task, lr=2e-2)
        learner.finish_task()
        assert task.mean_loss() < start - 0.05, "nothing was learned"
    assert learner.audit().passed
    other, again = test_generative.reopen(learner, "llava", folder, learner.save_pretrained(tmp_path / "out"))
    assert same(weights(other.model), weights(world.model))
    assert [r.info["residual_gradient"] for r in again.records] == ["sketch", "sketch"]
    starts = []
    for one, at in ((learner, world), (again, other)):
        generative.GenerationTask(at, "one").start(one, "three")
        starts.append(factors(one))
    assert same(*starts)


def test_a_matrix_is_drawn_from_all_of_its_key():
    """Two layers of one height but another rank have matrices of their own."""
    net = make_net()
    one = ContinualLearner(net, config(r=1)).targets[0]
    two = ContinualLearner(make_net(), config(r=2)).targets[0]
    observer = SketchObserver([one], ContinualLearner(net, config()).store, oversampling=1)
    a, b = (observer._matrix(t, torch.device("cpu")) for t in (one, two))
    assert (len(a), len(b)) == (2, 3)
    assert not torch.allclose(a[0] * (len(a) / len(b)) ** 0.5, b[0])
    assert not torch.equal(a, sketch_matrix(12, 2, 0))
