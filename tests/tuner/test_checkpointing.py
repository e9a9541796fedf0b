"""Gradient checkpointing and low precision: every sample counts once, and the model is given back as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from keeplora.tuner.observers import FeatureObserver, GradientObserver
from keeplora.tuner.passes import collect_features, collect_gradients
from tests.models.tiny_generative import tiny
from tests.tuner.blocks import hooks
from tests.tuner.llama import batches, config, load, mean_loss, token_losses, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA and two batches with pictures in them."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        tiny("llava", tmp_path_factory.mktemp("llava") / "m"), dtype=torch.float32
    ).eval()
    settings = model.config
    side, patch = settings.vision_config.image_size, settings.vision_config.patch_size
    with torch.no_grad():
        places = model.get_image_features(pixel_values=torch.zeros(1, 3, side, side))
    count = len(places[0]) if isinstance(places, (list, tuple)) else places.pooler_output[0].shape[0]
    assert count in ((side // patch) ** 2, (side // patch) ** 2 + 1)
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(2):
        words = torch.randint(10, 40, (2, 9), generator=generator)
        ids = torch.cat([torch.full((2, count), settings.image_token_id), words], dim=1)
        data.append({
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "labels": ids.clone().index_fill_(1, torch.arange(count + 4), -100),
            "pixel_values": torch.randn(2, 3, side, side, generator=generator),
        })  # fmt: skip
    return model, data


def llava_losses(model: nn.Module, batch) -> torch.Tensor:
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    out = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(out[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return losses[labels != -100]


def enable(model: nn.Module, reentrant: bool) -> None:
    start = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
    (start or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def blocks_run(model: nn.Module, path: str) -> list[int]:
    """Counts how often a module inside a block is computed (transformers checkpoints within the block's own forward)."""
    calls: list[int] = []
    block = model.get_submodule(path)
    forward = block.forward
    block.forward = lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
    return calls


def in_training_mode(model: nn.Module, learner: ContinualLearner, data, losses) -> tuple[dict, dict]:
    """G and C by the hooks alone while checkpointing is at work: it never is in evaluation mode."""
    model.train()
    with GradientObserver(learner.targets, learner.store) as gradients:
        for batch in data:
            losses(model, batch).sum().backward()
    with torch.no_grad(), FeatureObserver(learner.targets, learner.store) as features:
        for batch in data:
            losses(model, batch)
    model.zero_grad()
    model.eval()
    return gradients.G, {t.name: features.C(t.name) for t in learner.targets}


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name
        assert expected[name].norm() > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_every_sample_counts_once(family, reentrant, request):
    if family == "llama":
        model, data, losses, block = load(), batches(), token_losses, "model.layers.0.mlp"
    else:
        model, data = request.getfixturevalue("llava")
        model, losses, block = copy.deepcopy(model), llava_losses, "model.language_model.layers.0.mlp"
    parts = r".*(language_model|layers).*\.(q_proj|k_proj|o_proj|up_proj|down_proj)"
    learner = ContinualLearner(model, config(target_modules=parts, exclude_modules=r".*vision.*"))
    plain = collect_gradients(model, learner.targets, learner.store, data, losses)
    plain_C = collect_features(model, learner.targets, learner.store, data, losses)
    trained = in_training_mode(model, learner, data, losses)
    enable(model, reentrant)
    assert_close(collect_gradients(model, learner.targets, learner.store, data, losses), plain)
    again = collect_features(model, learner.targets, learner.store, data, losses)
    assert_close(
        {t.name: again.C(t.name) for t in learner.targets}, {t.name: plain_C.C(t.name) for t in learner.targets}
    )
    calls = blocks_run(model, block)
    recomputed = in_training_mode(model, learner, data, losses)
    assert len(calls) == 3 * len(data), "the blocks were not computed again, so the test shows nothing"
    for found, expected in zip(recomputed, trained, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_frozen_A_is_the_same_with_checkpointing(reentrant):
    """Two tasks in training mode: the same factors as without, A as it was set, and nothing left behind."""
    results = []
    for on in (False, True):
        model = load()
        if on:
            enable(model, reentrant)
        before = hooks(model)
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        checkpointing = {
            n: m.gradient_checkpointing for n, m in model.named_modules() if hasattr(m, "gradient_checkpointing")
        }
        learner = ContinualLearner(model, config())
        for i, name in enumerate("ab"):
            data = batches(i)
            with learner.task(name, data, token_losses) as peft_model:
                peft_model.train()
                calls = blocks_run(model, "model.layers.1.mlp")
                mean_loss(peft_model, data[0]).backward()
                assert len(calls) == (2 if on else 1)
                del model.get_submodule("model.layers.1.mlp").forward
                train(peft_model, data, lr=0.01)
                peft_model.eval()
            assert hooks(model) == before
            assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
            assert checkpointing == {
                n: m.gradient_checkpointing for n, m in model.named_modules() if hasattr(m, "gradient_checkpointing")
            }
        assert learner.audit().passed
        results.append(learner)
    for a, b in zip(results[0].records, results[1].records, strict=True):
        for name in a.factors:
            assert torch.allclose(a.factors[name].A, b.factors[name].A, atol=1e-4)
            assert torch.allclose(a.factors[name].B, b.factors[name].B, atol=1e-3)
            assert a.factors[name].B.abs().max() > 0.005


def test_nothing_below_the_shallowest_target_runs_backwards():
    """Blocks are computed again only where a gradient passes; embeddings and lower weights never get one."""
    for reentrant, again in ((False, 1), (True, 2)):
        model = load()
        enable(model, reentrant)
        if not reentrant:
            model.disable_input_require_grads()  # as `Generative.gradient_checkpointing`; PEFT would ask again
        learner = ContinualLearner(model, config(target_modules=r".*layers\.1\..*(q_proj|down_proj)"))
        data = batches()
        with learner.task("a", data, token_losses) as peft_model:
            peft_model.train()
            lower, upper = (blocks_run(model, f"model.layers.{i}.mlp") for i in (0, 1))
            inputs = []
            watch = model.model.layers[1].register_forward_pre_hook(lambda m, args, seen=inputs: seen.append(args[0]))
            mean_loss(peft_model, data[0]).backward()
            watch.remove()
            assert (len(lower), len(upper)) == (again, 2), reentrant
            # A reentrant checkpoint passes no gradient on unless its input asks for one.
            assert inputs[0].requires_grad == reentrant
            assert model.get_input_embeddings().weight.grad is None
            trained = [p for p in peft_model.parameters() if p.requires_grad]
            assert all(p.grad is not None for p in trained)
            assert all(p.grad is None for p in peft_model.parameters() if not p.requires_grad)
            for i in (0, 1):
                del model.get_submodule(f"model.layers.{i}.mlp").forward


def test_low_precision_statistics_are_close_and_kept_in_double(llava):
    for model, data, losses, pattern in (
        (load(), batches(), token_losses, ".*layers.*_proj"),
        (llava[0], llava[1], llava_losses, r".*language_model\.layers.*_proj"),
    ):
        low = copy.deepcopy(model).to(torch.bfloat16)
        half = [{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in b.items()} for b in data]
        found = []
        for one, items in ((model, data), (low, half)):
            learner = ContinualLearner(one, config(target_modules=pattern))
            G = collect_gradients(one, learner.targets, learner.store, items, losses)
            observer = collect_features(one, learner.targets, learner.store, items, losses)
            found.append((G, {t.name: observer.C(t.name) for t in learner.targets}))
        for exact, rounded in zip(*found, strict=True):
            for name in exact:
                assert exact[name].dtype == rounded[name].dtype == torch.float64
                assert torch.isfinite(rounded[name]).all()
                assert (exact[name] - rounded[name]).norm() < 0.06 * exact[name].norm(), name
                assert not torch.equal(exact[name], rounded[name])
