"""Where layers are decomposed: the device chosen, what a GPU fails at done on the CPU, and nothing left on the device.

"cpu:0" stands in for a GPU: a device of its own by name, on which the CPU computes.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from keeplora import ContinualLearner
from keeplora.errors import ConfigError
from keeplora.tuner import basis_cache, convergence, protect, statistics
from keeplora.tuner.linear_algebra import CPU, LinearAlgebra
from tests.tuner.blocks import config, loader, loss_fn, make_net, train

GPU = torch.device("cpu", 0)


class OnGpu(LinearAlgebra):
    def device(self, lies: torch.device) -> torch.device:
        return GPU if self.setting == "auto" else CPU


@pytest.mark.parametrize(("kind", "wanted"), [("cuda", "cuda"), ("mps", "cpu"), ("cpu", "cpu"), ("meta", "cpu")])
def test_the_device_is_the_matrix_s_where_it_decomposes_in_float64(kind: str, wanted: str) -> None:
    assert LinearAlgebra("auto").device(torch.device(kind)).type == wanted
    assert LinearAlgebra("cpu").device(torch.device(kind)) == CPU


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear_algebra: unknown place 'gpu'"):
        config(linear_algebra="gpu")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), torch.linalg.LinAlgError("linalg.eigh: failed to converge"),
     RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR")],
)  # fmt: skip
def test_what_the_gpu_fails_at_is_done_on_the_cpu_and_said_once(error: Exception) -> None:
    algebra, asked = OnGpu(), []

    def work(name: str, device: torch.device) -> str:
        asked.append((name, device))
        if device == GPU and name != "b":
            raise error
        return f"{name} on {device}"

    with pytest.warns(UserWarning, match=r"did not decompose a \("):
        found = algebra.over_layers(work, ["a", "b", "c"], lambda name: GPU)
    assert found == ["a on cpu", "b on cpu:0", "c on cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert algebra.one("c", GPU, lambda device: work("c", device)) == "c on cpu"
    assert sorted(asked[:5], key=str) == sorted([("a", GPU), ("b", GPU), ("c", GPU), ("a", CPU), ("c", CPU)], key=str)


def test_any_other_error_is_raised() -> None:
    def work(name: str, device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        OnGpu().over_layers(work, ["a"], lambda name: GPU)


def test_float32_products_on_a_gpu_are_in_full() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert OnGpu().one("a", GPU, lambda device: matmul.fp32_precision) == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


# ---- the learner ---------------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "gradient memory": {"memory": "gradients"},
    "kept covariance": {"keep_covariance": True},
    "fewer samples": {"statistics_tolerance": 0.9},
}


def learned(**settings: Any) -> ContinualLearner:
    torch.manual_seed(0)
    net = make_net()
    learner = ContinualLearner(net, config(**settings))
    for seed in (1, 2):
        data = loader(seed)
        with learner.task(f"task {seed}", data, loss_fn) as model:
            train(model, data)
    return learner


def tensors_of(learner: ContinualLearner) -> list[Tensor]:
    found = [learner.U[t.name] for t in learner.targets]
    for record in learner.records:
        found += [*(f.A for f in record.factors.values()), *record.basis.values(), *record.values.values()]
        found += record.covariance.values()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_learner_decomposes_on_the_gpu_and_keeps_nothing_there(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = learned(**MODES[mode])
    monkeypatch.setattr("keeplora.tuner.learner.LinearAlgebra", OnGpu)
    found, refused = learned(**MODES[mode]), learned(**MODES[mode], linear_algebra="cpu")
    for one, other, third in zip(tensors_of(found), tensors_of(wanted), tensors_of(refused), strict=True):
        assert one.device == CPU
        assert torch.equal(one, other)
        assert torch.equal(third, other)


@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_that_is_full_gives_the_cpu_s_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions themselves fail on it, whoever calls them: what they were given must still be there for the CPU."""
    wanted = learned(**MODES[mode])
    monkeypatch.setattr("keeplora.tuner.learner.LinearAlgebra", OnGpu)
    tries: list[str] = []
    inner = OnGpu._tried

    def full(self: Any, name: str, device: torch.device, work: Any) -> Any:
        def raising(device: torch.device) -> Any:
            tries.append(name)
            for module, function in ((statistics, "residual_factor"), (convergence, "residual_factor"),
                                     (convergence, "growth"), (protect, "growth"), (basis_cache, "weight_basis")):  # fmt: skip
                patch.setattr(module, function, out_of_memory)
            return work(device)

        with monkeypatch.context() as patch:
            return inner(self, name, device, raising)

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(OnGpu, "_tried", full)
    with pytest.warns(UserWarning, match="the GPU did not decompose") as said:
        found = learned(**MODES[mode])
    assert len([w for w in said if "the GPU did not decompose" in str(w.message)]) == 1
    assert tries
    for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
        assert torch.equal(one, other)


def test_the_cache_keeps_the_devices_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(256, 256)
    on_cpu = basis_cache._key(W, 0.5, CPU)
    monkeypatch.setattr(basis_cache, "_gpu", lambda device: ["NVIDIA H100", 9, 0, "13.0", None, "Default"])
    basis_cache._computer.cache_clear()
    on_gpu = basis_cache._key(W, 0.5, torch.device("cuda", 0))
    assert on_cpu != on_gpu
    assert basis_cache._key(W, 0.5, torch.device("cuda", 1)) == on_gpu
    basis_cache._computer.cache_clear()
    assert basis_cache._key(W, 0.5, CPU) == on_cpu
