"""Our own video processor, in the place of transformers' where torchvision is missing, with the same tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keeplora.models.video_sizes import LLAVA, QWEN2, QWEN3, SMOL

VIDEO_FILE, IMAGE_FILE = "video_preprocessor_config.json", "preprocessor_config.json"

# The classes whose video input is used; all others read a video's frames as pictures.
VIDEO_PROCESSORS = {
    "video_llava": LLAVA[0], "llava_next_video": LLAVA[1], "llava_onevision": LLAVA[2], "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2, "qwen3_vl": QWEN3, "qwen3_vl_moe": QWEN3, "smolvlm": SMOL,
}  # fmt: skip

_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_BICUBIC, _LANCZOS = 3, 1
_SHARED = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_center_crop": None,
    "crop_size": None, "resample": _BICUBIC, "num_frames": None, "fps": None,
}  # fmt: skip
_CROPPED = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}} | _CLIP
_PATCHES = {"temporal_patch_size": 2, "merge_size": 2, "cap_pixels_per_frame": None}
# transformers' own defaults of each class, for settings that a checkpoint leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    LLAVA[0]: _SHARED | _CROPPED,
    LLAVA[1]: _SHARED | _CROPPED,
    LLAVA[2]: _SHARED | _CLIP | {"size": {"height": 384, "width": 384}},
    QWEN2: _SHARED | _CLIP | _PATCHES | {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}, "patch_size": 14,
        "max_video_tokens": 128000,
    },
    QWEN3: _SHARED | _HALF | _PATCHES | {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}, "patch_size": 16,
        "max_video_tokens": 768, "fps": 2,
    },
    SMOL: _SHARED | _HALF | {
        "size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}, "resample": _LANCZOS, "do_pad": True,
    },
}  # fmt: skip


class FrameProcessor:
    """Stands in as a processor's `video_processor`, so that the processor itself writes what a video is in the text.

    Args:
        kind: the class of transformers that it stands in for, a key of `DEFAULTS`.
        settings: the checkpoint's; what is left out is the class's default.

    Called with videos [F, H, W, 3] uint8, already resized and cut (`video_sizes.fit`), it gives what that class would:
    `pixel_values_videos` (a list of [F, 3, H, W]; of Qwen-VL patches [P, D] with `video_grid_thw`), or SmolVLM's
    `pixel_values` [videos, F, 3, H, W] with their mask.
    """

    _auto_class = None

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        from transformers.image_processing_utils import get_size_dict
        from transformers.processing_utils import VideosKwargs

        self.valid_kwargs = VideosKwargs
        self.video_processor_type = kind
        own = {key: value for key, value in settings.items() if value is not None}
        if kind in (QWEN2, QWEN3):  # the older names of the limits
            size = dict(own.get("size") or DEFAULTS[kind]["size"])
            for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                size[new] = own.get(old) or size.pop(old, None) or size[new]
            own["size"] = size
        if kind == SMOL and (sampling := own.get("video_sampling")):
            own |= {"num_frames": sampling["max_frames"], "fps": sampling["fps"]}
            own["size"] = own.get("size") or sampling["video_size"]
        for key, default in DEFAULTS[kind].items():
            setattr(self, key, own.get(key, default))
        self.size = dict(get_size_dict(self.size, default_to_square=kind not in (*LLAVA, QWEN2, QWEN3)))
        if self.crop_size is not None:
            self.crop_size = dict(get_size_dict(self.crop_size, param_name="crop_size"))

    def to_dict(self) -> dict[str, Any]:
        """The settings, as transformers writes them."""
        return {key: value for key, value in vars(self).items() if key != "valid_kwargs"}

    def __getattr__(self, name: str) -> Any:  # the settings, for type checkers; reached for unknown names alone
        raise AttributeError(f"{type(self).__name__} of {self.__dict__.get('video_processor_type')} has no {name!r}")

    def __call__(self, videos: Any, *, video_metadata: Any = None, return_metadata: bool = False, **_: Any) -> Any:
        from transformers.feature_extraction_utils import BatchFeature
        from transformers.video_utils import make_batched_metadata, make_batched_videos

        videos = make_batched_videos(videos)
        pixels = [self._normalised(torch.from_numpy(v).permute(0, 3, 1, 2).contiguous()) for v in videos]
        if self.video_processor_type in (QWEN2, QWEN3):
            patches = [_patches(p, self.patch_size, self.merge_size, self.temporal_patch_size) for p in pixels]
            data: dict[str, Any] = {
                "pixel_values_videos": torch.cat([rows for rows, _ in patches]),
                "video_grid_thw": torch.tensor([grid for _, grid in patches]),
            }
        elif self.video_processor_type == SMOL:
            filled = stacked(pixels)
            data = {"pixel_values": filled}
            if self.do_pad:  # of the pixels alone: the model sees for itself which frames are filling
                data["pixel_attention_mask"] = torch.ones_like(filled[:, :, 0], dtype=torch.int64)
        else:
            data = {"pixel_values_videos": pixels}
        if return_metadata:
            data["video_metadata"] = make_batched_metadata(videos, video_metadata)
        return BatchFeature(data)

    def _normalised(self, video: Tensor) -> Tensor:
        """[F, 3, H, W] uint8 to float32, in the order of operations of transformers' (rescaling fused into mean and std)."""
        if not self.do_normalize:
            return video * self.rescale_factor if self.do_rescale else video
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        if self.do_rescale:
            mean, std = mean * (1.0 / self.rescale_factor), std * (1.0 / self.rescale_factor)
        return video.to(torch.float32).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def stacked(videos: list[Tensor]) -> Tensor:
    """Videos [F, ...] as one tensor, filled up with zero frames to the most frames."""
    most = max(len(video) for video in videos)
    return torch.stack([torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in videos])


def _patches(video: Tensor, patch: int, merge: int, together: int) -> tuple[Tensor, list[int]]:
    """Qwen-VL's flat patches [T·H·W, 3·together·patch²], neighbours that are merged beside each other, and (T, H, W)."""
    if missing := -len(video) % together:
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
    frames, channels, height, width = video.shape
    t, h, w = frames // together, height // patch, width // patch
    rows = video.view(t, together, channels, h // merge, merge, patch, w // merge, merge, patch)
    rows = rows.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(t * h * w, channels * together * patch * patch), [t, h, w]


def video_settings(source: str, options: dict[str, Any], processor: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(what the checkpoint says of videos alone, or None; the settings to use), as transformers looks for them.

    A checkpoint without settings for videos uses those of its pictures (Qwen2-VL's first releases).
    """
    own = processor.get("video_processor") or _read(source, VIDEO_FILE, options)
    return own, own or _read(source, IMAGE_FILE, options) or {}


def _read(source: str, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    from transformers.utils.hub import cached_file

    found = cached_file(source, name, revision=options.get("revision"), _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else None
