"""Clips as a class's processor takes them: arrays with what it wants to know of their times, or pictures in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from keeplora.models.chat import IMAGE, MARKS, VIDEO, Turn
from keeplora.models.video_processors import VIDEO_PROCESSORS
from keeplora.models.video_sizes import SMOL, fit, kind_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Clip(Protocol):
    """Some frames of a video.

    `frames`: RGB pictures of one size. `times`: when each was shown, in seconds from the start. `duration`: of the whole
    video, in seconds. `fps`: the source's frames per second, on average. `indices`: the frames' numbers in the source.
    """

    @property
    def frames(self) -> Sequence[Image]: ...
    @property
    def times(self) -> Sequence[float]: ...
    @property
    def duration(self) -> float: ...
    @property
    def fps(self) -> float: ...
    @property
    def indices(self) -> Sequence[int]: ...


def metadata(clip: Clip) -> dict[str, Any]:
    """What transformers' `VideoMetadata` holds of a clip.

    The processors compute a frame's time as its number / fps. In a source of variable rate that is not when it was shown,
    and the number (not whole, then) is what gives its time.
    """
    fps = float(clip.fps)
    numbers = [float(time) * fps for time in clip.times]
    if all(abs(number - index) <= 0.5 for number, index in zip(numbers, clip.indices, strict=True)):
        numbers = [int(index) for index in clip.indices]
    total = max(round(float(clip.duration) * fps), 1)
    return {"total_num_frames": total, "fps": fps, "duration": float(clip.duration), "frames_indices": numbers}


def reads_videos(processor: Any, model_type: str, writes: bool) -> bool:
    """Whether clips go through the class's own video input: it has one that is known, and its chat template `writes` it."""
    video = getattr(processor, "video_processor", None)
    return video is not None and writes and VIDEO_PROCESSORS.get(model_type) == kind_of(video)


def video_arguments(processor: Any, clips: Sequence[Clip], side: int | None) -> dict[str, Any]:
    """Arguments of a processor's call: `videos` as arrays, ready but for the rescaling, and how to take them."""
    video = processor.video_processor
    arrays = [np.stack([np.asarray(frame) for frame in fit(_rgb(clip.frames), video, side)]) for clip in clips]
    options: dict[str, Any] = {
        "do_resize": False, "do_center_crop": False, "do_sample_frames": False, "do_convert_rgb": False,
        "input_data_format": "channels_last", "video_metadata": [metadata(clip) for clip in clips],
        # SmolVLM's fills up what has fewer frames; the others' could not be made one tensor of.
        "return_tensors": "pt" if kind_of(video) == SMOL else None,
    }  # fmt: skip
    if "cap_pixels_per_frame" in video.valid_kwargs.__annotations__:  # done by `fit`; None would warn
        options["cap_pixels_per_frame"] = False
    pictures = picture_options(processor, whole=False) | {"return_tensors": "pt"}
    return {
        "videos": arrays, "videos_kwargs": options, "text_kwargs": {"return_tensors": "pt"}, "images_kwargs": pictures,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Said:
    role: str
    text: str


def as_pictures(
    turns: Sequence[Turn], pictures: Sequence[Image], clips: Sequence[Clip], side: int | None
) -> tuple[list[Turn], list[Image]]:
    """The conversation with each video written as its frames, one picture each, in a row."""
    shown, moving, drawn = iter(pictures), iter(clips), []

    def draw(mark: str) -> str:
        if mark == IMAGE:
            drawn.append(next(shown))
            return IMAGE
        if mark != VIDEO:
            return mark
        frames = [_within(frame, side) for frame in _rgb(next(moving).frames)]
        drawn.extend(frames)
        return IMAGE * len(frames)

    said: list[Turn] = [_Said(turn.role, "".join(draw(part) for part in MARKS.split(turn.text))) for turn in turns]
    return said, drawn


# What a class does to show a picture in several pieces: with many frames, that would be all of the context.
_PIECES = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")


def picture_options(processor: Any, *, whole: bool) -> dict[str, Any]:
    """How a class's image processor is called; `whole`: to read each picture in one piece, where the class can."""
    known = getattr(getattr(processor.image_processor, "valid_kwargs", None), "__annotations__", {})
    options = {key: False for key in _PIECES if whole and key in known}
    if "return_legacy_image_output" in known:  # Video-LLaVA's, under the name that its model takes
        options["return_legacy_image_output"] = False
    return options


def _rgb(frames: Sequence[Image]) -> list[Image]:
    return [frame if frame.mode == "RGB" else frame.convert("RGB") for frame in frames]


def _within(frame: Image, side: int | None) -> Image:
    if side is None or max(frame.size) <= side:
        return frame
    smaller = frame.copy()
    smaller.thumbnail((side, side))
    return smaller
