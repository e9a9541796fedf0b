"""What a launcher asks of DeepSpeed: followed, or refused in a sentence. DeepSpeed itself need not be there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keeplora.errors import ConfigError
from keeplora.experiment import sharded, zero
from keeplora.tuner.zero3 import divisible


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


def test_nobody_asks() -> None:
    zero.check_launcher()
    assert zero.stage() == 0
    assert not sharded.asked_for()


def test_deepspeed_is_missing(asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"not installed: `pip install \"keeplora\[deepspeed\]\"`, or launch with --use_fsdp"
    ):
        sharded.check_launcher()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("DEEPSPEED_ZERO_STAGE", "1", "ZeRO stage 1: add --zero_stage 2 or --zero_stage 3"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload of weights"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload of the optimiser"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "set training.batch_size"),
        ("GRADIENT_CLIPPING", "1.0", "set training.grad_clip"),
    ],
)
def test_flags_that_are_not_followed(
    key: str, value: str, sentence: str, asked: None, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{key}", value)
    with pytest.raises(ConfigError, match=sentence):
        sharded.check_launcher()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, "bf16.enabled: set training.precision"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "set training.learning_rate"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"bf16": {"enabled": False}}, "cannot be read: Please specify the ZeRO optimization config"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": -1, "zero_hpz_partition_size": 1}}, None),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "bf16": {"enabled": False}}, None),
    ],
)
def test_files_of_deepspeed(
    config: dict[str, Any], sentence: str | None, asked: None, installed: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    if sentence is None:
        sharded.check_launcher()
        return
    with pytest.raises(ConfigError, match=sentence):
        sharded.check_launcher()


def test_a_config_file_that_is_not_there(asked: None, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "/nowhere/ds.json")
    with pytest.raises(ConfigError, match="DeepSpeed configuration cannot be read"):
        sharded.check_launcher()


def test_what_is_divided_holds_nothing_that_must_be_whole() -> None:
    """A free parameter's module and torch's own attention stay whole, and so does what holds them directly."""
    attention = nn.MultiheadAttention(4, 1)
    block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(attention, nn.LayerNorm(4)), nn.ReLU(), nn.Linear(4, 4))
    found = list(divisible(block, {block[0].bias}))
    assert found == [block[1][1], block[3]]
    assert next(divisible(nn.Linear(2, 2), set())).weight.shape == (2, 2)


def test_half_precision_is_refused_before_deepspeed_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", object())
    with pytest.raises(ConfigError, match="this method trains weights of bfloat16: load the model in float32"):
        zero.ZeroOptimizer([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))], lambda p: torch.optim.SGD(p, lr=1))
