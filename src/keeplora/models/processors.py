"""A generative model's processor, the same with and without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError

_VIDEO_FILE = "video_preprocessor_config.json"


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
            # Qwen-VL, LLaVA-OneVision, InternVL and SmolVLM own a video processor, which transformers builds with
            # torchvision or not at all. Pictures need none of it.
            if is_torchvision_available():
                raise
            return _without_videos(source, config, options)
        if getattr(processor, "image_processor", None) is None:
            raise KeepLoraError(f"{name}: its {type(processor).__name__} reads no pictures")
        if is_torchvision_available():
            processor.image_processor = AutoImageProcessor.from_pretrained(source, **options | {"backend": "pil"})
        return processor
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise KeepLoraError(f"{name}: its processor could not be loaded: {reason}") from error


def _without_videos(source: str, config: Any, options: dict[str, Any]) -> Any:
    """The class's processor around no video processor, whose settings are kept for `save_processor`."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    settings, _ = ProcessorMixin.get_processor_dict(source, revision=options.get("revision"))
    named = settings.get("processor_class")
    family: Any = getattr(transformers, named) if named else PROCESSOR_MAPPING[type(config)]

    def check(self: Any, part: str, value: Any) -> Any:
        if part == "video_processor" and value is None:
            return None
        return super(still, self).check_argument_for_proper_class(part, value)  # type: ignore[misc]

    # The same class, but for the check that every part is there; it keeps its name, which is what is saved.
    still = type(family.__name__, (family,), {"check_argument_for_proper_class": check})
    parts = {
        "tokenizer": lambda: AutoTokenizer.from_pretrained(source, **options),
        "image_processor": lambda: AutoImageProcessor.from_pretrained(source, **options | {"backend": "pil"}),
        "video_processor": lambda: None,
    }
    processor = still.from_args_and_dict([parts[part]() for part in family.get_attributes()], settings)
    processor.omitted_video = settings.get("video_processor") or _video_settings(source, options)
    return processor


def _video_settings(source: str, options: dict[str, Any]) -> dict[str, Any] | None:
    from transformers.utils.hub import cached_file

    found = cached_file(
        source, _VIDEO_FILE, revision=options.get("revision"), _raise_exceptions_for_missing_entries=False
    )
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else None


def save_processor(processor: Any, folder: Path) -> None:
    """Write the processor to an existing folder, as its own `save_pretrained` does; the video settings stay as they were."""
    if getattr(processor, "video_processor", 0) is not None:
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    if isinstance(processor.chat_template, str):
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    settings = {key: value for key, value in processor.to_dict().items() if key != "video_processor"}
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
