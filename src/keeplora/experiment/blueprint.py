"""A generative model from its config.json alone: built on torch's meta device, where tensors have sizes and no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keeplora.errors import KeepLoraError
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.config import ExperimentConfig
from keeplora.experiment.footprint import Linear, ModelShape, Tower
from keeplora.experiment.kinds.generation import Generation
from keeplora.models.checkpoint import OWN, first_line, read_config
from keeplora.models.generative import Generative
from keeplora.models.opening import is_generative, open_config
from keeplora.models.parts import find_targets, find_towers
from keeplora.tuner.targets import Target

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one module that read the same tensor, so that one C serves them."""


def source_of(config: ExperimentConfig) -> str:
    """Where `open_model` reads the model: a folder beside the configuration, else the name as it stands."""
    beside = Path(config.base_dir, config.model.name)
    return str(beside if beside.is_dir() else config.model.name)


def lacks_weights(config: ExperimentConfig) -> bool:
    """Whether the model is a generative one of which config.json is here and the weights are not.

    A name on the hub counts as one until its weights have been downloaded: a dry run does not fetch gigabytes.
    """
    source = source_of(config)
    if source in OWN:
        return False
    if (folder := Path(source)).is_dir():
        held = any((folder / name).is_file() for name in WEIGHTS) or any(folder.glob("*.safetensors"))
    else:
        from huggingface_hub import try_to_load_from_cache

        revision = config.model.revision
        try:
            held = any(isinstance(try_to_load_from_cache(source, name, revision=revision), str) for name in WEIGHTS)
        except ValueError:  # no name that the hub could have: opening it says so
            return False
    if held:
        return False
    values = read_config(config.model.name, source, config.model.revision)
    answers = "AutoModelForImageTextToText" in values.get("auto_map", {}) and config.model.trust_remote_code
    return answers or is_generative(str(values.get("model_type", "")))


@dataclass
class Blueprint:
    """A model without weights, with what `Setup.tuner_config` asks a kind and a family for."""

    config: ExperimentConfig
    model: Any
    towers: dict[str, str]
    _targets: dict[str, list[str]]
    stored: str
    """Compute dtype that `dtype: auto` gives on a GPU: "bf16" for a checkpoint stored in half precision, else "fp32"."""

    @property
    def family(self) -> Blueprint:
        return self

    def target_modules(self, parts: Sequence[str]) -> list[str]:
        return Generative.target_modules(self, parts)  # type: ignore[arg-type]

    def default_targets(self) -> Mapping[str, Any]:
        return Generation.default_targets(self)  # type: ignore[arg-type]

    @classmethod
    def draw(cls, config: ExperimentConfig, opened: Any = None) -> Blueprint:
        """From config.json, or from the config of a model that is open already.

        Raises:
            KeepLoraError: transformers cannot build the model from its config alone.
        """
        from transformers import AutoModelForImageTextToText

        name, options = config.model.name, {"revision": config.model.revision}
        trusted = {"trust_remote_code": config.model.trust_remote_code}
        if opened is None:
            opened = open_config(name, source_of(config), {**options, **trusted})
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(opened, **trusted)
        except (ValueError, TypeError, AttributeError, RuntimeError, ImportError, KeyError) as error:
            raise KeepLoraError(f"{name}: no model can be built from its config.json: {first_line(error)}") from error
        towers = find_towers(model, name)
        stored = str(getattr(opened, "dtype", None) or getattr(opened.get_text_config(), "dtype", None))
        half = "bf16" if stored.removeprefix("torch.") in ("float16", "bfloat16") else "fp32"
        return cls(config, model, towers, find_targets(model, towers, name), half)

    def part_of(self, name: str) -> str:
        """The part that a module belongs to; a projector may lie inside the vision tower."""
        inside = [part for part, prefix in self.towers.items() if name == prefix or name.startswith(f"{prefix}.")]
        return max(inside, key=lambda part: len(self.towers[part]), default="language").split("-")[0]

    def shape(self, assume: Assumptions) -> ModelShape:
        """The sizes that the arithmetic needs, at the assumed number of tokens."""
        config = self.model.config
        text, eye = config.get_text_config(), getattr(config, "vision_config", None) or config.vision_tower_config
        held: dict[str, list[nn.Linear]] = {"language": [], "vision": [], "projector": []}
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                held[self.part_of(name)].append(module)
        entries = {part: sum(m.in_features * m.out_features for m in linears) for part, linears in held.items()}
        image = assume.image_tokens or min(assume.tokens, int(getattr(config, "image_seq_length", 0) or assume.tokens))
        sizes = [getattr(eye, key, None) for key in ("image_size", "patch_size")]
        side, patch = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
        patches = (side // patch) ** 2 + 1 if isinstance(side, int) and isinstance(patch, int) else 4 * image
        return ModelShape(
            parameters=sum(p.numel() for p in self.model.parameters()),
            language=_tower(text, entries["language"], assume.tokens), vision=_tower(eye, entries["vision"], patches),
            projector=entries["projector"], image_tokens=image, vocabulary=int(text.vocab_size),
            quantised=entries["language"], quantised_rows=sum(m.out_features for m in held["language"]),
        )  # fmt: skip

    def linears(self, targets: Sequence[Target], shape: ModelShape) -> list[Linear]:
        """The learner's targets as the arithmetic takes them."""
        tokens = {"language": shape.language.tokens, "vision": shape.vision.tokens, "projector": shape.image_tokens}
        seen: set[tuple[str, int]] = set()
        out = []
        for t in targets:
            parent, _, leaf = t.name.rpartition(".")
            group = next(((parent, i) for i, names in enumerate(SAME_INPUT) if leaf in names), None)
            part = self.part_of(t.name)
            out.append(Linear(t.n_in, t.n_out, t.r, tokens[part], group in seen, part == "language"))
            if group is not None:
                seen.add(group)
        return out


def _first(config: Any, *keys: str) -> int:
    """The first of the keys that the config has; the largest where blocks differ."""
    value = next((v for key in keys if (v := getattr(config, key, None)) is not None), 0)
    return int(max(value) if isinstance(value, list | tuple) else value)


def _tower(config: Any, linear: int, tokens: int) -> Tower:
    hidden = _first(config, "hidden_size", "embed_dim")
    heads = _first(config, "num_attention_heads", "num_heads") or 1
    return Tower(
        blocks=_first(config, "num_hidden_layers", "depth"), hidden=hidden,
        intermediate=_first(config, "intermediate_size") or 4 * hidden, heads=heads,
        kv_heads=_first(config, "num_key_value_heads") or heads, head_dim=_first(config, "head_dim") or hidden // heads,
        linear=linear, tokens=tokens,
    )  # fmt: skip
