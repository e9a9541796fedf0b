"""A model that is spread over devices by layers, and models that are not in memory whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from tests.tuner.blocks import config, learn, make_net

MAP = {"embed": "cpu", "encoder.layers.0": "cpu", "encoder.layers.1": "cpu", "head": "cpu", "dropout": "cpu"}


def test_a_device_map_changes_nothing() -> None:
    """accelerate's hooks around every module, as `from_pretrained(device_map=...)` leaves them."""
    mapped = dispatch_model(make_net(), MAP, main_device="cpu", force_hooks=True)
    assert hasattr(mapped.encoder.layers[0], "_hf_hook")
    learners = []
    for model in (mapped, make_net()):
        torch.manual_seed(0)  # of dropout
        learners.append(learn(ContinualLearner(model, config()), "first", 0))
    found, plain = learners
    for name in plain.store.names:
        assert torch.equal(found.store.current(name), plain.store.current(name))
        assert torch.equal(found.U[name], plain.U[name])


def test_an_offloaded_target_is_refused(tmp_path: Path) -> None:
    mapped = dispatch_model(
        make_net(), MAP | {"encoder.layers.1": "disk"}, main_device="cpu", offload_dir=str(tmp_path)
    )
    with pytest.raises(KeepLoraError, match=r"encoder\.layers\.1\.\w+ is offloaded and not in memory"):
        _ = ContinualLearner(mapped, config()).U
