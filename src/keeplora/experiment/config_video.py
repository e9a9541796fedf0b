"""How videos are read, whatever the kind of model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from keeplora.data.video import Sampling
from keeplora.experiment.config_generation import Section


class VideoConfig(Section):
    """Which frames of a video the model sees."""

    frames: int = Field(default=8, ge=1, description="frames of a video in training and evaluation")
    statistics_frames: int = Field(
        default=4, ge=1, description="frames of a video where gradients and features are collected (at most `frames`)"
    )
    sampling: Literal["uniform", "segment", "fps"] = Field(
        default="uniform",
        description="evenly from the first to the last frame, the middle of equal parts, or at a rate",
    )
    fps: float | None = Field(
        default=None, gt=0, description="frames a second of `sampling: fps`, at most `frames` in all"
    )
    size: int | None = Field(
        default=None, ge=1, description="side in pixels that frames fill at most; None: the model's own"
    )
    cache_mib: int = Field(default=1024, ge=0, description="decoded frames kept in memory, all workers together")

    @model_validator(mode="after")
    def _rate(self) -> VideoConfig:
        if (self.fps is not None) != (self.sampling == "fps"):
            raise PydanticCustomError("fps", "fps and `sampling: fps` go together; give both or neither")
        return self

    @property
    def told(self) -> dict[str, Any]:
        """What must be equal for the numbers of two runs on videos to stand in one table."""
        return self.model_dump(exclude={"cache_mib"})

    def sampling_of(self, *, statistics: bool = False) -> Sampling:
        """The frames to take, those of the statistics passes or those of training and evaluation."""
        frames = min(self.frames, self.statistics_frames) if statistics else self.frames
        return Sampling(method=self.sampling, frames=frames, fps=self.fps)
