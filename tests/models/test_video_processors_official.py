"""Our frame processor against transformers' own video processors, which need torchvision: the same tensors, bit for bit.

`make test-torchvision` runs this in an environment of its own.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keeplora.models import video_processors
from keeplora.models.generative import load_generative
from keeplora.models.video_processors import DEFAULTS, QWEN2, QWEN3, SMOL, FrameProcessor
from keeplora.models.video_sizes import LLAVA, fit, kind_of, plain
from tests.models.test_generative import PICTURES, turns
from tests.models.tiny_generative import READS_VIDEOS, clip

# Where torchvision must be there (`make test-torchvision`) its absence is a failure.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None and not os.environ.get("KEEPLORA_NEED_TORCHVISION"),
    reason="torchvision is not installed: no official video processor",
)

SIZES = [(64, 48), (48, 64), (101, 37), (33, 33), (320, 180)]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    (LLAVA[0], {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    (LLAVA[1], {"size": {"shortest_edge": 32}, "crop_size": {"height": 40, "width": 30}}),
    (LLAVA[1], {"size": 28, "crop_size": 28}),
    (LLAVA[2], {"size": {"height": 28, "width": 28}}),
    (LLAVA[2], {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
    (LLAVA[2], {"size": {"height": 28, "width": 28}, "do_normalize": False}),
    (LLAVA[2], {"size": {"height": 28, "width": 28}, "do_rescale": False}),
    (QWEN2, {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 6}}),
    (QWEN2, {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16}),
    (QWEN2, {"size": {"shortest_edge": 784, "longest_edge": 28 * 28 * 6}, "cap_pixels_per_frame": True,
             "max_video_tokens": 10}),
    (QWEN3, {"size": {"shortest_edge": 4 * 1024, "longest_edge": 32 * 1024}}),
    (QWEN3, {"size": {"shortest_edge": 64 * 1024, "longest_edge": 128 * 1024}}),
    (QWEN3, {"size": {"shortest_edge": 1024, "longest_edge": 32 * 1024}, "cap_pixels_per_frame": True}),
    (SMOL, {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 28}}),
    (SMOL, {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 28},
            "video_sampling": {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 60}}}),
]  # fmt: skip


def official(kind: str, settings: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, kind)(**settings)


def frames(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Waves, which any good resampling turns into much the same picture."""
    x, y = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 2, size[1]))
    waves = [np.stack([np.sin(x + i), np.cos(y * 2 + i), np.sin(x * y)], axis=-1) for i in range(count)]
    return [Image.fromarray(((wave + 1) * 127.5).astype(np.uint8)) for wave in waves]


def ready(processor: Any) -> dict[str, Any]:
    options = {
        "do_resize": False, "do_center_crop": False, "do_sample_frames": False, "do_convert_rgb": False,
        "input_data_format": "channels_last", "return_tensors": "pt",
    }  # fmt: skip
    return options | ({"cap_pixels_per_frame": False} if kind_of(processor) in (QWEN2, QWEN3) else {})


@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_defaults_are_the_classes(kind):
    theirs = official(kind, {})
    for key, value in DEFAULTS[kind].items():
        own = getattr(theirs, key, None)
        if key in ("size", "crop_size", "max_image_size"):
            assert plain(own) == plain(value), key
        else:
            assert (list(own) if isinstance(own, list | tuple) else own) == value, key
    assert kind_of(theirs) == kind_of(FrameProcessor(kind, {})) == kind


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_the_tensors_are_the_classes(kind, settings, size):
    theirs, ours = official(kind, settings), FrameProcessor(kind, settings)
    for counts in ((4,), (4, 4), (3,), (2, 5)):
        fitted = [[np.stack([np.asarray(f) for f in fit(frames(n, size), p)]) for n in counts] for p in (theirs, ours)]
        assert all(np.array_equal(a, b) for a, b in zip(*fitted, strict=True))
        if len(set(counts)) > 1 and kind in LLAVA:
            continue  # transformers cannot make one tensor of them
        expected, found = (p(videos, **ready(p)) for p, videos in zip((theirs, ours), fitted, strict=True))
        assert set(expected) == set(found)
        for key, value in expected.items():
            got = found[key] if isinstance(found[key], torch.Tensor) else torch.stack(found[key])
            assert got.dtype == value.dtype
            assert torch.equal(got, value), key


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_frames_are_brought_to_the_size_that_the_class_brings_them_to(kind, settings, size):
    theirs = official(kind, settings)
    for count in (2, 3, 6):
        shown = frames(count, size)
        arrays = [np.stack([np.asarray(frame) for frame in shown])]
        whole = theirs(arrays, do_sample_frames=False, input_data_format="channels_last", return_tensors="pt")
        fitted = [np.stack([np.asarray(frame) for frame in fit(shown, theirs)])]
        ours = theirs(fitted, **ready(theirs))
        for key, value in whole.items():
            assert value.shape == ours[key].shape, key
            if value.is_floating_point():  # PIL and torchvision resample a little differently
                span = value.max() - value.min()
                assert (value - ours[key]).abs().mean() < 0.01 * span, key


@pytest.mark.parametrize("kind", READS_VIDEOS)
def test_a_model_reads_alike_with_and_without_torchvision(kind, generative_folder, monkeypatch):
    folder = generative_folder(kind)
    theirs = load_generative(folder)
    assert not isinstance(theirs.processor.video_processor, FrameProcessor)

    def refused(*_: Any, **__: Any) -> Any:
        raise ImportError("no torchvision")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refused)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    ours = load_generative(folder)
    assert isinstance(ours.processor.video_processor, video_processors.FrameProcessor)
    assert theirs.reads_videos
    assert ours.reads_videos
    shown = clip(4, (64, 40)), clip(3, (64, 40), seed=1), clip(4, (30, 50), seed=2)
    cases = [
        (turns("<video>\nwhat moves", "a cat"), [], shown[:1]),
        (turns("<video> and <video> and <video>", "a dog"), [], shown),
        (turns("one plus one", "two"), [], []),
    ]
    if kind != "smolvlm":
        cases.append((turns("<image> <video>\nwhat", "a bird"), PICTURES[:1], shown[1:2]))
    for case in cases:
        expected, found = theirs.encode(*case), ours.encode(*case)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("kind", READS_VIDEOS)
def test_saved_settings_are_read_back_by_transformers(kind, generative_folder, tmp_path, monkeypatch):
    """What is saved without torchvision is a folder that transformers reads with it."""
    from transformers import AutoProcessor

    folder = generative_folder(kind)
    original = AutoProcessor.from_pretrained(folder).video_processor.to_dict()
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoProcessor.from_pretrained", _refuse)
        patch.setattr("transformers.utils.is_torchvision_available", lambda: False)
        load_generative(folder).save_pretrained(tmp_path / "out")
    assert AutoProcessor.from_pretrained(tmp_path / "out").video_processor.to_dict() == original
    again = load_generative(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert AutoProcessor.from_pretrained(again).video_processor.to_dict() == original


def _refuse(*_: Any, **__: Any) -> Any:
    raise ImportError("no torchvision")
