"""Where and in which precision an experiment computes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from keeplora.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch finds no CUDA device; use device: auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16); elsewhere bf16 is slower than fp32."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((probe and probe()) or (amx and amx()))


class Precision:
    """``auto`` is bf16 autocast where the hardware has it, else fp32. Factors and statistics stay in fp32 either way."""

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_fast_bf16()
            name = "bf16" if fast else "fp32"
        self.name = name
        self.device = device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast block of this precision; does nothing for fp32."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
