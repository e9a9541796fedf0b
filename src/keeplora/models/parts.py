"""Where a generative model's language model, vision tower and projector are, found from its config and module tree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keeplora.errors import TargetError, did_you_mean

PARTS = ("language", "vision", "projector")


def find_towers(model: nn.Module, name: str = "the model") -> dict[str, str]:
    """Module-name prefixes: {"language": ..., "vision": ..., "projector": ...}.

    The language model is the outermost module that was made from `config.text_config`, the vision tower the one made
    from `config.vision_config`; a second one of the same class beside it (Video-LLaVA's for videos) is "vision-2". The
    projector is what else has weights beside them, below the head, towers for sound aside; a class that merges patches in
    its vision tower (Qwen-VL) has it there, behind the blocks. Where there are several, the others are "projector-2" and
    so on; where there is none, the key is missing.
    """
    config: Any = model.config
    language = _made_from(model, config.get_text_config(), exclude=())
    if language is None:
        raise TargetError(
            f"{name}: no module of {type(model).__name__} was made from its text_config, so it has no tower"
        )
    vision_config = next(
        (getattr(config, key) for key in ("vision_config", "vision_tower_config") if hasattr(config, key)), None
    )
    vision = None if vision_config is None else _made_from(model, vision_config, exclude=(language,))
    if vision is None:
        raise TargetError(
            f"{name}: no module of {type(model).__name__} was made from its vision_config, so it has no tower"
        )
    towers = {"language": language, "vision": vision}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    composite = _parent(language)
    # Other towers; a merger may share the first one's config.
    words = ("audio", "vision", "video", "vq")
    senses = {type(v) for k, v in vars(config).items() if hasattr(v, "model_type") and any(w in k for w in words)}
    senses.discard(type(vision_config))
    tower = model.get_submodule(vision)
    children = model.get_submodule(composite).named_children()
    seconds = [_join(composite, child) for child, module in children if type(module) is type(tower)]
    for i, prefix in enumerate(prefix for prefix in seconds if prefix != vision):
        towers[f"vision-{i + 2}"] = prefix
    between = [
        prefix
        for child, module in model.get_submodule(composite).named_children()
        if (prefix := _join(composite, child)) not in towers.values()
        and module is not head
        and not isinstance(module, nn.Embedding)
        and not _holds(prefix, (language, vision))
        and type(getattr(module, "config", None)) not in senses
        and any(True for _ in module.parameters())
    ]
    if not between:
        depth = getattr(vision_config, "num_hidden_layers", None)
        children = [child for child, _ in tower.named_children()]
        holding = [i for i, child in enumerate(children) if _has_list(tower.get_submodule(child), depth)]
        after = children[holding[0] + 1 :] if holding else []
        between = [_join(vision, child) for child in after if _linears(tower.get_submodule(child))]
    for i, prefix in enumerate(between):
        towers["projector" if i == 0 else f"projector-{i + 1}"] = prefix
    return towers


def _made_from(model: nn.Module, config: Any, exclude: tuple[str, ...]) -> str | None:
    """Name of the outermost module, not the model itself, whose config is `config`."""
    found = [
        name
        for name, module in model.named_modules()
        if name and name not in exclude and type(getattr(module, "config", None)) is type(config)
    ]
    # Video-LLaVA has two towers of one class.
    return min(found, key=lambda name: (name.count("."), "video" in name), default=None)


def _has_list(module: nn.Module, length: int | None) -> bool:
    return any(isinstance(m, nn.ModuleList) and len(m) == length for m in module.modules())


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _holds(prefix: str, names: tuple[str, ...]) -> bool:
    return any(name.startswith(prefix + ".") for name in names)


def _linears(module: nn.Module) -> list[str]:
    """Names of the linears in `module` that an adapter acts on: none inside nn.MultiheadAttention, which bypasses them."""
    inside = [name for name, m in module.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and not any(name.startswith(f"{a}.") or not a for a in inside)
    ]


def find_targets(model: nn.Module, towers: dict[str, str], name: str = "the model") -> dict[str, list[str]]:
    """Full names of the linears of each part: attention and MLP of the blocks, and all of the projector's.

    Blocks of the vision tower behind the layer that the class reads (LLaVA: the last but one) never act on the answer and
    are left out.
    """
    config: Any = model.config
    projectors = [prefix for part, prefix in towers.items() if part.startswith("projector")]
    found: dict[str, list[str]] = {"language": [], "vision": []}
    for name_of_part, prefix in towers.items():
        part = name_of_part.split("-")[0]
        if part == "projector":
            continue
        tower = model.get_submodule(prefix)
        depth = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
        lists = [
            (child, len(module))
            for child, module in tower.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        if not lists:
            raise TargetError(
                f"{name}: no list of {depth} blocks is in its {part} tower ({type(tower).__name__} at {prefix}); give "
                "target_modules, as names of its nn.Linear modules"
            )
        blocks, count = min(lists, key=lambda item: item[0].count("."))
        read = _blocks_read(config, count) if part == "vision" else count
        names = [
            f"{blocks}.{i}.{linear}" for i in range(read) for linear in _linears(tower.get_submodule(f"{blocks}.{i}"))
        ]
        if not names:
            raise TargetError(f"{name}: the blocks of its {part} tower at {prefix}.{blocks} hold no nn.Linear")
        found[part] += [_join(prefix, n) for n in names]
    found["projector"] = [
        _join(prefix, linear) if linear else prefix
        for prefix in projectors
        for linear in _linears(model.get_submodule(prefix))
    ]
    return found


def _blocks_read(config: Any, count: int) -> int:
    """How many of the vision tower's blocks come before the hidden state that the class reads."""
    layers = getattr(config, "vision_feature_layer", None)
    layers = getattr(config, "vision_feature_layers", None) if layers is None else layers
    if layers is None:
        return count
    layers = layers if isinstance(layers, list | tuple) else [layers]
    return max(layer if layer >= 0 else count + 1 + layer for layer in layers)


def unknown_part(part: str) -> TargetError:
    return TargetError(f"there is no part {part!r}{did_you_mean(part, PARTS)}")


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """transformers checkpoints a block in training mode only; models here are trained in eval mode, without dropout."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [
        m for m in model.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing and not m.training
    ] if torch.is_grad_enabled() else []  # fmt: skip
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
