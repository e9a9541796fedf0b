"""A generative model's processor, the same with and without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.models.video_processors import VIDEO_PROCESSORS, FrameProcessor, video_settings


def load_processor(name: str, source: str, config: Any, options: dict[str, Any]) -> Any:
    """The class's processor, with its image processor on the PIL back end.

    PIL whether torchvision is there or not: the two resize differently, and results must not depend on that.
    """
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        try:
            processor = AutoProcessor.from_pretrained(source, **options)
        except ImportError:
            # Video-LLaVA, Qwen-VL, InternVL and others own a video processor, which transformers builds with torchvision
            # or not at all.
            if is_torchvision_available():
                raise
            return _without_torchvision(source, config, options)
        if getattr(processor, "image_processor", None) is None:
            raise KeepLoraError(f"{name}: its {type(processor).__name__} reads no pictures")
        if is_torchvision_available():
            processor.image_processor = AutoImageProcessor.from_pretrained(source, **options | {"backend": "pil"})
        return processor
    except KeepLoraError:
        raise
    except Exception as error:  # transformers and what lies below it raise nearly anything on a damaged file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise KeepLoraError(f"{name}: its processor could not be loaded: {reason}") from error


def _without_torchvision(source: str, config: Any, options: dict[str, Any]) -> Any:
    """The class's processor around our own video processor, or around none where the class's is not known.

    The checkpoint's settings for videos are kept for `save_processor`.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    settings, _ = ProcessorMixin.get_processor_dict(source, revision=options.get("revision"))
    named = settings.get("processor_class")
    family: Any = getattr(transformers, named) if named else PROCESSOR_MAPPING[type(config)]

    own, settings_used = video_settings(source, options, settings)
    kind = VIDEO_PROCESSORS.get(config.model_type)
    frames = None if kind is None else FrameProcessor(kind, settings_used)

    def check(self: Any, part: str, value: Any) -> Any:
        if part == "video_processor" and value is frames:
            return None
        return super(still, self).check_argument_for_proper_class(part, value)  # type: ignore[misc]

    def to_dict(self: Any) -> dict[str, Any]:
        return {key: value for key, value in super(still, self).to_dict().items() if key != "video_processor"}  # type: ignore[misc]

    # The same class, but for the check that every part is its own; it keeps its name, which is what is saved.
    still = type(family.__name__, (family,), {"check_argument_for_proper_class": check, "to_dict": to_dict})
    parts = {
        "tokenizer": lambda: AutoTokenizer.from_pretrained(source, **options),
        "image_processor": lambda: AutoImageProcessor.from_pretrained(source, **options | {"backend": "pil"}),
        "video_processor": lambda: frames,
    }
    processor = still.from_args_and_dict([parts[part]() for part in family.get_attributes()], settings)
    # Where a checkpoint has settings for pictures alone, ours are kept as transformers would write them.
    processor.omitted_video = own or (frames.to_dict() if frames is not None else None)
    return processor


def save_processor(processor: Any, folder: Path) -> None:
    """Write the processor to an existing folder, as its own `save_pretrained` does; the video settings stay as they were."""
    if not hasattr(processor, "omitted_video"):
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    if isinstance(processor.chat_template, str):
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    settings = processor.to_dict()
    if processor.omitted_video is not None:
        settings["video_processor"] = processor.omitted_video
    else:  # an older checkpoint keeps one file for pictures and videos
        processor.image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def set_image_size(processor: Any, side: int, name: str) -> None:
    """Let pictures fill a square of `side` pixels at most, for classes that read pictures of any size.

    Raises `KeepLoraError` for a class whose vision tower takes one size only, unless that is `side`.
    """
    images = processor.image_processor
    size = {key: value for key, value in dict(images.size or {}).items() if value}
    if hasattr(images, "merge_size") and "longest_edge" in size:  # Qwen-VL: areas, in pixels
        least = (images.patch_size * images.merge_size) ** 2
        if side * side < least:
            raise KeepLoraError(f"image_size {side} is too small for {name}; take at least {round(least**0.5)}")
        images.size = {"shortest_edge": min(size["shortest_edge"], side * side), "longest_edge": side * side}
    elif set(size) == {"longest_edge"}:  # Idefics3, SmolVLM: the longer side, cut into tiles
        images.size = {"longest_edge": side}
    elif side not in set(size.values()) | set(dict(getattr(images, "crop_size", None) or {}).values()):
        fixed = " x ".join(str(value) for value in size.values())
        raise KeepLoraError(f"{name} reads pictures at its own size ({fixed}) only; leave image_size out")
