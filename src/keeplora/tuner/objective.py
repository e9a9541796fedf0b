"""What a learner may ask of a task beyond its loss: teachers, penalties and analytic methods need features and logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """A classification task against class prompts.

    A batch holds ``pixel_values`` [N, ...], ``labels`` [N] and the tokenised prompts of its candidate classes; a batch of
    videos, whose ``pixel_values`` are [N, F, ...], also ``frames`` [N], how many of the F each one has. Prompts are
    read from the batch, so a batch of another task brings its own. ``model`` stands in for the learner's model: a deep
    copy of it with other weights (a teacher); None is the learner's own, adapter included.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def templates(self) -> Sequence[str]: ...

    @property
    def text_batch(self) -> Mapping[str, Tensor]:
        """The tokenised training prompts, one per class."""
        ...

    def logits(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        """[N, C] float32, differentiable."""
        ...

    def image_features(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        """[N, D] float32, unit norm."""
        ...

    def text_features(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
        """[C, D] float32, unit norm, of the prompts in ``batch``."""
        ...

    def logits_of(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """[N, C]: exp(logit_scale) · cos (+ bias)."""
        ...
