"""Whole runs for the tests of several processes, on the tiny worlds of the command line's tests."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment import training as training_module
from keeplora.experiment.interrupt import listening
from keeplora.experiment.zero import ZeroOptimizer
from keeplora.tuner import ranks
from keeplora.tuner.sharding import is_sharded


def run(
    config: dict[str, Any],
    folder: str,
    at: int = 0,
    who: int = 1,
    how: str = "",
    add_tasks: dict[str, Any] | None = None,
) -> Any:
    """A run; ``how``: at step ``at`` rank ``who`` is killed ("kill"), asked to stop ("term"), or raises ("raise").

    Returns:
        What the run ended with, in words; its metrics where it came to its end.
    """
    inner, done = training_module._Loop._gradient, [0]

    def step(self: Any, batch: Any, where: str) -> Any:
        done[0] += 1
        if how and done[0] == at and ranks.rank() == who:
            if how == "raise":
                raise ValueError("a fault of the machine")
            if how == "term":  # when the ranks have told each other of this step: all stop after the next
                found = inner(self, batch, where)
                os.kill(os.getpid(), signal.SIGTERM)
                return found
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, batch, where)

    def sgd(parameters: Any, _: Any) -> torch.optim.Optimizer:
        # A gradient of zero but for rounding is a step of its own size to AdamW, and would be another one in every sum.
        return torch.optim.SGD(parameters, lr=0.5)

    # Patched and put back: the run of one process is made in the test's own.
    with (
        mock.patch.object(training_module, "make_optimizer", sgd),
        mock.patch.object(runner_module, "render_report"),
        mock.patch.object(training_module._Loop, "_gradient", step),
        warnings.catch_warnings(),
        listening(),
    ):
        warnings.simplefilter("ignore")
        try:
            if Path(folder).exists():
                return Experiment.resume(folder, quiet=True, add_tasks=add_tasks)["metrics"]
            return Experiment(config, {"output": folder}, quiet=True).run()["metrics"]
        except BaseException as error:
            return f"{type(error).__name__}: {error}"


def sharded(config: dict[str, Any], folder: str, at: int = 0, who: int = 1, how: str = "") -> Any:
    """`run` as under ``accelerate launch --use_fsdp --fsdp_version 2``."""
    return _launched({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True, config, folder, at, who, how)


def zero2(config: dict[str, Any], folder: str, at: int = 0, who: int = 1, how: str = "") -> Any:
    """`run` as under ``accelerate launch --use_deepspeed --zero_stage 2``."""
    return _by_deepspeed(2, config, folder, at, who, how)


def zero3(config: dict[str, Any], folder: str, at: int = 0, who: int = 1, how: str = "") -> Any:
    """`run` as under ``accelerate launch --use_deepspeed --zero_stage 3``."""
    return _by_deepspeed(3, config, folder, at, who, how)


def _by_deepspeed(stage: int, config: dict[str, Any], folder: str, at: int, who: int, how: str) -> Any:
    rank, size = str(ranks.rank()), str(ranks.size())
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "LOCAL_SIZE": size}
    said |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    parts: list[float] = []
    closed = ZeroOptimizer.close

    def close(self: ZeroOptimizer) -> None:
        parts.append(self._part.numel() / sum(p.numel() for p in self._parameters))
        closed(self)

    with mock.patch.object(ZeroOptimizer, "close", close):
        outcome = _launched(said, stage == 3, config, folder, at, who, how)
    assert not isinstance(outcome, dict) or max(parts) < 1 / ranks.size() + 0.05, "no state was divided"
    return outcome


def _launched(said: dict[str, str], shards: bool, config: dict[str, Any], folder: str, *fault: Any) -> Any:
    found: list[bool] = []

    def sharded(self: Any) -> Any:
        found.append(is_sharded(self.learner.model))
        return go(self)

    go = runner_module.Run.go
    with mock.patch.dict(os.environ, said), mock.patch.object(runner_module.Run, "go", sharded):
        outcome = run(config, folder, *fault)
    assert found in ([shards], []), f"the base is {'not ' if shards else ''}sharded"
    return outcome
