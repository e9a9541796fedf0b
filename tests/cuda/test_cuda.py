"""What must hold on a GPU: the same task as on the CPU, in bf16 too, everything on its layer's device, resumed and reopened.

Skipped where torch finds no CUDA device. Products are in full fp32 here (no TF32), as the statistics are in any run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.experiment import Experiment
from keeplora.math.angles import principal_angles
from tests.cli.tiny_world import World, ledger_tensors, the_world
from tests.tuner import llama

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

MODES = {
    "exact": {},
    "sketch": {"residual_gradient": "sketch"},
    "gradient memory": {"memory": "gradients"},
    "rows in place of C": {"covariance_sketch": 16},
    "fewer samples": {"statistics_tolerance": 0.3},
}


@pytest.fixture(autouse=True)
def _full_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def moved(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return llama.token_losses(model, moved(batch, model))


def learn(learner: ContinualLearner, name: str, seed: int, autocast: bool = False) -> None:
    """One task of SGD: AdamW would blow the rounding of a small gradient up to a step."""
    data = llama.batches(seed)
    with learner.task(name, data, losses) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            for batch in data:
                optimizer.zero_grad()
                context = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
                with context:
                    losses(model, batch).mean().backward()
                optimizer.step()


def two_tasks(
    device: str, dtype: torch.dtype = torch.float32, ledger: Path | None = None, **settings: Any
) -> ContinualLearner:
    learner = ContinualLearner(llama.load(dtype=dtype).to(device), llama.config(**settings), ledger=ledger)
    learn(learner, "first", 0)
    learn(learner, "second", 1)
    return learner


def largest(U: Tensor, V: Tensor) -> float:
    """Of the principal angles between the spans of the columns, in radians."""
    return max(principal_angles(U, V).tolist(), default=0.0)


def projector(columns: Tensor) -> Tensor:
    columns = columns.double().cpu()
    return columns @ columns.T


@pytest.mark.parametrize("mode", MODES)
def test_the_same_task_as_on_the_cpu(mode: str) -> None:
    found, wanted = (two_tasks(device, **MODES[mode]) for device in ("cuda", "cpu"))
    for name in llama.LAYERS:
        assert found.model.get_submodule(name).weight.device.type == "cuda"
        assert found.U[name].shape == wanted.U[name].shape, name
        assert torch.allclose(projector(found.U[name]), projector(wanted.U[name]), atol=1e-3), name
        ours, theirs = (side.store.current(name).cpu() for side in (found, wanted))
        moved_by = float((theirs - llama.load().get_submodule(name).weight.detach()).norm())
        assert float((ours - theirs).norm()) <= 0.01 * moved_by, name


@pytest.mark.parametrize("mode", MODES)
def test_decomposed_on_the_gpu_as_on_the_cpu(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model on the GPU, its layers decomposed there and on the CPU; of the first task, whose statistics are the same."""
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    sides = []
    for place in ("auto", "cpu"):
        learner = ContinualLearner(llama.load().cuda(), llama.config(**MODES[mode], linear_algebra=place))
        assert learner.algebra.device(torch.device("cuda", 0)).type == ("cuda" if place == "auto" else "cpu")
        U0 = {name: learner.U[name] for name in llama.LAYERS}
        learn(learner, "first", 0)
        sides.append((learner, U0))
    (found, U0), (wanted, V0) = sides
    for name in llama.LAYERS:
        assert U0[name].device.type == "cpu"
        assert U0[name].shape == V0[name].shape, name
        assert largest(U0[name], V0[name]) <= 1e-3, name
        one, other = (side.records[0].factors.get(name) for side in (found, wanted))
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert one.A.device.type == "cpu"
            assert one.A.shape == other.A.shape, name
            assert largest(one.A.T, other.A.T) <= 1e-3, name
            assert float((one.A.double() @ U0[name].double()).abs().max() if U0[name].numel() else 0.0) <= 1e-6, name
        assert found.records[0].basis[name].shape == wanted.records[0].basis[name].shape, name
        assert largest(found.U[name], wanted.U[name]) <= 1e-3, name


def test_a_gpu_without_room_for_a_decomposition_leaves_it_to_the_cpu() -> None:
    """In a process of its own: it limits what torch may take of the device."""
    script = """
import warnings
import torch
from torch import nn
from keeplora import ContinualLearner, KeepLoraConfig
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).cuda()  # float64 of it takes 32 MiB
def bases(place, room):
    config = KeepLoraConfig(r=2, target_modules=["0"], energy_weights=0.5, linear_algebra=place)
    learner = ContinualLearner(model, config)
    if room:
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + room
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        U = learner.U["0"]
    torch.cuda.set_per_process_memory_fraction(1.0)
    return U, [str(w.message) for w in said if "did not decompose 0" in str(w.message)]
short, said = bases("auto", 48 * 2**20)
wanted, silent = bases("cpu", 0)
assert len(said) == 1 and not silent, (said, silent)
assert torch.equal(short, wanted)
print("same")
"""
    environment = {**os.environ, "KEEPLORA_NO_CACHE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, env=environment)
    assert "same" in done.stdout, done.stderr[-2000:]


def test_bf16_weights_learn_inside_the_residual_and_come_back() -> None:
    before = {n: p.clone() for n, p in llama.load(dtype=torch.bfloat16).cuda().named_parameters()}
    learner = two_tasks("cuda", torch.bfloat16)
    start = ContinualLearner(llama.load(dtype=torch.bfloat16).cuda(), llama.config())
    for name, factors in learner.records[0].factors.items():
        A, U = factors.A.double().cpu(), start.U[name].double().cpu()
        assert float((A @ U).norm() / A.norm()) < 1e-5, name
    moved_by = sum(float((p - before[n]).float().norm()) for n, p in learner.model.named_parameters() if n in before)
    assert moved_by > 0
    learner.rollback(0)
    for name, p in learner.model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, before[name]), name


def test_bf16_autocast_learns_what_fp32_learns() -> None:
    learners = []
    for autocast in (True, False):
        learner = ContinualLearner(llama.load().cuda(), llama.config())
        learn(learner, "first", 0, autocast)
        learners.append(learner)
    start = llama.load()
    for name in llama.LAYERS:
        half, whole = (side.store.current(name).cpu() for side in learners)
        assert float((half - whole).norm()) <= 0.1 * float((whole - start.get_submodule(name).weight).norm()), name


def test_a_ledger_opens_on_the_other_device(tmp_path: Path) -> None:
    for here, there in (("cuda", "cpu"), ("cpu", "cuda")):
        learner = two_tasks(here, ledger=tmp_path / here)
        wanted = llama.logits(learner.model.cpu())
        again = ContinualLearner.from_pretrained(tmp_path / here, llama.load().to(there))
        assert torch.allclose(llama.logits(again.model.cpu()), wanted, atol=1e-4)


def test_a_compiled_model_learns_the_same(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found, wanted = (ContinualLearner(llama.load().cuda(), llama.config()) for _ in range(2))
    data = [moved(batch, found.model) for batch in llama.batches(0)]
    for learner, compiled in ((found, True), (wanted, False)):
        with learner.task("first", data, losses) as model:
            run = torch.compile(model) if compiled else model
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            for batch in data:
                optimizer.zero_grad()
                llama.token_losses(run, batch).mean().backward()
                optimizer.step()
    for name in llama.LAYERS:
        a, b = found.store.current(name), wanted.store.current(name)
        assert float((a - b).norm()) <= 0.01 * float((b - llama.load().get_submodule(name).weight.detach()).norm()), (
            name
        )


def test_layers_that_accelerate_offloads_are_refused() -> None:
    """A map of a GPU and the CPU leaves the CPU's layers without weights between their calls."""
    from accelerate import dispatch_model

    spread = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "model.rotary_emb": 0,
              "lm_head": 0}  # fmt: skip
    mapped = dispatch_model(llama.load(), spread, main_device=0, force_hooks=True)
    with pytest.raises(KeepLoraError, match=r"model\.layers\.1\..* is offloaded and not in memory"):
        _ = ContinualLearner(mapped, llama.config()).U


def test_covariances_move_to_the_cpu_when_the_gpu_is_full() -> None:
    """In a process of its own: it limits what torch may take of the device."""
    script = """
import torch
from torch import nn
from keeplora import ContinualLearner, KeepLoraConfig
width, blocks = 2048, 12  # C of a layer takes 16 or 32 MiB
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 8, bias=False) for _ in range(blocks))
    def forward(self, x):
        return sum(layer(x) for layer in self.layers)
torch.manual_seed(0)
model = Net().cuda()
x = torch.randn(64, width)
data = [(x[:32],), (x[32:],)]
loss = lambda m, b: m(b[0].cuda()).square().mean(-1)
def bases(limit):
    config = KeepLoraConfig(r=2, target_modules=r".*layers\\.\\d+", energy_weights=0.0, energy_features=0.9)
    learner = ContinualLearner(model, config)
    with learner.task("t", data, loss) as m:
        if limit:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return [learner.U[n].cpu() for n in sorted(learner.U)]
short = bases(torch.cuda.memory_allocated() + 150 * 2**20)
whole = bases(None)
assert all(torch.allclose(a @ a.T, b @ b.T, atol=1e-3) for a, b in zip(short, whole, strict=True))
print("same")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert "same" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    "method", ["keeplora++", "lora", "o-lora", "ewc", "replay", "keeplora++-cls", "gpm-lora", "inflora"]
)
def test_a_run_gives_the_matrix_of_the_cpu(method: str, world: World, tmp_path: Path) -> None:
    """Within a picture or two of 42: rounding may turn a near tie."""
    results = {}
    for device in ("cuda", "cpu"):
        config = world.config(method=method, device=device, output=str(tmp_path / device))
        results[device] = Experiment(config, quiet=True).run()
    for ours, theirs in zip(results["cuda"]["accuracy"], results["cpu"]["accuracy"], strict=True):
        assert ours == pytest.approx(theirs, abs=9.0)
    cost = results["cuda"]["cost"]
    assert cost["peak_memory_bytes"] > 0


def test_a_killed_run_goes_on_where_it_was(world: World, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    Experiment(world.config(device="cuda", output=str(straight)), quiet=True).run()
    path = tmp_path / "killed"
    config = world.yaml(tmp_path / "c.yaml", device="cuda", output=str(path), training={"epochs": 2, "batch_size": 8})
    process = subprocess.Popen(
        [sys.executable, "-m", "keeplora", "run", str(config), "--quiet"], start_new_session=True
    )
    while process.poll() is None and not list((path / "ledger").glob("0001-*/record.json")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    Experiment.resume(path, quiet=True)
    ours, theirs = ledger_tensors(path), ledger_tensors(straight)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if value.is_floating_point() and "/U" not in key:
            assert torch.allclose(ours[key].float(), value.float(), atol=1e-2), key


@pytest.mark.parametrize("kind", ["llava", "qwen2-5-vl"])
def test_questions_are_learned_and_answered(kind: str, tmp_path: Path) -> None:
    from tests.experiment.generation_world import make_world

    config = {**make_world(tmp_path / "world", kind), "device": "cuda", "output": str(tmp_path / "run")}
    config["training"] = {**config["training"], "precision": "bf16"}
    results = Experiment(config, quiet=True).run()
    assert len(results["accuracy"]) == 3
    assert list((tmp_path / "run").glob("predictions/*"))
