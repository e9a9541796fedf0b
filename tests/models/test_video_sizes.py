"""Frames brought to each class's size, and our frame processor, where torchvision is not there to compare with.

The expected sizes are what transformers' own video processors gave (`test_video_processors_official.py` compares anew).
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keeplora.models.generative import load_generative
from keeplora.models.video_clips import metadata
from keeplora.models.video_processors import QWEN2, QWEN3, SMOL, FrameProcessor
from keeplora.models.video_sizes import LLAVA, fit
from tests.models.test_generative import turns
from tests.models.tiny_generative import clip

AREA = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 6}


@pytest.mark.parametrize(
    ("kind", "settings", "size", "count", "expected"),
    [
        (LLAVA[0], {}, (320, 180), 2, (224, 224)),
        (LLAVA[1], {"do_center_crop": False}, (101, 37), 2, (611, 224)),
        (LLAVA[2], {}, (101, 37), 2, (384, 384)),
        (QWEN2, {"size": AREA}, (320, 180), 2, (84, 28)),
        (QWEN2, {"size": AREA}, (20, 20), 2, (28, 28)),
        (QWEN2, {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16}, (48, 64), 2, (56, 56)),
        (QWEN3, {"size": {"shortest_edge": 4096, "longest_edge": 32 * 1024}}, (320, 180), 2, (160, 96)),
        (QWEN3, {"size": {"shortest_edge": 4096, "longest_edge": 32 * 1024}}, (320, 180), 8, (64, 32)),
        (QWEN3, {"size": {"shortest_edge": 4096, "longest_edge": 32 * 1024}}, (64, 64), 16, (32, 32)),
        (QWEN3, {"size": {"shortest_edge": 64 * 1024, "longest_edge": 128 * 1024}}, (64, 48), 2, (224, 160)),
        (SMOL, {}, (320, 180), 2, (364, 364)),
    ],
)
def test_the_size_of_frames(kind, settings, size, count, expected):
    frames = [Image.new("RGB", size)] * count
    assert {frame.size for frame in fit(frames, FrameProcessor(kind, settings))} == {expected}


def test_the_middle_is_cut_out():
    pixels = np.zeros((10, 31, 3), np.uint8)
    pixels[:, 10:20] = 200
    crop = FrameProcessor(LLAVA[0], {"size": 10, "crop_size": 10})
    (frame,) = fit([Image.fromarray(pixels)], crop)
    assert frame.size == (10, 10)
    assert np.asarray(frame).min() == 200
    wider = FrameProcessor(LLAVA[0], {"size": 10, "crop_size": {"height": 12, "width": 41}})
    (frame,) = fit([Image.new("RGB", (31, 10), "white")], wider)
    assert frame.getbbox() == (5, 1, 36, 11)


def test_a_side_bounds_the_area():
    video = FrameProcessor(QWEN2, {})
    frames = [Image.new("RGB", (640, 360))] * 8
    ((wide, high),) = {frame.size for frame in fit(frames, video, 112)}
    assert wide * high <= 112 * 112 < 4 * wide * high
    ((wide, high),) = {frame.size for frame in fit(frames, FrameProcessor(QWEN3, {}), 128)}
    assert wide * high <= 128 * 128 < 4 * wide * high
    assert {frame.size for frame in fit(frames, FrameProcessor(LLAVA[2], {}))} == {(384, 384)}


def test_pixels_are_rescaled_and_normalised():
    video = FrameProcessor(LLAVA[2], {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.25, 1.0]})
    pixels = np.full((2, 4, 4, 3), (255, 0, 51), np.uint8)
    (found,) = video([pixels])["pixel_values_videos"]
    assert found.shape == (2, 3, 4, 4)
    assert found[:, :, 0, 0].tolist() == [pytest.approx([1.0, -1.0, 0.2])] * 2


def test_patches_hold_neighbours_side_by_side():
    video = FrameProcessor(QWEN2, {"patch_size": 2, "do_normalize": False, "do_rescale": False})
    pixels = np.arange(3 * 4 * 8).reshape(3, 4, 8, 1).repeat(3, -1).astype(np.uint8)
    out = video([pixels])
    assert out["video_grid_thw"].tolist() == [[2, 2, 4]]  # the third frame is shown twice
    assert out["pixel_values_videos"].shape == (16, 24)
    first = out["pixel_values_videos"][0].reshape(3, 2, 2, 2)  # colour, time, row, column
    assert first[0].tolist() == pixels[:2, :2, :2, 0].tolist()
    assert out["pixel_values_videos"][2].reshape(3, 2, 2, 2)[1, 1].tolist() == pixels[1, 2:4, :2, 0].tolist()
    assert out["pixel_values_videos"][8].reshape(3, 2, 2, 2)[0, 1].tolist() == pixels[2, :2, :2, 0].tolist()


def test_what_a_processor_is_told_of_a_clip():
    told = metadata(clip(4, fps=12.5, step=5))
    assert told == {"total_num_frames": 20, "fps": 12.5, "duration": 1.6, "frames_indices": [0, 5, 10, 15]}
    assert all(type(index) is int for index in told["frames_indices"])


@pytest.mark.parametrize("kind", ["qwen2-5-vl", "llava-onevision"])
def test_a_checkpoint_with_settings_for_pictures_alone(kind, generative_folder, tmp_path):
    """Qwen2-VL's first releases have one file, which holds for videos too; it is read and saved as that."""
    folder = shutil.copytree(generative_folder(kind), tmp_path / "old")
    parts = json.loads((folder / "processor_config.json").read_text())
    images = parts.pop("image_processor")
    parts.pop("video_processor")
    if kind == "qwen2-5-vl":
        images.pop("size")
        images |= {"min_pixels": 64, "max_pixels": 192}
    (folder / "processor_config.json").write_text(json.dumps(parts))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    family = load_generative(folder)
    asked: Any = turns("<video>what", "a cat")
    shown = [clip(4)]
    item = family.encode(asked, (), shown)
    if kind == "qwen2-5-vl":
        assert item["video_grid_thw"].tolist() == [[2, 2, 4]]  # 16 x 8 pixels, at most 192
    again = load_generative(family.save_pretrained(tmp_path / "new")).encode(asked, (), shown)
    assert all(torch.equal(item[key], again[key]) for key in item)
