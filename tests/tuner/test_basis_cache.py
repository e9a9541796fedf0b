"""U₀ from the cache: the same bits, never trusted blindly, never needed, never too large."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import keeplora.tuner.basis_cache as cache
from keeplora import ContinualLearner, KeepLoraConfig
from keeplora.math import Subspace, weight_basis
from keeplora.tuner.basis_cache import weight_subspace


def weight(seed: int = 0, shape: tuple[int, int] = (48, 40)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "0")
    monkeypatch.setattr(cache, "SMALLEST_SIDE", 32)
    return tmp_path / "cache" / "bases"


@pytest.fixture
def computed(monkeypatch):
    """How often a weight was decomposed."""
    calls: list[int] = []
    monkeypatch.setattr(cache, "weight_basis", lambda W, energy: calls.append(1) or weight_basis(W, energy))
    return calls


def files(folder):
    return sorted(folder.glob("*")) if folder.is_dir() else []


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])  # by the columns, by the complement, of everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_and_the_same_layout(folder, computed, energy, dtype):
    W = weight().to(dtype)
    made, read = weight_subspace(W, energy), weight_subspace(W, energy)
    plain = Subspace.of(weight_basis(W, energy))
    assert len(computed) == 1
    assert made.by_complement == read.by_complement == plain.by_complement
    assert torch.equal(made.held, read.held)
    assert torch.equal(made.held, plain.held)
    assert made.held.is_contiguous()
    assert read.held.is_contiguous()


def test_what_the_result_depends_on_is_in_the_name(folder, computed, monkeypatch):
    W = weight()
    weight_subspace(W, 0.3)
    changed = W.clone()
    changed[0, 0] += 1e-6
    for other, energy in ((changed, 0.3), (W, 0.31), (W.double(), 0.3), (W.reshape(40, 48), 0.3)):
        weight_subspace(other, energy)
    monkeypatch.setattr(cache, "_computer", lambda device: "another processor")
    weight_subspace(W, 0.3)
    assert len(computed) == len(files(folder)) == 6


def test_small_weights_and_no_energy_make_no_file(folder, computed):
    weight_subspace(weight(shape=(31, 40)), 0.5)
    weight_subspace(weight(), 0.0)
    assert files(folder) == []


def test_it_can_be_switched_off(folder, computed, monkeypatch):
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    weight_subspace(weight(), 0.3)
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "0")
    monkeypatch.setenv("KEEPLORA_BASES_BYTES", "0")
    weight_subspace(weight(), 0.3)
    assert len(computed) == 2
    assert files(folder) == []


def rewritten(path, change):
    """The file with its tensor changed and its sums made to fit, as a program with a fault would write it."""
    with cache.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    held = change(load_file(path)["held"].clone()).contiguous()
    save_file({"held": held}, path, metadata={**metadata, "sha256": cache._sum(held)})


def flip(path):
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number: still orthonormal
    path.write_bytes(data)


def foreign(held):
    return torch.linalg.qr(torch.randn(held.shape, generator=torch.Generator().manual_seed(9))).Q


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"x" * 5000),
    "one bit": flip,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another shape": lambda path: rewritten(path, lambda held: held[:-1]),
    "another dtype": lambda path: rewritten(path, lambda held: held.double()),
    "not orthonormal": lambda path: rewritten(path, lambda held: held * 1.001),
    "NaN": lambda path: rewritten(path, lambda held: held.fill_(torch.nan)),
    "another subspace": lambda path: rewritten(path, foreign),
    "too few columns": lambda path: rewritten(path, lambda held: held[:, :-1]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_foreign_file_counts_as_none(folder, computed, kind):
    W = weight()
    made = weight_subspace(W, 0.3)
    DAMAGE[kind](files(folder)[0])
    again = weight_subspace(W, 0.3)
    assert len(computed) == 2
    assert torch.equal(made.held, again.held)
    if kind != "a folder":
        assert torch.equal(weight_subspace(W, 0.3).held, made.held)
        assert len(computed) == 2  # it was written anew


def test_a_file_under_another_name_counts_as_none(folder, computed):
    weight_subspace(weight(0), 0.3)
    one = files(folder)[0]
    weight_subspace(weight(1), 0.3)
    other = next(f for f in files(folder) if f != one)
    other.write_bytes(one.read_bytes())
    weight_subspace(weight(1), 0.3)
    assert len(computed) == 3


def test_a_disk_that_cannot_be_written_is_no_fault(folder, computed, monkeypatch):
    monkeypatch.setattr(cache, "atomic_write_bytes", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert weight_subspace(weight(), 0.3).k > 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("in the way")
    assert weight_subspace(weight(), 0.3).k > 0
    assert len(computed) == 2


def test_what_was_used_longest_ago_goes_first(folder, computed, monkeypatch):
    for seed in range(3):
        weight_subspace(weight(seed), 0.3)
    by_age = sorted(files(folder), key=lambda f: f.stat().st_mtime_ns)
    size = by_age[0].stat().st_size
    for i, file in enumerate(by_age):
        os.utime(file, (time.time() - 9000 + i, time.time() - 9000 + i))
    monkeypatch.setenv("KEEPLORA_BASES_BYTES", str(3 * size + size // 2))
    weight_subspace(weight(0), 0.3)  # used: the second is the oldest now
    weight_subspace(weight(7), 0.3)
    left = files(folder)
    assert by_age[0] in left
    assert by_age[1] not in left
    assert sum(f.stat().st_size for f in left) <= 3 * size + size // 2


def test_a_model_larger_than_the_cache_does_not_push_its_own_layers_out(folder, computed, monkeypatch):
    weight_subspace(weight(0), 0.3)
    size = files(folder)[0].stat().st_size
    monkeypatch.setenv("KEEPLORA_BASES_BYTES", str(size + size // 2))
    for _ in range(2):
        weight_subspace(weight(1), 0.3)
        weight_subspace(weight(0), 0.3)
    assert len(files(folder)) == 1
    assert len(computed) == 3  # the first is there each time


def test_writers_at_once(folder, computed):
    """None of them sees a part of a file, whoever is first."""
    plain = weight_basis(weight(), 0.3)

    def work(i: int) -> bool:
        if i % 3 == 0:
            for file in files(folder):
                file.unlink(missing_ok=True)
        return torch.equal(weight_subspace(weight(), 0.3).held, plain)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(60)))
    assert 1 < len(computed) < 60
    assert len(files(folder)) <= 1


def test_a_learner_starts_from_it(folder, computed):
    def start() -> ContinualLearner:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(40, 48), torch.nn.Linear(48, 36))
        return ContinualLearner(model, KeepLoraConfig(target_modules=["0", "1"], energy_weights=0.4))

    one, two = start().U, start().U
    assert len(computed) == 2
    assert all(torch.equal(one[name], two[name]) for name in one)
