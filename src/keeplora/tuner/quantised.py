"""Linears whose weight is quantised (bitsandbytes, 8 and 4 bits): read one at a time, never as a whole model.

bitsandbytes is imported only where such a linear was found, so nothing here needs it for other models.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import TargetError


def quantisation(module: nn.Module) -> str | None:
    """What `load_in_…` made of the linear: "8bit" or "4bit" for bitsandbytes' quantised linears; None for any other module."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight)
    if not isinstance(module, nn.Linear) or not kind.__module__.startswith("bitsandbytes."):
        return None
    if kind.__name__ == "Params4bit":
        return "4bit"
    return "8bit" if kind.__name__ == "Int8Params" and not weight.has_fp16_weights else None


def why_not_readable(module: Any) -> str | None:
    """Why a quantised linear of `quantisation` cannot serve as a target in the state that it is in, or None."""
    if quantisation(module) == "4bit":
        state = _state4(module)
        if state is None:
            return "is a 4-bit linear that holds no quantised weight yet; move the model to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "was repacked by bitsandbytes for inference on this CPU, which rounds its scales and passes no gradient; "
                "load the model again and make the learner before the first forward pass"
            )
    elif module.weight.dtype != torch.int8 or _scale8(module) is None:
        return "is an 8-bit linear that holds no quantised weight yet; move the model to its device first"
    return None


def keep_layout(model: nn.Module) -> None:
    """Check every quantised linear, and forbid bitsandbytes to repack 4-bit weights for inference on the CPU.

    It would do so in the first forward pass without gradients, where the CPU has AVX512-BF16. The repacked product passes
    no gradient back, so a model that was evaluated once would train wrongly in silence; and its scales are rounded, so the
    base would be another one. Call it right after loading; the learner calls it as well.

    Raises:
        TargetError: a linear that cannot be read as it is, by name.
    """
    misread: list[str] = []
    for name, module in model.named_modules():
        if quantisation(module) is None:
            continue
        if reason := why_not_readable(module):
            raise TargetError(f"{name} {reason}")
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if quantisation(module) == "4bit" and _misread_on_cpu(module):
            misread.append(name)
    if misread:
        warnings.warn(
            f"{misread[0]}{f' and {len(misread) - 1} more' if len(misread) > 1 else ''}: bitsandbytes reads a 4-bit weight "
            "wrongly on the CPU where its in_features is no multiple of the block size; leave such layers out of the "
            "quantisation (llm_int8_skip_modules), or run on a GPU",
            stacklevel=4,
        )


def dequantised(module: Any) -> Tensor:
    """The weight that the linear stands for, (out, in) float32 on the CPU: one layer's worth of memory."""
    if quantisation(module) == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, _state4(module)).to("cpu", torch.float32)
    return module.weight.data.to("cpu", torch.float32) * (_scale8(module).to("cpu", torch.float32) / 127).unsqueeze(1)


def stored_tensors(module: Any) -> dict[str, Tensor]:
    """What the linear stores of its weight, by label, on the CPU: the codes, their scales, and how to read them."""
    if quantisation(module) == "8bit":
        return {"int8": module.weight.data.cpu(), "scale": _scale8(module).cpu()}
    state = _state4(module)
    kind = f"{state.quant_type}/{state.blocksize}/{tuple(state.shape)}"
    out = {kind: module.weight.data.cpu(), "absmax": state.absmax.cpu(), "code": state.code.cpu()}
    if state.nested:
        out |= {"offset": state.offset.reshape(1).cpu(), "absmax2": state.state2.absmax.cpu()}
        out["code2"] = state.state2.code.cpu()
    return out


def _misread_on_cpu(module: Any) -> bool:
    """bitsandbytes 0.50's CPU kernels take each row's blocks as if the row began a new one; CUDA's do not."""
    return module.weight.device.type == "cpu" and module.in_features % _state4(module).blocksize != 0


def _state4(module: Any) -> Any:
    state = getattr(module.weight, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)


def _scale8(module: Any) -> Any:
    # bitsandbytes moves it from the weight into the module's state in the first forward pass.
    scale = getattr(module.weight, "SCB", None)
    return scale if scale is not None else module.state.SCB
