"""Optimiser and learning-rate schedule of one task, stepped once per batch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from keeplora.errors import ConfigError
from keeplora.experiment.config_schema import TrainingConfig

ONECYCLE_WARMUP = 0.3  # torch's default, which the reference uses


def _learning_rate(cfg: TrainingConfig) -> float:
    if not isinstance(cfg.learning_rate, int | float):
        raise ConfigError("training.learning_rate differs by task; use training.for_task(NAME)")
    return float(cfg.learning_rate)


def make_optimizer(params: Iterable[torch.nn.Parameter], cfg: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient; torch's betas and epsilon.

    Parameters
    ----------
    params : parameters; frozen ones (the factor A) are left out, so that weight decay cannot move them.
    cfg : settings of one task, from ``training.for_task(name)``.

    Raises
    ------
    ConfigError
        Nothing is left to train.
    """
    trained = [parameter for parameter in params if parameter.requires_grad]
    if not trained:
        raise ConfigError("no parameter is left to train: check tuner.target_modules and tuner.r")
    return torch.optim.AdamW(trained, lr=_learning_rate(cfg), weight_decay=cfg.weight_decay)


def warmup_steps(cfg: TrainingConfig, total_steps: int) -> int:
    """Steps of linear warm-up for cosine and constant: ``ceil(warmup * total_steps)``, always leaving one full step."""
    return min(math.ceil((cfg.warmup or 0.0) * total_steps - 1e-9), total_steps - 1)


def _one_cycle(optimizer: torch.optim.Optimizer, cfg: TrainingConfig, total_steps: int) -> LRScheduler:
    rate = _learning_rate(cfg)
    if total_steps == 1:
        # torch's formula would spend the only step at the final rate, max / 250000: nothing would be learned.
        return LambdaLR(optimizer, lambda step: 1.0)
    share = ONECYCLE_WARMUP if cfg.warmup is None else cfg.warmup
    # Past the last step but one the peak would fall between two steps: one far below it, one at the final rate.
    share = min(share, (total_steps - 1) / total_steps)
    if share * total_steps == 1:
        share *= 1 - 1e-6  # a warm-up of exactly one step divides zero by zero in torch; it begins at the peak
    return OneCycleLR(optimizer, max_lr=rate, total_steps=total_steps, pct_start=share)


def make_scheduler(optimizer: torch.optim.Optimizer, cfg: TrainingConfig, total_steps: int) -> LRScheduler:
    """The learning-rate schedule; call ``step()`` after each of the ``total_steps`` optimiser steps.

    - ``onecycle``: torch's `OneCycleLR` with its defaults, momentum cycle included (as the reference); ``warmup`` is the
      share of the steps before the peak, 0.3 unless given. A single step runs at the full rate.
    - ``cosine``: with w = `warmup_steps` and T = total_steps, step k < w runs at ``lr * (k + 1) / (w + 1)``, every other
      at ``lr * (1 + cos(pi * (k - w) / (T - w))) / 2``. No step runs at rate 0, not even in a run of one or two steps.
    - ``constant``: the same warm-up, then ``lr``.

    Raises
    ------
    ConfigError
        ``total_steps`` is below 1.

    Examples
    --------
    >>> from keeplora.experiment.config import load_config
    >>> config = load_config({"tasks": [{"name": "a", "source": "folder"}], "model": "m", "method": "lora",
    ...                       "training": {"schedule": "cosine", "learning_rate": 1.0}})
    >>> optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config.training)
    >>> make_scheduler(optimizer, config.training, total_steps=4).get_last_lr()
    [1.0]
    """
    if total_steps < 1:
        raise ConfigError(
            f"a schedule needs at least 1 step, got {total_steps}: the task has no training data or no epoch"
        )
    if cfg.schedule == "onecycle":
        return _one_cycle(optimizer, cfg, total_steps)
    warm = warmup_steps(cfg, total_steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        if cfg.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (total_steps - warm))))

    return LambdaLR(optimizer, factor)
