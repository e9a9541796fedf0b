"""Small video files for tests, written by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: Codec by the file's ending.
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".mov": "mpeg4", ".avi": "mpeg4", ".webm": "libvpx-vp9"}


def write_clip(path: Path, frames: Sequence[np.ndarray], rate: int = 8, *, intra: bool = False) -> Path:
    """Encode frames [H, W, 3] uint8, H and W even, at ``rate`` a second; ``intra``: each frame for itself."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    codec = CODECS[path.suffix.lower()]
    options = {"crf": "12", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        if intra:
            stream.gop_size = 1
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def plain(levels: Sequence[float], seed: int = 0, size: tuple[int, int] = (48, 40)) -> list[np.ndarray]:
    """A frame of each grey level, under a fixed texture that the seed draws."""
    width, height = size
    texture = np.random.default_rng(seed).normal(0, 12, (height // 4, width // 4, 3)).repeat(4, 0).repeat(4, 1)
    return [np.clip(texture + level, 0, 255).astype(np.uint8) for level in levels]
