"""One interface to every CLIP-style model: a picture tower, a text tower and the cosine between them; videos as frames."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError, TargetError
from keeplora.files import atomic_dir
from keeplora.models.templates import fill, resolve_templates

if TYPE_CHECKING:
    from PIL.Image import Image

# The attention linears of the encoder blocks, by the last parts of their names. The part before the last is named too
# where a suffix alone would catch more: SigLIP's pooling head has an `out_proj` inside an nn.MultiheadAttention, which
# takes an adapter that never has an effect.
ATTENTION_SUFFIXES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "self_attn.o_proj",
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
    "self.query", "self.key", "self.value", "attention.output.dense",
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
)  # fmt: skip


class DualEncoder:
    """A stock Hugging Face dual encoder with its processors; the class for towers that honour `attention_mask`.

    Texts are padded to the longest of the batch and pads are masked (`token_masks`). Families with other rules
    override the few methods that differ. `model` stays the ordinary module: an adapter that PEFT injects into it in
    place acts through every method here.

    Args:
        model: a model with `vision_model`, `text_model`, `get_image_features`, `get_text_features`, `logit_scale`.
        tokenizer, images: its tokenizer and image processor.
        name, revision: where it came from.
        image_size: side in pixels to read pictures at; None means the image processor's own.

    Attributes:
        model: nn.Module, in eval mode; name, revision, family: str; image_size: int, in pixels;
        context_length: the most tokens that a text may have;
        towers: {"vision": ..., "text": ...}, the module-name prefixes of the two towers.
    """

    kind: ClassVar[str] = "classification"
    family: ClassVar[str] = "vision-text"
    towers: ClassVar[dict[str, str]] = {"vision": "vision_model", "text": "text_model"}
    in_step: bool = False
    """Whether several processes hold the model together and call it at the same times."""
    _picture_dims: ClassVar[int] = 3  # of what `preprocess` makes of one picture

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        images: Any,
        *,
        name: str = "",
        revision: str | None = None,
        image_size: int | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.tokenizer, self.images = tokenizer, images
        self.name, self.revision = name, revision
        self.context_length = min(int(tokenizer.model_max_length), int(self.text_config.max_position_embeddings))
        self._image_options: dict[str, Any] = {}
        self.image_size = self._set_image_size(image_size)
        self._targets = self._find_targets()
        self._cache: dict[Any, Tensor] | None = None

    # -- what the model is ---------------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        return self.model.config.text_config

    @property
    def vision_config(self) -> Any:
        return self.model.config.vision_config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def default_target_modules(self) -> list[str]:
        """Name suffixes of the attention linears in both towers' encoder blocks, as PEFT's `target_modules` takes them.

        Raises `TargetError` when a tower has none that is known; then name the linears yourself.
        """
        for tower, prefix in self.towers.items():
            if not any(name.startswith(prefix + ".") for name, _ in self._targets):
                kind = type(self.model.get_submodule(prefix)).__name__
                raise TargetError(
                    f"{self.name or 'the model'}: no attention linear with a known name is in its {tower} tower "
                    f"({kind}); give target_modules, as the last parts of the names of its nn.Linear modules"
                )
        found = {suffix for _, suffix in self._targets}
        return [suffix for suffix in ATTENTION_SUFFIXES if suffix in found]

    def _find_targets(self) -> list[tuple[str, str]]:
        # Looked up once, before any adapter renames the linears (PEFT puts them under `.base_layer`).
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return [(name, s) for name in linears for s in ATTENTION_SUFFIXES if name.endswith("." + s)]

    # -- pictures ------------------------------------------------------------------------------------------------

    def _set_image_size(self, image_size: int | None) -> int:
        size = {k: v for k, v in dict(self.images.size or {}).items() if v}
        crop = {k: v for k, v in dict(getattr(self.images, "crop_size", None) or {}).items() if v}
        cropped = bool(getattr(self.images, "do_center_crop", False)) and bool(crop)
        native = int((crop if cropped else size).get("height") or size.get("shortest_edge") or 0)
        if not native:
            raise KeepLoraError(f"{self.name}: its image processor has no fixed picture size (size is {size})")
        forward = inspect.signature(self.model.get_submodule(self.towers["vision"]).forward).parameters
        table = getattr(self.vision_config, "image_size", native)
        table = table[0] if isinstance(table, list | tuple) else table
        wanted = native if image_size is None else image_size
        self._interpolate = {}
        if wanted != table and "interpolate_pos_encoding" in forward:
            self._interpolate = {"interpolate_pos_encoding": True}
        if wanted == native:
            return native
        self._check_patches(wanted)
        if "shortest_edge" in size:  # keep the margin that the crop cuts away
            size = {"shortest_edge": round(size["shortest_edge"] * wanted / native)}
        else:
            size = {"height": wanted, "width": wanted}
        self._image_options = {"size": size} | ({"crop_size": {"height": wanted, "width": wanted}} if cropped else {})
        return wanted

    def _check_patches(self, image_size: int) -> None:
        patch = getattr(self.vision_config, "patch_size", 1)
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        if image_size < patch or image_size % patch:
            raise KeepLoraError(
                f"image_size {image_size} is not a multiple of the patch size {patch} of {self.name or 'the model'}; "
                f"take {max(1, round(image_size / patch)) * patch}"
            )

    def preprocess(self, picture: Image) -> Tensor:
        """Turn one RGB picture into what `image_features` takes, with the family's official image processor (PIL).

        Returns float32 [3, image_size, image_size].
        """
        pixels = self.images(images=picture, return_tensors="pt", **self._image_options)["pixel_values"][0]
        if pixels.ndim == 4 and len(pixels) == 1:  # VideoMAE's processor takes a picture for a clip of one frame
            pixels = pixels[0]
        if tuple(pixels.shape) != (3, self.image_size, self.image_size):
            raise KeepLoraError(
                f"{self.name}: its image processor made {tuple(pixels.shape)} of a picture of {picture.size}, not "
                f"{(3, self.image_size, self.image_size)}, so pictures cannot be batched"
            )
        return pixels

    @property
    def clip_frames(self) -> int | None:
        """The one number of frames that the model reads, of videos and of nothing else; None: pictures, and any number."""
        return None

    def preprocess_clip(self, frames: Sequence[Image], length: int | None = None) -> Tensor:
        """Turn a video's RGB frames into what `image_features` takes, each as `preprocess` does.

        Returns float32 [length, 3, image_size, image_size]; places behind the last frame are NaN, so that videos of
        different numbers of frames stack.
        """
        pixels = torch.stack([self.preprocess(frame) for frame in frames])
        missing = (length or len(frames)) - len(frames)
        if missing < 0:
            raise ValueError(f"{len(frames)} frames do not fit into {length}")
        return torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), torch.nan)]) if missing else pixels

    def is_clip(self, pixel_values: Tensor) -> bool:
        """Whether this is a batch of videos, not of pictures."""
        return pixel_values.ndim == self._picture_dims + 2

    def _rows(self, pixel_values: Tensor) -> Tensor:
        """What goes through the picture tower: [N, ...] as it is, and of [N, F, ...] every frame that is there, [M, ...]."""
        if not self.is_clip(pixel_values):
            return pixel_values
        present = frames_present(pixel_values)
        return pixel_values.flatten(0, 1) if bool(present.all()) else pixel_values[present]

    def picture_masks(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Positions of the picture tower that count in C and G, as `token_masks`; {} means all of them."""
        return {}

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Features of preprocessed pictures or videos, float32, L2-normalised, differentiable.

        Args:
            pixel_values: pictures [N, 3, H, W], or videos [N, F, 3, H, W] from `preprocess_clip`.

        Returns [N, D]. A video's is the mean of its frames' normalised features, normalised again: the parameter-free
        "meanP" of CLIP4Clip (Luo et al., 2104.08860) as its authors' code has it. The order of the frames does not matter.
        """
        features = self._picture_features(self._rows(pixel_values))
        if not self.is_clip(pixel_values):
            return features
        present = frames_present(pixel_values).to(features.device)
        every = features.new_zeros(*present.shape, features.shape[-1])
        every[present] = features
        return nn.functional.normalize(every.sum(dim=1) / present.sum(dim=1, keepdim=True), dim=-1)

    def _picture_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised features of single pictures or frames: [M, 3, H, W] -> [M, D]."""
        out = self.model.get_image_features(pixel_values=pixel_values.to(self.device), **self._interpolate)
        return normalised(out)

    # -- texts ---------------------------------------------------------------------------------------------------

    @property
    def _padding(self) -> str:
        # Only right padding leaves the positions of the words where `max_length` has them.
        return "longest" if self.tokenizer.padding_side == "right" else "max_length"

    def tokenize(self, texts: Sequence[str], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tokenise C texts, padded by the family's rule.

        Args:
            texts: at least one.
            names: the class of each text, for the error message.

        Returns `input_ids` [C, T], and `attention_mask` [C, T] where the family reads one. A text that is longer than
        `context_length` raises `KeepLoraError`: cut short, two classes could get the same features.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise KeepLoraError("there is no text to tokenise: the list of prompts is empty")
        rows = self.tokenizer(
            texts, padding=self._padding, max_length=self.context_length, truncation=False, return_token_type_ids=False
        )
        if max(map(len, rows["input_ids"])) > self.context_length:
            self._refuse_long(texts, names)
        return {key: torch.tensor(value, device=self.device) for key, value in rows.items()}

    def _refuse_long(self, texts: Sequence[str], names: Sequence[str] | None) -> None:
        for i, text in enumerate(texts):
            length = len(self.tokenizer(text, verbose=False)["input_ids"])
            if length > self.context_length:
                whose = f"class {names[i]!r}: " if names else ""
                raise KeepLoraError(
                    f"{whose}the prompt {text!r} is {length} tokens long, but the text tower of "
                    f"{self.name or 'the model'} reads {self.context_length} at most; "
                    "shorten the class name or its template"
                )

    def token_masks(self, text_batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions of the text tower that count in C and G: {tower prefix: bool [C, T]}; {} means all of them."""
        mask = text_batch.get("attention_mask")
        return {} if mask is None else {self.towers["text"]: mask.bool()}

    def text_lengths(self, text_batch: Mapping[str, Tensor]) -> list[int]:
        """Tokens of each of C texts from `tokenize` that its feature depends on; what is behind them may be cut off."""
        mask = text_batch.get("attention_mask")
        if mask is None or self._padding != "longest":
            return [text_batch["input_ids"].shape[1]] * len(text_batch["input_ids"])
        return mask.sum(dim=1).tolist()

    def text_features(self, text_batch: Mapping[str, Tensor]) -> Tensor:
        """Features of a batch from `tokenize`: [C, D], float32, L2-normalised, differentiable."""
        batch = {key: value.to(self.device) for key, value in text_batch.items()}
        return normalised(self.model.get_text_features(**batch))

    # -- both ----------------------------------------------------------------------------------------------------

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """exp(logit_scale) · cos, plus logit_bias where the family has one: [N, D], [C, D] -> [N, C], float32."""
        # Out of autocast: a bfloat16 product would round logits of about 100 by up to 0.4.
        with torch.autocast(image_features.device.type, enabled=False):
            logits = image_features.float() @ text_features.float().T * self.model.logit_scale.float().exp()
            bias = getattr(self.model, "logit_bias", None)
            return logits if bias is None else logits + bias.float()

    def compare(self, pixel_values: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [N, C], image features [N, D]) of preprocessed pictures or videos against the features of C texts.

        Families whose text features depend on what they are compared with override it.
        """
        image_features = self.image_features(pixel_values)
        return self.logits(image_features, text_features), image_features

    def class_prompts(self, classes: Sequence[str], templates: str | Sequence[str]) -> list[str]:
        """Every template filled with every class, class by class: C · T prompts.

        `templates` is a template, a list of them, or the name of a set in `keeplora.models.templates`.
        """
        templates = resolve_templates(templates)
        return [fill(template, c) for c in classes for template in templates]

    def class_features(self, classes: Sequence[str], templates: str | Sequence[str]) -> Tensor:
        """Text features of classes: the mean over templates of the normalised features, normalised again: [C, D].

        Without gradients, in eval mode, 256 prompts at a time. Inside `evaluating()` the result is remembered.
        """
        if not classes:
            raise KeepLoraError("there is no class to compare pictures with: the list of classes is empty")
        templates = resolve_templates(templates)
        key = (tuple(classes), tuple(templates))
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        prompts = self.class_prompts(classes, templates)
        names = [c for c in classes for _ in templates]
        with torch.no_grad(), self._eval_mode():
            parts = [
                self.text_features(self.tokenize(prompts[i : i + 256], names[i : i + 256]))
                for i in range(0, len(prompts), 256)
            ]
            features = self._class_feature(torch.cat(parts).view(len(classes), len(templates), -1))
        if self._cache is not None:
            self._cache[key] = features
        return features

    def _class_feature(self, features: Tensor) -> Tensor:
        """[C, D] from the text features of every template, [C, T, D]."""
        return nn.functional.normalize(features.mean(dim=1), dim=-1)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[DualEncoder]:
        """A block in which the weights stay as they are: eval mode, no gradients, class features computed once.

        The cache begins and ends with the block, so it can never hold features of other weights or another adapter.
        """
        outer = self._cache
        self._cache = {} if outer is None else outer
        try:
            with torch.no_grad(), self._eval_mode():
                yield self
        finally:
            self._cache = outer

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def around(self, model: nn.Module) -> DualEncoder:
        """The same family around another module of the same class, such as a copy with other weights; nothing is cached."""
        other = copy.copy(self)
        other.model, other._cache = model, None
        return other

    def to(self, device: str | torch.device) -> DualEncoder:
        """Move the model to `device`."""
        self.model.to(device)
        return self

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write model, tokenizer and image processor as an ordinary folder, which must not exist yet.

        The image processor keeps the checkpoint's own picture size, which is what stock `transformers` can feed the
        saved model; pass `image_size` to `load_model` again for another. An attached adapter is refused.
        """
        directory = Path(directory)
        if any(hasattr(module, "base_layer") for module in self.model.modules()):
            raise KeepLoraError(
                f"{directory}: an adapter is attached to the model, whose weights would be saved under PEFT's names; "
                "merge or unload it first"
            )
        if directory.exists():
            raise KeepLoraError(f"{directory} exists already; choose a new folder or remove it")
        with atomic_dir(directory) as part:
            self.model.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            self.images.save_pretrained(part)
        return directory


def frames_present(pixel_values: Tensor) -> Tensor:
    """bool [N, F]: which frames of a batch of videos are there; see `DualEncoder.preprocess_clip`."""
    return ~pixel_values.flatten(2)[..., 0].isnan()


def normalised(output: Any) -> Tensor:
    """The projected features in a tensor or, in transformers 5, in an output's `pooler_output`; unit norm, float32."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return nn.functional.normalize(features.float(), dim=-1)
