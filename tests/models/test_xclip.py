"""X-CLIP against its own stock model, on a tiny random one: logits per video, conditioned texts, fixed number of frames."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor

from keeplora.errors import KeepLoraError
from keeplora.models import load_model
from tests.models import tiny

TEXTS = ["a cat", "a photo of the large red car.", "art of the bird"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny("xclip", tmp_path_factory.mktemp("xclip") / "model")


@pytest.fixture
def xclip(folder):
    return load_model(folder)


def frames(count=tiny.CLIP_FRAMES, seeds=(0, 1, 2)):
    return [tiny.pictures(count, seed=seed) for seed in seeds]


@pytest.fixture
def clips(xclip):
    return torch.stack([xclip.preprocess_clip(f) for f in frames()])


def logits_of(encoder, clips):
    with torch.no_grad():
        return encoder.compare(clips, encoder.text_features(encoder.tokenize(TEXTS)))[0]


@pytest.mark.parametrize("processor", ["VideoMAE", "CLIP"])
def test_logits_equal_the_stock_model_s(processor, folder, tmp_path):
    if processor == "CLIP":  # what transformers takes where the checkpoint names none
        folder = shutil.copytree(folder, tmp_path / "clip")
        (folder / "processor_config.json").unlink()
        settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    xclip = load_model(folder)
    assert type(xclip.images).__name__ == f"{processor}ImageProcessorPil"
    assert (xclip.family, xclip.clip_frames, xclip.image_size) == ("xclip", tiny.CLIP_FRAMES, 32)
    clips = torch.stack([xclip.preprocess_clip(f) for f in frames()])
    stock = AutoModel.from_pretrained(folder).eval()
    if processor == "VideoMAE":
        inputs = AutoProcessor.from_pretrained(folder, backend="pil")(
            text=TEXTS, videos=frames(), padding="max_length", max_length=77, return_tensors="pt"
        )
        assert torch.equal(inputs["pixel_values"], clips)
    else:
        inputs = {**xclip.tokenize(TEXTS), "pixel_values": clips}
    with torch.no_grad():
        want = stock(**inputs)
        logits, videos = xclip.compare(clips, xclip.text_features(xclip.tokenize(TEXTS)))
        assert torch.equal(videos, xclip.image_features(clips))
    assert (logits - want.logits_per_video).abs().max() <= 1e-5
    assert (videos - want.video_embeds).abs().max() <= 1e-5
    # It means something only if videos and texts are told apart, and if the texts do depend on the videos.
    assert torch.pdist(videos).min() > 0.05
    assert torch.pdist(logits.T).min() > 0.05
    assert (want.text_embeds[0] - want.text_embeds[1]).abs().max() > 0.05


def test_features_have_gradients_to_every_target(xclip, clips):
    names = [name for name, _ in xclip.model.named_modules() if name.endswith(tuple(xclip.default_target_modules))]
    assert sum(".message_attn." in name for name in names) == 4 * (tiny.VISION_BLOCKS - 1)
    assert sum(name.startswith("mit.") for name in names) == 4
    assert sum(name.startswith("text_model.") for name in names) == 4 * tiny.TEXT_BLOCKS
    assert len(names) == 4 * (2 * tiny.VISION_BLOCKS - 1 + 1 + tiny.TEXT_BLOCKS)
    assert not [name for name in names if "prompts_generator" in name]
    logits, _ = xclip.compare(clips, xclip.text_features(xclip.tokenize(TEXTS)))
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    weights = {name: xclip.model.get_submodule(name).weight.grad for name in names}
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in weights.values())
    first = xclip.model.vision_model.encoder.layers[0].message_attn  # left out, for good reason
    assert float(first.q_proj.weight.grad.abs().max()) < 1e-6


def test_an_adapter_on_the_default_targets_acts(xclip, clips):
    before = logits_of(xclip, clips)
    get_peft_model(xclip.model, LoraConfig(r=2, target_modules=xclip.default_target_modules, init_lora_weights=False))
    assert (logits_of(xclip, clips) - before).abs().max() > 1e-3


def test_the_order_of_frames_matters(xclip, clips):
    assert (logits_of(xclip, clips.flip(1)) - logits_of(xclip, clips)).abs().max() > 0.05


def test_texts_in_parts_give_the_same_logits(xclip, clips, monkeypatch):
    whole = logits_of(xclip, clips)
    monkeypatch.setattr("keeplora.models.xclip.TEXTS", 2)
    assert torch.allclose(logits_of(xclip, clips), whole, atol=1e-5)


def test_class_features_of_one_template_give_the_training_s_logits(xclip, clips):
    one = xclip.class_features(["cat", "bird"], ["a photo of a {}."])
    with torch.no_grad():
        texts = xclip.text_features(xclip.tokenize(["a photo of a cat.", "a photo of a bird."]))
        assert torch.allclose(one, texts, atol=1e-5)
        both = xclip.class_features(["cat", "bird"], ["a photo of a {}.", "art of the {}."])
        other = xclip.class_features(["cat", "bird"], ["art of the {}."])
        assert torch.allclose(both, (one + other) / 2, atol=1e-5)
        assert float((both.norm(dim=1) - 1).abs().min()) > 1e-2  # lengths are kept: the prompt generator adds to them


def test_a_copy_compares_with_its_own_weights(xclip, clips):
    teacher = copy.deepcopy(xclip.model)
    with torch.no_grad():
        for parameter in teacher.prompts_generator.parameters():
            parameter.mul_(0.5)
    assert (logits_of(xclip.around(teacher), clips) - logits_of(xclip, clips)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 32, 32), "reads videos of 4 frames, and was given pictures; take CLIP"),
        (
            (2, 3, 3, 32, 32),
            r"reads videos of 4 frames \(num_frames of its config.json\), and was given 3; sample 4 of",
        ),
        ((2, 8, 3, 32, 32), "was given 8"),
    ],
)
def test_other_inputs_are_refused(xclip, shape, message):
    with pytest.raises(KeepLoraError, match=message):
        xclip.image_features(torch.zeros(shape))


def test_absent_frames_are_refused(xclip):
    short = torch.stack([xclip.preprocess_clip(f, 4) for f in frames(3)])
    with pytest.raises(KeepLoraError, match="was given 3; sample 4"):
        xclip.image_features(short)


def test_features_alone_give_no_logits(xclip, clips):
    texts = xclip.text_features(xclip.tokenize(TEXTS))
    with pytest.raises(KeepLoraError, match=r"depend on the video.*take compare\(\)"):
        xclip.logits(xclip.image_features(clips), texts)


def test_a_tokenizer_that_the_text_tower_cannot_pool_is_refused(folder, tmp_path):
    from transformers import CLIPTokenizer

    broken = shutil.copytree(folder, tmp_path / "broken")
    tokenizer = tiny.clip_tokenizer()
    vocab = tokenizer.get_vocab()
    last = max(vocab, key=vocab.__getitem__)
    vocab[last], vocab["cat</w>"] = vocab["cat</w>"], vocab[last]  # the end token is no longer the highest id
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(broken)
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["eos_token_id"] = vocab[last]  # which transformers does not look at
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeepLoraError, match="pools texts at the highest token id"):
        load_model(broken)


def test_saved_folder_opens_in_stock_transformers(xclip, clips, tmp_path):
    folder = xclip.save_pretrained(tmp_path / "saved")
    stock = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        want = stock(**xclip.tokenize(TEXTS), pixel_values=clips).logits_per_video
    assert (logits_of(load_model(folder), clips) - want).abs().max() <= 1e-5
