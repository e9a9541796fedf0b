"""Videos in conversations: what each class is given of them, and that all of their frames matter."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers.video_utils import VideoMetadata

from keeplora.errors import KeepLoraError
from keeplora.models.generative import ANSWER, IMAGE, PAD, load_generative
from keeplora.models.vision_cache import VisionCache
from tests.models.test_generative import PICTURES, limited, reference, turns
from tests.models.tiny_generative import AVAILABLE, READS_VIDEOS, clip

AS_PICTURES = tuple(kind for kind in AVAILABLE if kind not in READS_VIDEOS)
# several videos of different length in one turn; a later turn; with a picture; without anything
CASES = {
    "video": (turns("<video>\nwhat moves", "a small cat"), [], [clip(4)]),
    "several": (turns("a dog <video> and <video>?", "two birds"), [], [clip(4), clip(2, seed=1)]),
    "turns": (turns("<video>\nwhat is it", "a dog", "and the colour", " red\n"), [], [clip(3, seed=2)]),
    "picture": (turns("<image>\nwhat is the animal", "a cat"), PICTURES[:1], []),
    "text": (turns("one plus one", "Zürich"), [], []),
}


@pytest.fixture(params=READS_VIDEOS)
def native(request):
    return request.param


def encoded(family, *names, answers=True):
    return [family.encode(*CASES[name], where=name, answers=answers) for name in names or CASES]


def losses(family, item):
    with torch.no_grad():
        return family.token_losses(item)


# -- what the class is given ---------------------------------------------------------------------------------------

_FAKE = "<fake_token_around_image>"
_SMOL = f"<global-img>{'<image>' * 4}{_FAKE}"


def _smol(count, seconds, length):
    frames = "".join(f"\nFrame from 00:0{s}:{_FAKE}{_SMOL}" for s in seconds)
    return (
        f"You are provided the following series of {count} frames from a 0:00:0{length} [H:MM:SS] video.\n{frames}\n\n"
    )


def _qwen3(times, tokens):
    groups = (f"<{t} seconds><|vision_start|>{'<|video_pad|>' * tokens}<|vision_end|>" for t in times)
    return f"<|vision_start|>{''.join(groups)}<|vision_end|>"


def _chatml(user, lead):
    return f"<|im_start|>user{lead}{user}<|im_end|>"


# Written by hand from each class's template and processor: 4 frames of 40 x 24 at 0, 0.3, 0.6 and 0.9 s.
REFERENCE = {
    "video-llava": f"<s>USER: {'<video>' * 68}\nwhat moves ASSISTANT:« a small cat</s>»",  # 16 places and the class token
    "llava-next-video": f"<s>USER: {'<video>' * 16}\nwhat moves ASSISTANT:« a small cat</s>»",  # pooled 2 x 2
    "llava-onevision": (  # pooled 2 x 2, and a newline
        f"<|im_start|>user {'<video>' * 17}\nwhat moves<|im_end|><|im_start|>assistant\n«a small cat<|im_end|>»"
    ),
    "qwen2-5-vl": (  # two and two frames of 24 x 8
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|video_pad|>' * 6}<|vision_end|>what moves<|im_end|>\n<|im_start|>assistant\n«a small cat<|im_end|>»"
    ),
    "qwen3-vl": (  # two and two frames of 24 x 16
        f"<|im_start|>user\n{_qwen3((0.1, 0.8), 6)}what moves<|im_end|>\n<|im_start|>assistant\n«a small cat<|im_end|>»"
    ),
    "smolvlm": (
        f"<|im_start|>User: {_smol('four', (0, 0, 0, 0), 1)}what moves<end_of_utterance>\n"
        "Assistant:« a small cat<end_of_utterance>»"
    ),
}
SHAPES = {
    "qwen2-5-vl": {"pixel_values_videos": (2 * 2 * 6, 96), "video_grid_thw": (1, 3)},
    "qwen3-vl": {"pixel_values_videos": (2 * 4 * 6, 96), "video_grid_thw": (1, 3)},
    "smolvlm": {"pixel_values": (1, 4, 3, 16, 16), "pixel_attention_mask": (1, 4, 16, 16)},
}


def test_a_videos_tokens_and_the_answers(native, generative):
    family = generative(native)
    assert family.reads_videos
    item = family.encode(*CASES["video"])
    ids, learned = reference(family, REFERENCE[native])
    assert item["input_ids"].tolist() == ids.tolist()
    assert item["labels"].tolist() == torch.where(learned, ids, -100).tolist()
    pad = {"qwen2-5-vl": "<|video_pad|>", "qwen3-vl": "<|video_pad|>", "smolvlm": "<image>"}.get(native, "<video>")
    shown = ids == family.tokenizer.convert_tokens_to_ids(pad)
    assert torch.equal(item["token_kinds"] == IMAGE, shown)
    assert torch.equal(item["token_kinds"] == ANSWER, learned)
    expected = SHAPES.get(native, {"pixel_values_videos": (1, 4, 3, 16, 16)})
    assert {key: tuple(item[key].shape) for key in expected} == expected
    prompt = family.encode(*CASES["video"], answers=False)
    assert prompt["input_ids"].tolist()[0] == ids[0, : prompt["input_ids"].shape[1]].tolist()


def test_masks_count_a_video_as_pictures(native, generative):
    family = generative(native)
    batch = family.join(encoded(family))
    (mask,) = family.masks(batch, {"text": 0.5, "image": 0.25}).values()
    assert set(mask[batch["token_kinds"] == IMAGE].tolist()) == {0.25}
    assert bool((mask[batch["token_kinds"] == PAD] == 0).all())


@pytest.mark.parametrize("kind", AS_PICTURES)
def test_classes_without_a_video_input_read_the_frames_as_pictures(kind, generative):
    family = generative(kind)
    assert not family.reads_videos
    asked, _, (four, two) = CASES["several"]
    item = family.encode(asked, (), [four, two])
    if kind in ("llava", "gemma3"):  # classes that never show a picture in pieces
        written = turns(f"a dog {'<image>' * 4} and {'<image>' * 2}?", "two birds")
        same = family.encode(written, [*four.frames, *two.frames])
        assert item.keys() == same.keys()
        assert all(torch.equal(item[key], same[key]) for key in same)
    if kind in ("idefics3", "internvl"):
        assert int((item["token_kinds"] == IMAGE).sum()) == 6 * 4
    mixed = family.encode(turns("<video> and <image> it", "a"), PICTURES[:1], [two])
    around = family.encode(turns("<image> and <video> it", "a"), PICTURES[:1], [two])
    assert mixed["pixel_values"].shape == around["pixel_values"].shape
    assert not torch.equal(mixed["pixel_values"], around["pixel_values"])
    long = limited(family, item["input_ids"].shape[1] - 30)
    with pytest.raises(KeepLoraError, match=r"would cut a picture|would leave nothing"):
        long.encode(asked, (), [four, two])


# -- frames and their times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AVAILABLE)
def test_every_frame_and_their_order_matter(kind, generative):
    family = generative(kind)
    asked, whole = CASES["video"][0], clip(4)
    before = losses(family, family.encode(asked, (), [whole]))
    other = clip(4, seed=9)
    for changed in range(4):
        frames = [other.frames[i] if i == changed else frame for i, frame in enumerate(whole.frames)]
        after = losses(family, family.encode(asked, (), [SimpleNamespace(**vars(whole) | {"frames": frames})]))
        assert (after - before).abs().max() > 1e-4, changed
    turned = SimpleNamespace(**vars(whole) | {"frames": whole.frames[::-1]})
    assert (losses(family, family.encode(asked, (), [turned])) - before).abs().max() > 1e-4


def test_videos_are_told_apart_by_their_order(native, generative):
    family = generative(native)
    asked, _, clips = CASES["several"]
    there, back = (losses(family, family.encode(asked, (), order)) for order in (clips, clips[::-1]))
    assert (there - back).abs().max() > 1e-4


def test_qwens_seconds_are_the_official_ones(generative):
    family = generative("qwen2-5-vl")
    asked = CASES["video"][0]
    whole = clip(4, fps=12.5, step=5)
    official = VideoMetadata(total_num_frames=20, fps=12.5, duration=1.6, frames_indices=list(whole.indices))
    item = family.encode(asked, (), [whole])
    seconds = item["second_per_grid_ts"]
    assert seconds.tolist() == [pytest.approx(2 / official.sampled_fps)] == [pytest.approx(0.8)]
    assert seconds.dtype == torch.float32
    slow = SimpleNamespace(**vars(whole) | {"fps": 1.25, "duration": 16.0, "times": [10 * t for t in whole.times]})
    later = family.encode(asked, (), [slow])
    assert later["second_per_grid_ts"].tolist() == [pytest.approx(8.0)]
    assert torch.equal(later["input_ids"], item["input_ids"])
    assert (losses(family, later) - losses(family, item)).abs().max() > 1e-4


def test_seconds_keep_their_precision_in_bfloat16(fresh):
    family = fresh("qwen2-5-vl", dtype="bf16")
    inputs = family._inputs(family.encode(*CASES["video"]))
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].dtype == torch.float32


def test_times_of_a_source_of_variable_rate(native, generative):
    if native not in ("qwen3-vl", "smolvlm"):
        pytest.skip("its text tells no times")
    family = generative(native)
    # 40 frames in 20 s, most of them in the first second: their numbers say nothing of when they were shown
    shown = clip(4)
    varying = SimpleNamespace(
        frames=shown.frames, times=(0.0, 1.0, 11.2, 19.8), duration=20.0, fps=2.0, indices=(0, 36, 37, 39)
    )
    text = family.tokenizer.decode(family.encode(CASES["video"][0], (), [varying])["input_ids"][0])
    if native == "qwen3-vl":
        assert "<0.5 seconds>" in text
        assert "<15.5 seconds>" in text
    else:
        assert "video.\n\nFrame from 00:00:" in text
        assert "Frame from 00:11:" in text
        assert "Frame from 00:19:" in text


@pytest.mark.parametrize("count", [1, 3])
def test_videos_of_few_or_odd_frames(native, generative, count):
    family = generative(native)
    item = family.encode(CASES["video"][0], (), [clip(count)])
    full = family.encode(CASES["video"][0], (), [clip(4)])
    assert item["input_ids"].shape[1] < full["input_ids"].shape[1] or (count == 3 and "qwen" in native)
    assert torch.isfinite(losses(family, item)).all()


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_samples(native, generative):
    family = generative(native)
    items = encoded(family)
    batch = family.join(items)
    alone = torch.cat([losses(family, item) for item in items])
    assert torch.allclose(losses(family, batch), alone, atol=1e-5)
    assert torch.allclose(losses(family, family.join(items, side="left")), alone, atol=1e-4)
    with torch.no_grad():
        own = family.model(**{k: v for k, v in items[0].items() if k not in _OURS}, labels=items[0]["labels"]).loss
    assert torch.allclose(losses(family, items[0]).mean(), own, atol=1e-5)
    with torch.no_grad():
        family.forward(batch)


_OURS = ("labels", "token_kinds", "video_frames")


@pytest.mark.parametrize("kind", AVAILABLE)
def test_answers_of_a_batch_are_those_one_by_one(kind, generative):
    family = generative(kind)
    prompts = encoded(family, answers=False)
    alone = [family.generate(prompt, max_new_tokens=5)[0] for prompt in prompts]
    assert family.generate(family.join(prompts, side="left"), max_new_tokens=5) == alone
    assert len(set(alone)) > 1 or kind == "gemma3"


def test_the_model_is_left_as_it_was(generative):
    family = generative("llava-onevision")
    batch = family.join(encoded(family))
    assert batch["video_frames"].tolist() == [4, 4, 2, 3]
    losses(family, batch)
    family.generate(family.join(encoded(family, answers=False), side="left"), max_new_tokens=2)
    assert not [m for m in family.model.modules() if "get_video_features" in vars(m)]
    with pytest.raises(ValueError, match="do not match"):  # what it was done for
        family.model(**{k: v for k, v in batch.items() if k not in _OURS})


def test_losses_reach_the_tower(native, fresh):
    family = fresh(native)
    family.gradient_checkpointing(True)
    batch = family.join(encoded(family))
    family.token_losses(batch).mean().backward()
    for part in ("vision-2" if native == "video-llava" else "vision", "language"):
        prefix = family.towers[part]
        weights = [n for n in family.target_modules((part.split("-")[0],)) if n.startswith(prefix)]
        assert all(bool(family.model.get_submodule(n).weight.grad.any()) for n in weights)


def test_a_video_and_a_picture_in_one_turn(native, generative):
    family = generative(native)
    asked = turns("<image> then <video>\nwhat is it", "a bird")
    if native == "smolvlm":
        with pytest.raises(KeepLoraError, match=r"^row 7: .* reads pictures or videos, not both in one conversation"):
            family.encode(asked, PICTURES[:1], [clip(2)], where="row 7")
        return
    item = family.encode(asked, PICTURES[:1], [clip(2)])
    assert {"pixel_values", "pixel_values_videos"} <= set(item)
    before = losses(family, item)
    for pictures, clips in ((PICTURES[1:2], [clip(2)]), (PICTURES[:1], [clip(2, seed=3)])):
        other = family.encode(asked, pictures, clips)
        if other["labels"].shape == item["labels"].shape:
            assert (losses(family, other) - before).abs().max() > 1e-4
    both = family.join([item, *encoded(family, "several", "picture")])
    assert torch.isfinite(losses(family, both)).all()


@pytest.mark.parametrize("kind", [kind for kind in AVAILABLE if not kind.startswith("qwen")])
def test_the_vision_cache_serves_frames(kind, generative):
    family = generative(kind)
    items = encoded(family)
    towers = [family.model.get_submodule(p) for part, p in family.towers.items() if part.startswith("vision")]
    before = [losses(family, item) for item in items]
    cache = VisionCache(*towers)
    with cache.active():
        first = [losses(family, item) for item in items]
        computed = cache.misses
        again = [losses(family, item) for item in items]
        together = losses(family, family.join(items))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.allclose(together, torch.cat(before), atol=1e-5)
    assert cache.misses == computed >= 4 + 2 + 3 + 1  # each frame once, whatever it came with
    assert not any("forward" in vars(tower) for tower in towers)


@pytest.mark.parametrize("kind", ["qwen2-5-vl", "qwen3-vl"])
def test_the_vision_cache_serves_videos_of_patches(kind, generative):
    family = generative(kind)
    items = encoded(family)
    before = torch.cat([losses(family, item) for item in items])
    cache = VisionCache(family.model.get_submodule(family.towers["vision"]))
    with cache.active():
        both = [losses(family, family.join(items)) for _ in range(2)]
    assert torch.allclose(both[0], before, atol=1e-5)
    assert torch.equal(*both)
    assert (cache.hits, cache.misses) == (6, 4)  # three videos, of which one comes twice, and a picture


# -- too long, and refused -------------------------------------------------------------------------------------------


def test_a_video_is_never_cut(native, generative):
    family = generative(native)
    whole = family.encode(*CASES["turns"])
    answer = (whole["labels"][0] != -100).nonzero()
    most = int(answer[1]) + 1
    cut = limited(family, most).encode(*CASES["turns"])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :most])
    beside = [key for key in whole if whole[key].shape[:2] != whole["input_ids"].shape]
    assert all(torch.equal(cut[key], whole[key]) for key in beside)
    assert len(losses(family, cut)) == 2
    last = int((whole["token_kinds"][0] == IMAGE).nonzero()[-1])
    with pytest.raises(KeepLoraError, match=r"^here 3: .* would cut a picture or video"):
        limited(family, last).encode(*CASES["turns"], where="here 3")


def test_marks_and_clips_must_agree(native, generative):
    family = generative(native)
    for text, given, told in (
        ("<video>a <video>", 1, "2 <video> in the text but 1 video;"),
        ("a", 2, "0 <video> in the text but 2 videos;"),
    ):
        with pytest.raises(KeepLoraError, match=f"^row 7: {told} there must be one <video> per video"):
            family.encode(turns(text, "b"), (), [clip(2)] * given, where="row 7")
    with pytest.raises(KeepLoraError, match=r"^row 7: a video has no frames"):
        family.encode(turns("<video>a", "b"), (), [SimpleNamespace(**vars(clip(2)) | {"frames": ()})], where="row 7")
    if "qwen" in native:
        with pytest.raises(KeepLoraError, match=r"^row 7: .* refuses it: .*aspect ratio"):
            family.encode(turns("<video>a", "b"), (), [clip(2, (4000, 4))], where="row 7")


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_a_saved_model_reads_videos_alike(native, fresh, tmp_path):
    family = fresh(native)
    again = load_generative(family.save_pretrained(tmp_path / "out"))
    twice = load_generative(again.save_pretrained(tmp_path / "twice"))
    for name in ("video", "several"):
        item = family.encode(*CASES[name])
        for other in (again, twice):
            same = other.encode(*CASES[name])
            assert item.keys() == same.keys()
            assert all(torch.equal(item[key], same[key]) for key in item)
            assert torch.equal(losses(family, item), losses(other, same))


def test_a_template_that_writes_no_videos(generative_folder, tmp_path):
    folder = shutil.copytree(generative_folder("qwen2-5-vl"), tmp_path / "still")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("content['type'] == 'video'", "false"))
    family = load_generative(folder)
    assert not family.reads_videos
    item = family.encode(*CASES["several"])
    assert len(item["image_grid_thw"]) == 6
    assert "pixel_values_videos" not in item


def test_frames_of_another_size(fresh):
    item = {side: fresh("qwen2-5-vl", video_size=side).encode(*CASES["video"]) for side in (8, 16, 64)}
    assert [len(item[side]["pixel_values_videos"]) for side in item] == [8, 16, 24]
    small, large = (fresh("qwen3-vl", video_size=side).encode(*CASES["video"]) for side in (8, 64))
    assert len(small["pixel_values_videos"]) < len(large["pixel_values_videos"])
    assert fresh("llava-onevision", video_size=16).reads_videos
    for kind in ("llava-onevision", "video-llava", "llava"):
        with pytest.raises(KeepLoraError, match="reads frames at its own size"):
            fresh(kind, video_size=32)
    with pytest.raises(KeepLoraError, match="too small"):
        fresh("qwen2-5-vl", video_size=4)
