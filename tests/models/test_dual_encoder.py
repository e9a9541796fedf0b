"""Every family against its own stock transformers path, on tiny random models."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

from keeplora.errors import KeepLoraError
from keeplora.models import load_model
from keeplora.models.templates import fill
from tests.models import tiny

TEXTS = ["a cat", "a photo of the large red car.", "Zürich's 17 dogs", "art of the bird"]
EXPECTED = {
    "clip": "clip", "siglip": "siglip", "siglip2-fixed": "siglip", "siglip2": "siglip2",
    "vision-text": "vision-text", "embedded": "embedded",
}  # fmt: skip
NAFLEX = {"images_kwargs": {"patch_size": 8, "max_num_patches": 16}}


def batch(encoder, pictures):
    return torch.stack([encoder.preprocess(p) for p in pictures])


def official(family, folder, texts, pictures):
    """Features and logits as the checkpoint's own processor, at full text length, and model give them."""
    if family == "embedded":  # an ordinary folder without a processor class
        words = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=64, return_tensors="pt")
        inputs = words | AutoImageProcessor.from_pretrained(folder, backend="pil")(pictures, return_tensors="pt")
    else:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        length = min(processor.tokenizer.model_max_length, 77 if family == "clip" else 64)
        options = NAFLEX if family == "siglip2" else {}
        inputs = processor(
            text=texts, images=pictures, padding="max_length", max_length=length, return_tensors="pt", **options
        )
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**inputs)


def test_the_registry_names_the_family(encoder, family):
    assert encoder.family == EXPECTED[family]
    assert encoder.image_size == tiny.image_size(family)
    assert not encoder.model.training
    assert next(encoder.model.parameters()).dtype == torch.float32


def test_features_and_logits_equal_the_official_path(encoder, family, folders):
    pictures = tiny.pictures()
    want = official(family, folders[family], TEXTS, pictures)
    with torch.no_grad():
        image, text = encoder.image_features(batch(encoder, pictures)), encoder.text_features(encoder.tokenize(TEXTS))
    unit = torch.nn.functional.normalize
    assert (image - unit(want.image_embeds, dim=-1)).abs().max() <= 1e-5
    assert (text - unit(want.text_embeds, dim=-1)).abs().max() <= 1e-5
    assert (encoder.logits(image, text) - want.logits_per_image).abs().max() <= 1e-5
    # The comparison means something only if pictures and texts are told apart.
    assert torch.pdist(image).min() > 0.05
    assert torch.pdist(text).min() > 0.01


def test_padding_follows_the_family(encoder, family):
    words = encoder.tokenize(TEXTS)
    masks = encoder.token_masks(words)
    if encoder.family.startswith("siglip"):
        assert set(words) == {"input_ids"}
        assert words["input_ids"].shape == (4, 64)
        assert masks == {}
    else:
        assert words["input_ids"].shape[1] < 40
        assert masks["text_model"].dtype == torch.bool
        assert masks["text_model"].sum(1).tolist() == words["attention_mask"].sum(1).tolist()
        assert masks["text_model"][:, -1].sum() == 1  # the longest alone has a token in the last column
        alone = encoder.text_features(encoder.tokenize(TEXTS[:1]))
        assert (alone - encoder.text_features(words)[:1]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["clip", "vision-text", "embedded"])
def test_masked_positions_do_not_reach_the_features(encoder):
    words = encoder.tokenize(TEXTS)
    masks = encoder.token_masks(words)
    changed = words | {"input_ids": torch.where(masks["text_model"], words["input_ids"], 7)}
    assert torch.equal(encoder.text_features(words), encoder.text_features(changed))


def test_a_siglip_tokenizer_with_a_mask_counts_what_the_tower_reads(folders):
    encoder = load_model(folders["siglip"])
    encoder.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    words = encoder.tokenize(TEXTS)
    mask = encoder.token_masks(words)["text_model"]
    assert mask[:, -1].all()
    assert not mask.all()
    table = encoder.model.text_model.embeddings.token_embedding
    table.register_forward_hook(lambda module, args, out: out.retain_grad() or setattr(module, "seen", out))
    encoder.text_features(words)[:, 0].sum().backward()
    assert torch.equal(table.seen.grad.abs().sum(-1) > 0, mask)


def test_gradients_reach_every_default_target(encoder):
    image = encoder.image_features(batch(encoder, tiny.pictures(2)))
    text = encoder.text_features(encoder.tokenize(TEXTS[:2]))
    torch.nn.functional.cross_entropy(encoder.logits(image, text), torch.tensor([0, 1])).backward()
    suffixes = tuple("." + s for s in encoder.default_target_modules)
    hit = {n: m for n, m in encoder.model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(suffixes)}
    assert len(hit) == 4 * (tiny.VISION_BLOCKS + tiny.TEXT_BLOCKS)
    assert all(re.search(r"\.layers?\.\d+\.", name) for name in hit)
    for name, module in hit.items():
        # A key bias cannot matter to a softmax, a key weight can.
        assert module.weight.grad is not None, name
        assert module.weight.grad.abs().max() > 0, name


def test_no_module_inside_multihead_attention_is_a_default_target(folders):
    encoder = load_model(folders["siglip"])
    assert "self_attn.out_proj" in encoder.default_target_modules
    peft = get_peft_model(encoder.model, LoraConfig(target_modules=encoder.default_target_modules))
    assert not any("vision_model.head" in name for name in peft.targeted_module_names)
    assert len(peft.targeted_module_names) == 4 * (tiny.VISION_BLOCKS + tiny.TEXT_BLOCKS)


def test_an_adapter_acts_in_place_and_leaves_in_place(encoder, tmp_path):
    pictures, words = batch(encoder, tiny.pictures(2)), encoder.tokenize(TEXTS)

    def features():
        with torch.no_grad():
            return encoder.image_features(pictures), encoder.text_features(words)

    before, targets = features(), encoder.default_target_modules
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    peft = get_peft_model(encoder.model, config)
    for old, new in zip(before, features(), strict=True):
        assert (old - new).abs().max() > 1e-3
    assert encoder.default_target_modules == targets
    with pytest.raises(KeepLoraError, match="adapter is attached"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    peft.unload()
    # Stock PEFT leaves the base frozen, and for frozen weights SigLIP's `nn.MultiheadAttention` takes another kernel, which
    # rounds alike on some processors only.
    encoder.model.requires_grad_(True)
    for old, new in zip(before, features(), strict=True):
        assert torch.equal(old, new)


def test_bfloat16_autocast_is_close_and_keeps_float32_logits(encoder):
    pictures, words = batch(encoder, tiny.pictures()), encoder.tokenize(TEXTS)
    with torch.no_grad():
        image, text = encoder.image_features(pictures), encoder.text_features(words)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image16, text16 = encoder.image_features(pictures), encoder.text_features(words)
            logits = encoder.logits(image, text)
    for exact, rounded in ((image, image16), (text, text16)):
        assert rounded.dtype == torch.float32
        assert 0 < (exact - rounded).abs().max() < 0.05
    assert torch.equal(logits, encoder.logits(image, text))


def test_class_features_of_an_ensemble(encoder):
    classes, templates = ["cat", "red car", "bird"], ["a photo of a {}.", "art of the {c}", "{}"]
    got = encoder.class_features(classes, templates)
    assert encoder.class_prompts(classes, templates)[:4] == [
        "a photo of a cat.", "art of the cat", "cat", "a photo of a red car.",
    ]  # fmt: skip
    for i, name in enumerate(classes):
        rows = torch.cat([encoder.text_features(encoder.tokenize([fill(t, name)])) for t in templates])
        mean = rows.detach().mean(0)
        assert (got[i] - mean / mean.norm()).abs().max() <= 1e-5
    assert not got.requires_grad
    assert not torch.allclose(got, encoder.class_features(classes, templates[:1]), atol=1e-3)


def test_more_prompts_than_one_batch(folders):
    encoder = load_model(folders["clip"])
    classes = [f"sign {i}" for i in range(130)]
    got = encoder.class_features(classes, ["a {}", "the {}"])  # 260 prompts: two batches, one class in each
    one = encoder.class_features(classes[128:129], ["a {}", "the {}"])
    assert got.shape == (130, 16)
    assert (got[128] - one[0]).abs().max() <= 1e-5


def test_the_cache_lives_as_long_as_its_block(folders, monkeypatch):
    encoder = load_model(folders["clip"])
    calls = []
    original = encoder.text_features
    monkeypatch.setattr(encoder, "text_features", lambda words: calls.append(1) or original(words))
    encoder.model.train()
    with encoder.evaluating():
        assert not torch.is_grad_enabled()
        assert not encoder.model.training
        first = encoder.class_features(["cat", "dog"], "photo")
        assert encoder.class_features(["cat", "dog"], ["a photo of a {}."]) is first
        assert len(calls) == 1
        encoder.class_features(["dog", "cat"], "photo")
        encoder.class_features(["cat", "dog"], "plain")
        assert len(calls) == 3
    assert encoder.model.training
    with torch.no_grad():
        encoder.model.text_projection.weight.add_(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
    with encoder.evaluating():
        assert (encoder.class_features(["cat", "dog"], "photo") - first).abs().max() > 1e-3
    encoder.class_features(["cat"], "photo")
    encoder.class_features(["cat"], "photo")
    assert len(calls) == 6


def test_another_picture_size(folders, family):
    size = 56 if family == "embedded" else 48
    encoder = load_model(folders[family], image_size=size)
    assert encoder.image_size == size
    pictures = batch(encoder, tiny.pictures(2))
    assert pictures.shape[1:] == ((36, 194) if family == "siglip2" else (3, size, size))
    features = encoder.image_features(pictures)
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))
    native = load_model(folders[family])
    assert (features - native.image_features(batch(native, tiny.pictures(2)))).abs().max() > 1e-3
    with pytest.raises(KeepLoraError, match=r"multiple of the patch size (8|14).*take"):
        load_model(folders[family], image_size=size + 1)


def test_naflex_masks_padded_patches(folders):
    encoder = load_model(folders["siglip2"])
    pictures = batch(encoder, tiny.pictures())
    mask = encoder.picture_masks(pictures)["vision_model"]
    assert mask.sum(1).tolist() == [15, 15, 15, 15]  # 40 x 56 px becomes 5 x 3 of at most 16 patches
    noisy = torch.where(mask.unsqueeze(-1), pictures, torch.randn_like(pictures))
    noisy[..., -2:] = pictures[..., -2:]
    assert torch.allclose(encoder.image_features(noisy), encoder.image_features(pictures), atol=1e-6)


def test_saved_folder_opens_again_with_equal_features(encoder, family, folders, tmp_path):
    folder = encoder.save_pretrained(tmp_path / "saved")
    again = load_model(folder)
    pictures = tiny.pictures(2)
    assert torch.equal(again.image_features(batch(again, pictures)), encoder.image_features(batch(encoder, pictures)))
    assert torch.equal(again.text_features(again.tokenize(TEXTS)), encoder.text_features(encoder.tokenize(TEXTS)))
    with pytest.raises(KeepLoraError, match="exists already"):
        encoder.save_pretrained(folder)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_saved_folder_opens_in_the_stock_pipeline(name, folders, tmp_path):
    encoder = load_model(folders[name], image_size=48)  # the saved folder keeps the checkpoint's own size
    folder = encoder.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(folder, backend="pil")
    picture, labels = tiny.pictures(1)[0], ["cat", "red car", "bird"]
    stock = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    scores = {r["label"]: r["score"] for r in stock(picture, labels, hypothesis_template="a photo of a {}.")}
    encoder = load_model(folder)
    logits = encoder.logits(encoder.image_features(batch(encoder, [picture])), encoder.class_features(labels, "photo"))[
        0
    ]
    probabilities = logits.softmax(0) if name == "clip" else logits.sigmoid()
    assert [scores[label] for label in labels] == pytest.approx(probabilities.tolist(), abs=1e-5)


# ---- videos ----------------------------------------------------------------------------------------------------------


def videos(encoder, length=None):
    """Two of four frames, all different."""
    return torch.stack([encoder.preprocess_clip(tiny.pictures(4, seed=seed), length) for seed in (0, 1)])


def test_a_video_is_the_mean_of_its_frames_normalised_features(encoder, family):
    clips = videos(encoder)
    assert clips.shape[:2] == (2, 4)
    assert encoder.is_clip(clips)
    assert not encoder.is_clip(clips[0])
    assert encoder.clip_frames is None
    with torch.no_grad():
        found = encoder.image_features(clips)
        frames = [encoder.image_features(clip) for clip in clips]
        shuffled = encoder.image_features(clips[:, [2, 0, 3, 1]])
    want = torch.stack([f.mean(0) / f.mean(0).norm() for f in frames])
    assert (found - want).abs().max() <= 1e-5
    assert (shuffled - found).abs().max() <= 1e-5
    # Not the mean of features as they come, of whatever length: SigLIP's and CLIP's frames differ in it.
    assert torch.pdist(frames[0]).min() > 0.02


def test_a_still_video_is_its_picture(encoder):
    picture = tiny.pictures(1)[0]
    with torch.no_grad():
        still = encoder.image_features(encoder.preprocess_clip([picture] * 3).unsqueeze(0))
        alone = encoder.image_features(encoder.preprocess(picture).unsqueeze(0))
    assert (still - alone).abs().max() <= 1e-6


def test_absent_frames_do_not_count(encoder, family):
    short = [encoder.preprocess_clip(tiny.pictures(count, seed=count), 4) for count in (2, 3)]
    assert [int((~s.flatten(1)[:, 0].isnan()).sum()) for s in short] == [2, 3]
    clips = torch.stack([*short, encoder.preprocess_clip(tiny.pictures(4, seed=4))])
    found = encoder.image_features(clips)
    assert torch.isfinite(found).all()
    with torch.no_grad():
        for feature, count in zip(found, (2, 3, 4)):
            whole = encoder.preprocess_clip(tiny.pictures(count, seed=count))
            assert (encoder.image_features(whole.unsqueeze(0))[0] - feature).abs().max() <= 1e-5
    found.sum().backward()
    grads = [p.grad for p in encoder.model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)
    with pytest.raises(ValueError, match="4 frames do not fit into 3"):
        encoder.preprocess_clip(tiny.pictures(4), 3)


def test_the_picture_tower_sees_every_frame_and_its_mask_fits(encoder, family):
    clips = torch.stack([encoder.preprocess_clip(tiny.pictures(count, seed=count), 4) for count in (2, 4)])
    tower = encoder.towers["vision"]
    linear = next(n for n, _ in encoder._targets if n.startswith(tower + "."))
    seen = []
    handle = encoder.model.get_submodule(linear).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        encoder.image_features(clips)
    handle.remove()
    assert [shape[0] for shape in seen] == [6]
    masks = encoder.picture_masks(clips)
    assert list(masks) == ([tower] if family == "siglip2" else [])
    assert all(mask.shape == seen[0][:-1] for mask in masks.values())


def test_videos_are_compared_with_texts_as_pictures_are(encoder):
    clips, texts = videos(encoder), encoder.class_features(["cat", "bird"], "photo")
    with torch.no_grad():
        logits, features = encoder.compare(clips, texts)
        assert torch.equal(features, encoder.image_features(clips))
    assert torch.equal(logits, encoder.logits(features, texts))
