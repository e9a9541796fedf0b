"""The settings that generative models alone have."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    # strict: `r: true` is not 1 and `epochs: "3"` is not 3; a configuration says what it means.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PartsConfig(Section):
    """Which parts of a generative model learn, where target_modules names none. A dual encoder has none of these parts."""

    language: Literal["protected"] = "protected"
    projector: Literal["protected", "frozen", "free"] = Field(
        default="protected", description="protected like every target, frozen, or trained in full without protection"
    )
    vision: Literal["frozen", "protected"] = "frozen"


class TokenWeightsConfig(Section):
    """How much each kind of token of a conversation counts in the statistics C and G of the language model."""

    text: float = Field(default=1.0, ge=0)
    image: float = Field(default=1.0, ge=0)
    answer: float = Field(default=1.0, ge=0)


class GenerationConfig(Section):
    """How answers are generated when a generative model is scored."""

    sample: bool = Field(default=False, description="draw tokens at random (seeded); off: greedy")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
