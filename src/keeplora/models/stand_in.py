"""The stand-ins: small vision-language models that really answer, for examples and tests of the generative family.

"stand-in" is a `transformers.LlavaForConditionalGeneration` of the embedded model's DINOv2 tower (from the user's cache),
and a projector and a small LLaMA decoder that are part of this package. It stands in for a LLaVA of billions of
parameters where none can be had: it knows clip art, emoji, icons, shapes and digits, and nothing else. "stand-in-video"
is a `LlavaOnevisionForConditionalGeneration` of the same tower and projector, whose decoder was taught further on short
clips of emoji and shapes. The record in each one's folder of files says how it was taught and what it scores.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_dir, atomic_write_json, cache_dir, sha256_file
from keeplora.models.assets import MANIFEST, Progress, embedded_path
from keeplora.models.checkpoint import STAND_IN, STAND_IN_VIDEO

RECIPE = 1
"""Number of the assembly's recipe: raised when the same tower and files would give another folder."""

RECORD = "stand_in.json"
FOLDER_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""What the folder gets as it is; the weights become model.safetensors together with the tower."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """One stand-in: its files in this package, its weights, and (package file, prefix) of weights it shares."""

    files: Path
    weights: str
    shared: tuple[Path, str] | None = None

    def made_from(self) -> dict[str, Path]:
        """The package's files that its folder is made from, by a name each."""
        found = {name: self.files / name for name in (*FOLDER_FILES, self.weights)}
        return found | ({self.shared[0].name: self.shared[0]} if self.shared else {})


_HERE = Path(__file__).parent
PICTURES = StandIn(_HERE / "stand_in_files", "stand_in.safetensors")
VIDEOS = StandIn(
    _HERE / "stand_in_video_files",
    "stand_in_video.safetensors",
    (PICTURES.files / PICTURES.weights, "model.multi_modal_projector."),
)
STAND_INS = {STAND_IN: PICTURES, STAND_IN_VIDEO: VIDEOS}


def stand_in_record(name: str = STAND_IN) -> dict[str, Any]:
    """The recipe, provenance and held-out figures of a stand-in, as recorded when it was taught."""
    return json.loads((STAND_INS[name].files / RECORD).read_text(encoding="utf-8"))


def stand_in_path(name: str = STAND_IN, progress: Progress | None = None) -> Path:
    """A stand-in's folder in the user's cache, put together on the first call: an ordinary Hugging Face folder that
    `AutoModelForImageTextToText` and (for videos where torchvision is there) `AutoProcessor` open with nothing of
    keeplora's.

    Args:
        name: "stand-in" or "stand-in-video".
        progress: called with (what, done, total).

    Raises:
        KeepLoraError: the embedded model, whose tower this is, has not been fetched; or the installation is incomplete.
    """
    own = STAND_INS[name]
    parts = own.made_from()
    if missing := [key for key, file in (*parts.items(), (RECORD, own.files / RECORD)) if not file.is_file()]:
        raise KeepLoraError(f"the stand-in's {', '.join(missing)} is missing in {own.files}: reinstall keeplora")
    try:
        tower = embedded_path()
    except KeepLoraError as error:
        raise KeepLoraError(f"the stand-in needs the embedded model's vision tower, and {error}") from error
    made_from = {key: sha256_file(file) for key, file in parts.items()} | {"tower": tower.name}
    text = json.dumps([RECIPE, made_from], sort_keys=True)
    folder = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if (folder / MANIFEST).is_file():
        return folder
    report = progress or (lambda what, done, total: None)
    report(name, 0, 1)
    if folder.exists():  # without its manifest it was never finished
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_dir(folder) as part:
            _assemble(tower, own, part)
            atomic_write_json(part / MANIFEST, {"recipe": RECIPE, "made_from": made_from})
    except OSError as error:
        # Another process may have finished the same folder meanwhile; its content is the same.
        if not (folder / MANIFEST).is_file():
            raise KeepLoraError(f"cannot write the stand-in to {folder}: {error}") from error
    report(name, 1, 1)
    return folder


def tower_state(embedded: Path, side: int) -> dict[str, Any]:
    """The embedded model's vision tower as the state of a `Dinov2Model` for pictures of `side` pixels.

    Its position table [1, 1 + 37², D] is interpolated once to the pictures' grid, just as the tower itself would do at
    every call, so the outputs are the same.
    """
    from safetensors import safe_open
    from torch.nn.functional import interpolate

    prefix, key = "vision_model.", "embeddings.position_embeddings"
    with safe_open(embedded / "model.safetensors", "pt") as weights:
        state = {k.removeprefix(prefix): weights.get_tensor(k) for k in weights.keys() if k.startswith(prefix)}  # noqa: SIM118
    table = state[key].float()
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    old, new = round((table.shape[1] - 1) ** 0.5), side // patch
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    import torch

    state[key] = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)
    return state


def _assemble(embedded: Path, own: StandIn, folder: Path) -> None:
    """Write model.safetensors (float32) and the small files into `folder`."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    config: Any = AutoConfig.from_pretrained(own.files)
    model = AutoModelForImageTextToText.from_config(config).float()
    taught = {name: tensor.float() for name, tensor in load_file(own.files / own.weights).items()}
    if own.shared:
        file, prefix = own.shared
        taught |= {name: tensor.float() for name, tensor in load_file(file).items() if name.startswith(prefix)}
    tower = {
        f"model.vision_tower.{name}": tensor
        for name, tensor in tower_state(embedded, config.vision_config.image_size).items()
    }
    model.load_state_dict(taught | tower, strict=True)
    model.save_pretrained(folder)
    for name in FOLDER_FILES:  # after the model's own, so that the folder says exactly what the package says
        shutil.copyfile(own.files / name, folder / name)
