"""Videos of different lengths in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def video_by_video(model: nn.Module, frames: Tensor | None) -> Iterator[None]:
    """Inside, videos [N, F, 3, H, W] that were filled up to the same F go through the model each with its own frames.

    LLaVA's classes would make features of the filling too, for which there are no places in the text. Videos of one length
    go through together, as ever.

    Args:
        frames: [N], how many frames of each are its own; None where the batch has no such videos.
    """
    if frames is None or len(set(frames.tolist())) <= 1:
        yield
        return
    owner: Any = [m for m in model.modules() if hasattr(type(m), "get_video_features")][-1]
    inner, counts = owner.get_video_features, frames.tolist()

    def each(pixel_values_videos: Tensor, **options: Any) -> Any:
        outputs = [
            inner(pixel_values_videos=video[:count].unsqueeze(0), **options)
            for video, count in zip(pixel_values_videos, counts, strict=True)
        ]
        # Rows of all videos in their order; the classes only flatten what they get.
        rows = [output.pooler_output.flatten(0, -2) for output in outputs]
        outputs[0].pooler_output = torch.cat(rows).unsqueeze(0)
        return outputs[0]

    owner.get_video_features = each
    try:
        yield
    finally:
        del owner.get_video_features  # the class's own shows again
