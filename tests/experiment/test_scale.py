"""The arithmetic of the scale plan against what small models, files and torch's own counter of operations say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.experiment import footprint, scale
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.footprint import Linear, ModelShape, Tower
from keeplora.experiment.training_state import LoopState, take_snapshot
from keeplora.math.subspace import right_vectors
from keeplora.tuner.adapter import TaskAdapter, random_factor
from keeplora.tuner.ledger_check import verify
from keeplora.tuner.observers import FeatureObserver, GradientObserver
from keeplora.tuner.persistence import open_ledger
from keeplora.tuner.targets import resolve_targets
from keeplora.tuner.weights import WeightStore
from tests.experiment.test_footprint import small_llava
from tests.tuner.blocks import TARGETS, loader, loss_fn, make_net, train

TOKENS, HIDDEN, INTERMEDIATE, HEADS, BLOCKS = 24, 128, 344, 4, 2
PATTERN = r"model\.language_model\..*_proj"


@pytest.fixture(scope="module")
def llava() -> Any:
    model = small_llava()
    model.set_attn_implementation("eager")  # plain products, which the counter counts one by one
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def targets(llava) -> list[Any]:
    return resolve_targets(llava, KeepLoraConfig(r=4, target_modules=PATTERN))


def linears(targets: list[Any]) -> list[Linear]:
    shared = ("k_proj", "v_proj", "up_proj")
    return [Linear(t.n_in, t.n_out, t.r, TOKENS, t.name.endswith(shared)) for t in targets]


def shape(linear: int) -> ModelShape:
    nothing = Tower(0, 0, 0, 0, 0, 0, 0, 0)
    language = Tower(BLOCKS, HIDDEN, INTERMEDIATE, HEADS, HEADS, HIDDEN // HEADS, linear, TOKENS)
    return ModelShape(1000, language, nothing, 0, 0, 100, 0, 0)


def counted(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def embedded(requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(1, TOKENS, HIDDEN, requires_grad=requires_grad)


def language(llava: Any, x: torch.Tensor) -> torch.Tensor:
    return llava.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state


# ---- operations -------------------------------------------------------------------------------------------------------


def test_forward_and_backward_are_what_torch_counts(llava, targets):
    of = shape(sum(t.n_in * t.n_out for t in targets))
    forward = counted(lambda: language(llava, embedded()))
    both = counted(lambda: language(llava, embedded(True)).sum().backward())
    assert forward == pytest.approx(footprint.forward_flops(of), rel=0.01)
    assert both - forward == pytest.approx(footprint.backward_flops(of), rel=0.01)


def test_an_adapters_share_is_what_torch_counts(llava, targets):
    plain = counted(lambda: language(llava, embedded(True)).sum().backward())
    adapter = TaskAdapter(llava, targets, {t.name: random_factor(t, torch.Generator().manual_seed(0)) for t in targets})
    try:
        adapted = counted(lambda: language(llava, embedded(True)).sum().backward())
    finally:
        adapter.remove()
    assert adapted - plain == footprint.adapter_flops(linears(targets))


def test_the_passes_over_data_are_what_torch_counts(llava, targets):
    store = WeightStore(llava, [t.name for t in targets])
    plain = counted(lambda: language(llava, embedded(True)).sum().backward())
    with GradientObserver(targets, store) as observer:
        observer.masks = {}
        exact = counted(lambda: language(llava, embedded(True)).sum().backward())
    assert exact - plain == scale.outer_flops(linears(targets))
    forward = counted(lambda: language(llava, embedded()))
    with FeatureObserver(targets, store) as features:
        features.masks = {}
        seen = counted(lambda: language(llava, embedded()))
    assert seen - forward == scale.gram_flops(linears(targets))


@pytest.mark.parametrize(("n_out", "n_in"), [(96, 80), (80, 96), (80, 80)])
def test_singular_vectors_are_two_products_at_most_and_an_eigh(n_out: int, n_in: int) -> None:
    """The counter leaves out decompositions, which are a textbook's count."""
    M = torch.randn(n_out, n_in, dtype=torch.float64)
    decomposed = footprint.eigh_flops(min(n_out, n_in))
    assert footprint.vectors_flops(Linear(n_in, n_out, 4, 1)) - decomposed == counted(lambda: right_vectors(M))


def test_a_sketch_is_what_torch_counts():
    found = Linear(40, 60, 4, TOKENS)
    rows = scale.sketch_rows(found)
    Psi, g, x = torch.randn(rows, 60), torch.randn(TOKENS, 60), torch.randn(TOKENS, 40)
    assert rows == 16
    assert counted(lambda: (Psi @ g.T) @ x) == scale.sketch_flops([found])
    assert footprint.sketch_bytes([found]) == 8 * 16 * 40 + 4 * 16 * 40 + 4 * 16 * 60
    assert scale.sketch_rows(replace(found, n_out=7)) == 7


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[ContinualLearner, Any]:
    """Three tasks on a little net, with the ledger on disk."""
    path = tmp_path_factory.mktemp("learned") / "ledger"
    config = KeepLoraConfig(r=3, target_modules=TARGETS, energy_weights=0.3, energy_features=0.8)
    learner = ContinualLearner(make_net(), config, ledger=path)
    for seed in range(3):
        batches = loader(seed=seed)
        with learner.task(f"task {seed}", batches, loss_fn) as model:
            train(model, batches)
    return learner, path


def test_a_merge_sums_every_tasks_product(learned):
    learner, _ = learned
    snapshot = learner.store.snapshot()
    last = learner.records[-1].factors
    exact = sum(2 * f.A.shape[0] * f.A.shape[1] * f.B.shape[0] for r in learner.records for f in r.factors.values())
    store = WeightStore(make_net(), [t.name for t in learner.targets])
    assert counted(lambda: store.restore(snapshot)) == exact
    shrunk = [
        [Linear(f.A.shape[1], f.B.shape[0], f.A.shape[0], 1) for f in r.factors.values()] for r in learner.records
    ]
    assert sum(scale.merge_flops(of_task, 1) for of_task in shrunk) == exact
    assert scale.merge_flops(shrunk[-1], 3) == 3 * sum(2 * f.A.numel() * f.B.shape[0] for f in last.values())
    # Where the sum of two tasks is held, the third adds its own product; where not, all are summed anew.
    store.restore({name: updates[:-1] for name, updates in snapshot.items()})
    held = store.summed()
    assert held
    wanted = [f for name, f in last.items() if name in held]
    wanted += [f for r in learner.records for name, f in r.factors.items() if name in last and name not in held]
    assert counted(lambda: store.add(last)) == sum(2 * f.A.numel() * f.B.shape[0] for f in wanted)


def test_a_sum_takes_the_place_of_its_factors_as_in_the_store():
    """The sizes of tests/tuner/test_many_tasks.py, which counts the products of eight merges: 1, 2, 1, 1, …"""
    one = [Linear(12, 12, 3, 1)]
    assert [scale.last_merge_flops(one, t) // (2 * 3 * 144) for t in range(1, 6)] == [1, 2, 1, 1, 1]
    assert [scale.update_bytes(one, t) for t in range(1, 4)] == [4 * 72, 4 * 144, 4 * 144]
    assert [scale.merge_flops(one, t) // (2 * 3 * 144) for t in range(1, 4)] == [1, 2, 3]


def test_a_verification_is_what_torch_counts(learned):
    """The formula's k is a straight line; here the true k stand in its place, and U₀ is looked at once besides."""
    learner, path = learned
    ledger = open_ledger(path)
    found = counted(lambda: verify(ledger))
    dims = [{name: p for name, (_, p) in learner.U.start_dims().items()}, *(r.used for r in learner.records)]
    expected = sum(2 * n_in * min(k, n_in - k) ** 2 for n_in, k in learner.U.start_dims().values())
    for t, record in enumerate(learner.records, start=1):
        for name, f in record.factors.items():
            r, n_in = f.A.shape
            grown = dims[t][name] ** 2 if name in record.basis else 0
            expected += 2 * n_in * (grown + r**2 + r * dims[t - 1][name])
    assert found == expected


# ---- bytes ------------------------------------------------------------------------------------------------------------


def test_an_entry_of_the_ledger_holds_what_the_formula_says(learned):
    learner, path = learned
    for number, record in enumerate(learner.records, start=1):
        (file,) = path.glob(f"{number:04d}-*/tensors.safetensors")
        with safe_open(file, framework="pt") as tensors:
            held = sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118
        same = [Linear(t.n_in, t.n_out, record.factors[t.name].A.shape[0], 1) for t in learner.targets]
        added = [record.basis[t.name].shape[1] if t.name in record.basis else 0 for t in learner.targets]
        assert any(added)
        first = {name: p for name, (_, p) in learner.U.start_dims().items()}
        valued = [record.used[t.name] - first[t.name] for t in learner.targets]
        assert held == scale.entry_bytes(same, added, valued)


def test_the_protected_subspaces_take_what_the_formula_says(learned):
    learner, _ = learned
    dims = learner.U.dims()
    assert learner.U.bytes == sum(footprint.held_bytes(t.n_in, dims[t.name]) for t in learner.targets)
    one = [Linear(40, 8, 2, 1)]
    assert [scale.basis_bytes(one, t, 0.25, 0.1) for t in (0, 2, 3, 8)] == [4 * 40 * k for k in (10, 18, 18, 0)]


def test_a_checkpoint_holds_what_the_formula_says(llava, targets):
    adapter = TaskAdapter(llava, targets, {t.name: random_factor(t, torch.Generator().manual_seed(0)) for t in targets})
    try:
        named = [(n, p) for n, p in adapter.peft_model.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        optimizer = torch.optim.AdamW(parameters)
        language(llava, embedded()).sum().backward()
        optimizer.step()
        tensors, _ = take_snapshot(LoopState(), [n for n, _ in named], parameters, optimizer)
        A = sum(a.nbytes for a in adapter.A0.values())
        held = A + sum(
            t.nbytes for name, t in tensors.items() if not name.startswith("rng/") and not name.endswith("/step")
        )
    finally:
        adapter.remove()
    trained, frozen = (sum(getattr(t, side) * t.rank for t in linears(targets)) for side in ("n_out", "n_in"))
    assert held == scale.checkpoint_bytes(trained, frozen)


# ---- the plan ---------------------------------------------------------------------------------------------------------


def test_a_ledger_is_the_sum_of_its_entries(targets):
    found = linears(targets)
    k = [[scale.columns(t.n_in, n, 0.25, 0.03) for t in found] for n in range(6)]
    entries = sum(
        scale.entry_bytes(found, [b - a for a, b in zip(k[n - 1], k[n])], [b - a for a, b in zip(k[0], k[n])])
        for n in range(1, 6)
    )
    assert scale.ledger_bytes(found, 5, 0.25, 0.03) == scale.basis_bytes(found, 0, 0.25, 0.03) + entries


def test_where_the_basis_turns_and_ends():
    assert scale.turning_points(0.25, 0.0005) == (500, 1500)
    assert scale.turning_points(0.6, 0.1) == (0, 4)
    assert scale.turning_points(0.5, 0.0) is None
    k = [scale.columns(4096, t, 0.25, 0.0005) for t in (499, 501, 1499, 1500)]
    assert k[0] < 2048 < k[1]
    assert k[2] < 4096 == k[3]


def test_the_phases_of_a_plan_add_up(targets):
    of, load = shape(sum(t.n_in * t.n_out for t in targets)), scale.Load(10, 100, 2, 20, 30, 2, False)
    assume = Assumptions(tokens=TOKENS, k=0.25, growth=0.01)
    found = {p.name: p for p in scale.phases(of, linears(targets), load, assume, "fp32")}
    per_sample = footprint.forward_flops(of) + footprint.backward_flops(of) + 4 * HIDDEN * 100 * 20
    step = per_sample + footprint.adapter_flops(linears(targets))
    assert found["training"].flops == 200 * step
    assert found["gradient pass, exact"].flops == 20 * (per_sample + scale.outer_flops(linears(targets)))
    assert found["gradient pass, exact"].device > found["gradient pass, sketched"].device
    assert found["merge, at the last task"].flops == scale.last_merge_flops(linears(targets), 10)
    assert found["the whole ledger"].disk == scale.ledger_bytes(linears(targets), 10, 0.25, 0.01)
    assert all(phase.seconds > 0 for phase in found.values())
    exact, sketched = (scale.totals(list(found.values()), load, sketch=sketch) for sketch in (False, True))
    assert exact[0] - sketched[0] == 10 * (
        found["gradient pass, exact"].flops + found["A of exact gradients: singular vectors"].flops
        - found["gradient pass, sketched"].flops - found["A of sketched gradients: singular vectors"].flops
    )  # fmt: skip


def test_modules_of_the_counter_are_the_linears(llava, targets):
    assert all(isinstance(llava.get_submodule(t.name), nn.Linear) for t in targets)
    assert len(targets) == 7 * BLOCKS
