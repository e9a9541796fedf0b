"""Which modules are adapted: linears of the encoder blocks, with their tower and depth found from the module tree."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from keeplora.errors import TargetError, did_you_mean
from keeplora.math import layer_alpha, layer_scales
from keeplora.tuner.config import KeepLoraConfig
from keeplora.tuner.quantised import quantisation, why_not_readable

GENERIC_PARTS = frozenset({"encoder", "decoder", "layers", "layer", "blocks", "block", "h", "resblocks", "transformer"})
"""Path components that say nothing about which tower a block list belongs to."""


@dataclass(frozen=True)
class Target:
    """One adapted linear layer.

    Attributes:
        name: module path in the model. tower: path of the tower, "" if the model is one tower.
        depth: block index, 0 the shallowest; None outside any block list (a projector), where the scale is 1.
        blocks: blocks in the tower, L; 1 without depth.
        scale: layer_scale(l) (M6).
        r: configured rank. lora_alpha: configured alpha.
    """

    name: str
    tower: str
    depth: int | None
    blocks: int
    n_in: int
    n_out: int
    scale: float
    r: int
    lora_alpha: float

    @property
    def s(self) -> float:
        """s = layer_scale · lora_alpha / r with the *configured* r."""
        return self.scale * self.lora_alpha / self.r

    def alpha(self, rank: int) -> float:
        """The alpha to write into PEFT's config for this layer at rank ``rank``."""
        return layer_alpha(self.scale, self.lora_alpha, self.r, rank)


def matches(patterns: str | Sequence[str] | None, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or dotted suffixes."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _locate(model: nn.Module, name: str) -> tuple[str, int | None, int]:
    """(tower, depth, blocks) of a module: from the outermost `nn.ModuleList` above it."""
    parts = name.split(".")
    module: nn.Module = model
    for i, part in enumerate(parts[:-1]):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and part.isdigit() and i > 0:
            head = parts[:i]
            while head and head[-1] in GENERIC_PARTS:
                head.pop()
            return ".".join(head), int(part), len(module)
        module = module.get_submodule(part)
    return ".".join(parts[:-1]) or name, None, 1


def _inside_attention(model: nn.Module, name: str) -> str | None:
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.MultiheadAttention):
            return ".".join(parts[:i])
    return None


def _why_not(module: nn.Module) -> str | None:
    """Why a matched module cannot be adapted, or None."""
    if isinstance(module, nn.MultiheadAttention):
        return "is an nn.MultiheadAttention, which hides one weight for q, k and v behind a function call"
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    if quantisation(module) is not None:
        return why_not_readable(module)
    foreign = type(weight).__module__.startswith(("torchao.", "bitsandbytes."))
    if isinstance(weight, torch.Tensor) and (not weight.is_floating_point() or foreign or "bit" in kind.lower()):
        return (
            f"is a {kind} whose weight is quantised ({type(weight).__name__}, {weight.dtype}) in a way that keeplora does not "
            "read; quantise with bitsandbytes (8 or 4 bits), or load the model in fp32 or bf16"
        )
    if not isinstance(module, nn.Linear):
        return f"is a {kind}, not an nn.Linear"
    return None


def resolve_targets(model: nn.Module, config: KeepLoraConfig) -> list[Target]:
    """Find the linears that ``config`` asks for.

    Raises:
        TargetError: a pattern that matches nothing (with a suggestion), or a match that is no plain linear, by name.

    A match *inside* an `nn.MultiheadAttention` is refused when it was named in full, and left out with a warning when
    only its suffix matched: PEFT would accept an adapter there that never takes effect.
    """
    patterns = config.target_modules
    if patterns is None:
        raise TargetError(
            "target_modules is not set: name the linears to adapt, for example "
            "['q_proj', 'k_proj', 'v_proj', 'out_proj'] for CLIP"
        )
    found: list[tuple[str, nn.Linear]] = []
    for name, module in model.named_modules():
        if not name or not matches(patterns, name) or matches(config.exclude_modules, name):
            continue
        if (attention := _inside_attention(model, name)) is not None:
            named = not isinstance(patterns, str) and name in patterns
            text = f"{name} is part of the nn.MultiheadAttention {attention!r}, where an adapter would take no effect"
            if named:
                raise TargetError(f"{text}; take it out of target_modules")
            warnings.warn(f"{text}; it is left out", stacklevel=3)
            continue
        if reason := _why_not(module):
            raise TargetError(f"{name} {reason}; name linears in target_modules, or put it into exclude_modules")
        assert isinstance(module, nn.Linear)
        found.append((name, module))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if isinstance(patterns, str):
        if not found:
            raise TargetError(f"the regular expression {patterns!r} in target_modules matches no module")
    else:
        for pattern in patterns:
            if not any(matches([pattern], name) for name, _ in model.named_modules()):
                leaves = {name.rsplit(".", 1)[-1] for name in linears}
                raise TargetError(f"target_modules: no module is named {pattern!r}{did_you_mean(pattern, leaves)}")
        if not found:
            raise TargetError(f"target_modules {list(patterns)!r} leaves no linear to adapt")
    _refuse_shared(found)
    located = {name: _locate(model, name) for name, _ in found}
    towers = sorted({tower for tower, _, _ in located.values()})
    config.check_towers(towers)
    targets = []
    for name, module in found:
        tower, depth, blocks = located[name]
        scale = 1.0
        if depth is not None:
            schedule = config.for_tower("schedule", tower)
            scale = layer_scales(blocks, config.for_tower("gamma", tower), schedule)[depth]
        r = int(config.for_tower("r", tower))
        targets.append(
            Target(name, tower, depth, blocks, module.in_features, module.out_features, scale, r, config.lora_alpha)
        )
    return targets


def rank_too_large(targets: Sequence[Target]) -> str | None:
    """A sentence where a tower's rank exceeds what every one of its targets can take, min(in, out); else None.

    The scale stays s = lora_alpha / r with the configured r, so such a rank makes the steps small and gives nothing for it.

    >>> rank_too_large([Target("q", "", 0, 1, 32, 24, 1.0, 5000, 16.0)])
    'r is 5000, but the widest target takes a rank of at most 24, and s = lora_alpha / r = 0.0032; lower r'
    """
    for tower in dict.fromkeys(t.tower for t in targets):
        mine = [t for t in targets if t.tower == tower]
        most, r = max(min(t.n_in, t.n_out) for t in mine), mine[0].r
        if r > most:
            of = f" of {tower}" if tower else ""
            return (
                f"r is {r}, but the widest target{of} takes a rank of at most {most}, and s = lora_alpha / r = "
                f"{mine[0].lora_alpha / r:g}; lower r"
            )
    return None


def resolve_free(model: nn.Module, config: KeepLoraConfig, targets: Sequence[Target]) -> list[str]:
    """Names of the linears that ``config.free_modules`` asks to train in full; empty where it is None.

    Raises:
        TargetError: a pattern that matches nothing, a match that is no plain linear, is quantised, or is a target.
    """
    patterns = config.free_modules
    if patterns is None:
        return []
    found: list[tuple[str, nn.Linear]] = []
    protected = {t.name for t in targets}
    for name, module in model.named_modules():
        if not name or not matches(patterns, name):
            continue
        if name in protected:
            raise TargetError(
                f"{name} is named by target_modules and by free_modules: a linear is either protected or free; take it "
                "out of one of them (exclude_modules takes it out of the targets)"
            )
        reason = _why_not(module)
        if reason is None and quantisation(module) is not None:
            reason = f"is quantised ({quantisation(module)}) and cannot train in full; leave it out of the quantisation"
        if reason is None and (attention := _inside_attention(model, name)) is not None:
            reason = f"is part of the nn.MultiheadAttention {attention!r}"
        if reason is not None:
            raise TargetError(f"free_modules: {name} {reason}; name plain linears")
        assert isinstance(module, nn.Linear)
        found.append((name, module))
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(matches(patterns if isinstance(patterns, str) else [pattern], name) for name, _ in found):
            leaves = {n for n, m in model.named_modules() if n and isinstance(m, nn.Linear)}
            near = did_you_mean(pattern, {n.rsplit(".", 1)[-1] for n in leaves})
            raise TargetError(f"free_modules: no module is named {pattern!r}{near}")
    targeted = [(t.name, m) for t in targets if isinstance(m := model.get_submodule(t.name), nn.Linear)]
    _refuse_shared([*targeted, *found])
    return [name for name, _ in found]


def _refuse_shared(found: list[tuple[str, nn.Linear]]) -> None:
    owner: dict[int, str] = {}
    for name, module in found:
        first = owner.setdefault(id(module.weight), name)
        if first != name:
            raise TargetError(
                f"{name} shares its weight with {first}: two adapters would fight over it; exclude one of them"
            )
