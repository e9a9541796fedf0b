"""The size at which a class reads the frames of a video, and frames brought to it by PIL.

transformers resizes frames by torchvision, pictures by either. Here it is always PIL, with or without torchvision, so that
results do not depend on what is installed; which size that is follows each class's own rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keeplora.errors import KeepLoraError

if TYPE_CHECKING:
    from PIL.Image import Image

LLAVA = ("VideoLlavaVideoProcessor", "LlavaNextVideoVideoProcessor", "LlavaOnevisionVideoProcessor")
QWEN2, QWEN3, SMOL = "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor", "SmolVLMVideoProcessor"
_SMOL_LARGEST = 4096

Size = tuple[int, int]


def kind_of(processor: Any) -> str:
    """The name of transformers' video processor that this one is or stands in for."""
    return getattr(processor, "video_processor_type", None) or type(processor).__name__


def plain(size: Any) -> dict[str, int]:
    """A size setting without its empty entries."""
    return {key: value for key, value in dict(size or {}).items() if value}


def fit(frames: Sequence[Image], processor: Any, side: int | None = None) -> list[Image]:
    """The frames of one video at the size at which the class of `processor` reads them: resized and cut by PIL.

    Args:
        frames: RGB, all of one size.
        processor: a video processor of transformers, or our own in its place.
        side: for classes that read any size, the side in pixels of the square that a frame fills at most.

    Raises `ValueError` for frames that the class cannot read (too long and thin).
    """
    kind, resample = kind_of(processor), processor.resample
    width, height = frames[0].size
    for w, h in _sizes(kind, processor, (width, height), len(frames), side):
        frames = [f if f.size == (w, h) else f.resize((w, h), resample) for f in frames]  # type: ignore[arg-type]
    if kind in LLAVA and processor.do_center_crop:
        frames = [_centre(frame, plain(processor.crop_size)) for frame in frames]
    return list(frames)


def _sizes(kind: str, processor: Any, size: Size, count: int, side: int | None) -> list[Size]:
    """The sizes (width, height) that frames are resized to, one after the other."""
    if not processor.do_resize:
        return []
    wanted = plain(processor.size)
    if kind in (QWEN2, QWEN3):
        return [_qwen(kind, processor, wanted, size, count, side)]
    if kind == SMOL:
        square = plain(processor.max_image_size)["longest_edge"]
        first = _longest(size, wanted["longest_edge"]) if "longest_edge" in wanted else _exact(wanted)
        return [first, (square, square)]
    return [_shortest(size, wanted["shortest_edge"]) if "shortest_edge" in wanted else _exact(wanted)]


def _exact(wanted: dict[str, int]) -> Size:
    return wanted["width"], wanted["height"]


def _shortest(size: Size, edge: int) -> Size:
    short, long = min(size), max(size)
    other = int(edge * long / short)
    return (edge, other) if size[0] <= size[1] else (other, edge)


def _longest(size: Size, edge: int) -> Size:
    edge, ratio = min(_SMOL_LARGEST, edge), size[0] / size[1]
    if ratio >= 1:
        other = int(edge / ratio)
        return edge, max(1, other + other % 2)
    other = int(edge * ratio)
    return max(1, other + other % 2), edge


def _qwen(kind: str, processor: Any, wanted: dict[str, int], size: Size, count: int, side: int | None) -> Size:
    """Sides that are multiples of the merged patch, at most so many pixels: per frame (Qwen2), or in all frames (Qwen3)."""
    width, height = size
    factor, together = processor.patch_size * processor.merge_size, processor.temporal_patch_size
    least, most = wanted["shortest_edge"], wanted["longest_edge"]
    if kind == QWEN3:
        # One frame alone, which transformers refuses, is shown as the first of as many as make a temporal patch.
        count = max(count, together)
        if processor.cap_pixels_per_frame:
            cap = processor.max_video_tokens * factor * factor
            most = count * max(min(cap, most // count), int(least * 1.05))
        if side is not None:
            most = min(most, count * side * side)
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        times, counted = count, round(count / together) * together
    else:
        if processor.cap_pixels_per_frame:
            total = int(processor.max_video_tokens * factor * factor * 0.9)
            most = max(min(most, total * together // count), int(least * 1.05))
        if side is not None:
            most = min(most, side * side)
        times = counted = 1
    least = min(least, most)
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"a frame of {width} x {height} is too long and thin; the aspect ratio must be below 200")
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if counted * high * wide > most:
        beta = math.sqrt(times * height * width / most)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif counted * high * wide < least:
        beta = math.sqrt(least / (times * height * width))
        high = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return wide, high


def _centre(frame: Image, crop: dict[str, int]) -> Image:
    """The middle of a frame, with black around it where the frame is smaller."""
    wide, high = crop["width"], crop["height"]
    left = -((wide - frame.width) // 2) if wide > frame.width else (frame.width - wide) // 2
    top = -((high - frame.height) // 2) if high > frame.height else (frame.height - high) // 2
    return frame if frame.size == (wide, high) else frame.crop((left, top, left + wide, top + high))


def check_side(processor: Any, side: int, name: str) -> None:
    """Refuse a side of frames that the class, read through `processor`'s video processor or as pictures, does not take."""
    video: Any = getattr(processor, "video_processor", None)
    kind = kind_of(video)
    if kind in (QWEN2, QWEN3):
        least = video.patch_size * video.merge_size
        if side < least:
            raise KeepLoraError(f"video_size {side} is too small for {name}; take at least {least}")
        return
    if kind in LLAVA:
        own = plain(video.crop_size) if video.do_center_crop else plain(video.size)
    elif kind == SMOL:
        own = plain(video.max_image_size)
    else:  # frames are read as pictures
        images = processor.image_processor
        own = plain(images.size)
        if set(own) & {"longest_edge", "max_pixels"} and "max_image_size" not in vars(images):
            return
    if side not in own.values():
        fixed = " x ".join(str(value) for value in own.values())
        raise KeepLoraError(f"{name} reads frames at its own size ({fixed}) only; leave video_size out")
