"""The frames of the video stand-in's reels, seen once by tower and projector and pooled as the video class pools them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stand_in_model import LAYERS, features
from stand_in_pictures import Thing
from stand_in_reels import MAKERS, Cast, Reel, make_reel
from torch import Tensor, nn

POOLED = 16
"""Places of a frame after pooling: 4 x 4 of the tower's 8 x 8."""


def pooled(seen: Tensor) -> Tensor:
    """[N, 64, D] to [N, 16, D], as `LlavaOnevisionModel.apply_pooling` does it."""
    side = round(seen.shape[1] ** 0.5)
    grid = seen.view(len(seen), side, side, -1).permute(0, 3, 1, 2)
    small = nn.functional.interpolate(grid, size=[(side + 1) // 2] * 2, mode="bilinear")
    return small.permute(0, 2, 3, 1).reshape(len(seen), -1, seen.shape[-1])


@torch.inference_mode()
def projected(projector: nn.Module, cached: np.ndarray, batch: int = 512) -> np.ndarray:
    """Tower features float16 [N, 64, F] to what the decoder reads of a frame, float16 [N, 16, D]."""
    found = []
    for start in range(0, len(cached), batch):
        part = torch.from_numpy(np.asarray(cached[start : start + batch], np.float32))
        found.append(pooled(projector(part)).half().numpy())
    return np.concatenate(found)


def bank(
    things: Sequence[Thing], sizes: dict[str, int], tower: Any, projector: nn.Module, folder: Path, side: str = "train"
) -> tuple[list[Reel], np.ndarray]:
    """The reels and all their frames, float16 [N, 16, D]; made once, in parts of one kind each, and kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cast, reels, seen, base = Cast(things, side), [], [], 0
    for kind in MAKERS:
        file = folder / f"reels-{kind}-{sizes[kind]}.pkl"
        if not file.is_file():
            tasks = [(kind, cast, f"reel {side} {kind} {number}") for number in range(sizes[kind])]
            made, parts = [], []
            for start in range(0, len(tasks), 64):
                found = [make_reel(task) for task in tasks[start : start + 64]]
                frames = np.concatenate([f for _, f in found])
                raw = np.zeros((len(frames), 64, 384 * len(LAYERS)), np.float16)
                features(tower, frames, raw, 32)
                parts.append(projected(projector, raw))
                for reel, own in found:
                    reel.base = len(own)
                    made.append(reel)
                print(f"{kind}: {start + len(found)} of {len(tasks)} reels", flush=True)
            part = file.with_suffix(".part")
            part.write_bytes(pickle.dumps((made, np.concatenate(parts))))
            os.replace(part, file)
        made, frames = pickle.loads(file.read_bytes())
        for reel in made:
            reel.base, base = base, base + reel.base
        reels += made
        seen.append(frames)
    return reels, np.concatenate(seen)
