"""The embedded default: DINOv2 ViT-S/14 and all-MiniLM-L6-v2, aligned by a small head into a CLIP-style model.

The class is an ordinary `transformers` model; `keeplora assets fetch` fills one (see `keeplora.models.assets`).
Importing this module registers it, so that `AutoConfig` and `AutoModel` open its folders as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_LOG_SCALE = 4.6052  # log 100, as in CLIP: a larger scale makes the contrastive loss unstable


class EmbeddedDualEncoderConfig(PretrainedConfig):
    """Configuration of `EmbeddedDualEncoder`.

    Args:
        vision_config: a `Dinov2Config` or its dict; its `image_size` is that of the position table (518), which
            the tower interpolates to the picture at hand.
        text_config: a `BertConfig` or its dict.
        projection_dim: D, the width of the shared space.
        image_size: side in pixels that pictures are resized and cropped to; a multiple of the patch size.
        logit_scale_init_value: log of the factor on the cosine.

    >>> EmbeddedDualEncoderConfig(projection_dim=64).projection_dim
    64
    """

    model_type = "keeplora_embedded"
    sub_configs = {"vision_config": Dinov2Config, "text_config": BertConfig}  # noqa: RUF012 # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        vision_config: Dinov2Config | dict[str, Any] | None = None,
        text_config: BertConfig | dict[str, Any] | None = None,
        projection_dim: int = 384,
        image_size: int = 112,
        logit_scale_init_value: float = 2.6592,
        **kwargs: Any,
    ) -> None:
        self.vision_config = (
            vision_config if isinstance(vision_config, Dinov2Config) else Dinov2Config(**vision_config or {})
        )
        self.text_config = text_config if isinstance(text_config, BertConfig) else BertConfig(**text_config or {})
        self.projection_dim = projection_dim
        self.image_size = image_size
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**kwargs)


@dataclass
class EmbeddedDualEncoderOutput(ModelOutput):
    """What `EmbeddedDualEncoder.forward` returns; the field names are CLIP's.

    `logits_per_image` [N, C], `logits_per_text` [C, N], `image_embeds` [N, D] and `text_embeds` [C, D]
    (L2-normalised), `loss` a scalar when it was asked for.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class EmbeddedDualEncoder(PreTrainedModel):
    """A DINOv2 tower and a BERT tower with one linear projection each.

    A picture is [cls; mean of the patches] of the last block (2 × hidden), a text the mean of its tokens' last
    hidden states where the attention mask is 1, both projected to `projection_dim`.

    >>> from transformers import BertConfig, Dinov2Config
    >>> tiny = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> config = EmbeddedDualEncoderConfig(
    ...     Dinov2Config(**tiny, image_size=28, patch_size=14), BertConfig(**tiny, vocab_size=9, intermediate_size=8),
    ...     projection_dim=4, image_size=28)
    >>> EmbeddedDualEncoder(config).get_image_features(torch.zeros(3, 3, 28, 28)).shape
    torch.Size([3, 4])
    """

    config_class = EmbeddedDualEncoderConfig
    base_model_prefix = "embedded"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["Dinov2Layer", "BertLayer"]  # noqa: RUF012

    def __init__(self, config: EmbeddedDualEncoderConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = Dinov2Model._from_config(vision)
        self.text_model = BertModel._from_config(text, add_pooling_layer=False)
        self.visual_projection = nn.Linear(2 * vision.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The towers initialise themselves; a missing projection must not stay uninitialised memory.
        super()._init_weights(module)
        if isinstance(module, EmbeddedDualEncoder):
            nn.init.constant_(module.logit_scale, module.config.logit_scale_init_value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Project pictures [N, 3, H, W] (ImageNet-normalised; H, W multiples of the patch size) to [N, D], not normalised."""
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.visual_projection(torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=-1))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Project texts [C, T] to [C, D], not normalised; positions where `attention_mask` is 0 do not count."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.text_projection((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_loss: bool = False,
        **_: Any,
    ) -> EmbeddedDualEncoderOutput:
        """Compare every picture with every text.

        With `return_loss` the pictures and texts are pairs (N = C) and the symmetric contrastive loss is added.
        Either side may be left out; then its features and the logits are None.
        """
        image = text = per_image = per_text = loss = None
        if pixel_values is not None:
            image = nn.functional.normalize(self.get_image_features(pixel_values), dim=-1)
        if input_ids is not None:
            text = nn.functional.normalize(self.get_text_features(input_ids, attention_mask), dim=-1)
        if image is not None and text is not None:
            per_image = self.logit_scale.exp() * image @ text.T.to(image.dtype)
            per_text = per_image.T
            if return_loss:
                pairs = torch.arange(len(image), device=image.device)
                cross = nn.functional.cross_entropy
                loss = (cross(per_image.float(), pairs) + cross(per_text.float(), pairs)) / 2
        return EmbeddedDualEncoderOutput(
            loss=loss, logits_per_image=per_image, logits_per_text=per_text, image_embeds=image, text_embeds=text
        )


def image_processor(image_size: int = 112) -> Any:
    """The processor whose `preprocessor_config.json` the folder carries: RGB, shortest side to `image_size`
    (bicubic), centre crop, ImageNet mean and deviation."""
    try:  # the PIL one: the other needs torchvision, and warns without it
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        resample=3,
        do_convert_rgb=True,
    )


AutoConfig.register(EmbeddedDualEncoderConfig.model_type, EmbeddedDualEncoderConfig, exist_ok=True)
AutoModel.register(EmbeddedDualEncoderConfig, EmbeddedDualEncoder, exist_ok=True)
