from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, Dinov2Config

from keeplora.files import sha256_file
from keeplora.models import assets
from keeplora.models._convert import apply_deltas
from keeplora.models.embedded import EmbeddedDualEncoder, EmbeddedDualEncoderConfig, image_processor

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model() -> EmbeddedDualEncoder:
    torch.manual_seed(0)
    vision = Dinov2Config(**TINY, image_size=42, patch_size=14, mlp_ratio=2)
    text = BertConfig(**TINY, vocab_size=30, intermediate_size=24, max_position_embeddings=16)
    return EmbeddedDualEncoder(EmbeddedDualEncoderConfig(vision, text, projection_dim=12, image_size=28)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 30, (4, 6), generator=g),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "pixel_values": torch.randn(4, 3, 28, 28, generator=g),
    }


def test_round_trip_through_a_folder_and_auto_model(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, EmbeddedDualEncoder)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits_per_image, model(**batch).logits_per_image, rtol=0, atol=0)
    assert again.config.image_size == 28
    assert isinstance(again.config.vision_config, Dinov2Config)


def test_outputs_are_normalised_and_have_clips_shapes(model, batch):
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"][:3], batch["attention_mask"][:3]
    out = model(**batch)
    assert out.image_embeds.shape == (4, 12)
    assert out.text_embeds.shape == (3, 12)
    assert out.logits_per_image.shape == (4, 3)
    torch.testing.assert_close(out.logits_per_text, out.logits_per_image.T)
    torch.testing.assert_close(out.image_embeds.norm(dim=-1), torch.ones(4))
    expected = model.logit_scale.exp() * torch.nn.functional.cosine_similarity(
        model.get_image_features(batch["pixel_values"])[:, None], out.text_embeds[None], dim=-1
    )
    torch.testing.assert_close(out.logits_per_image, expected)


def test_padding_does_not_change_a_text(model, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    padded = (
        torch.cat([ids, torch.full((4, 5), 7)], dim=1),
        torch.cat([mask, torch.zeros(4, 5, dtype=torch.long)], dim=1),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_text_features(*padded), model.get_text_features(ids, mask), rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(model.get_text_features(padded[0]), model.get_text_features(ids), atol=1e-3)


def test_image_feature_is_class_token_and_patch_mean(model, batch):
    with torch.no_grad():
        hidden = model.vision_model(batch["pixel_values"]).last_hidden_state
        assert hidden.shape == (4, 5, 16)  # 28 px: 2 × 2 patches and the class token, from a 3 × 3 position table
        pooled = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], -1)
        torch.testing.assert_close(model.get_image_features(batch["pixel_values"]), model.visual_projection(pooled))


def test_loss_falls_when_pairs_are_learned(model, batch):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is not None for n, p in model.named_parameters() if "mask_token" not in n)


def test_one_side_alone(model, batch):
    out = model(pixel_values=batch["pixel_values"])
    assert out.image_embeds is not None
    assert out.text_embeds is None
    assert out.logits_per_image is None


def test_processor_crops_the_middle_and_normalises():
    from PIL import Image

    picture = Image.new("RGB", (64, 256), "white")
    pixels = image_processor(28)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 14, 14], expected)


def test_committed_head_fits_and_matches_its_provenance():
    provenance = json.loads(assets.HEAD.with_suffix(".json").read_text())
    head = load_file(assets.HEAD)
    assert provenance["head_sha256"] == sha256_file(assets.HEAD)
    assert head["visual_projection.weight"].shape[1] == 768
    assert head["text_projection.weight"].shape == (head["visual_projection.weight"].shape[0], 384)
    assert all(torch.isfinite(v.float()).all() for v in head.values())
    assert assets.HEAD.stat().st_size < 3_000_000


def test_low_rank_deltas_are_added():
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    state = {"vision_model.x.weight": torch.zeros(4, 5)}
    apply_deltas(state, {"delta.vision_model.x.A": A.half(), "delta.vision_model.x.B": B.half(), "logit_scale": A})
    torch.testing.assert_close(state["vision_model.x.weight"], B.half().float() @ A.half().float())


@pytest.mark.towers
def test_real_model_tells_a_red_square_from_a_dog():
    from PIL import Image
    from transformers import AutoTokenizer

    folder = assets.embedded_path()
    real = EmbeddedDualEncoder.from_pretrained(folder, local_files_only=True).eval()
    texts = AutoTokenizer.from_pretrained(folder)(
        ["a green circle", "a flag of a country"], padding=True, return_tensors="pt"
    )
    flag = Image.new("RGB", (120, 120), "white")
    flag.paste("blue", (0, 20, 40, 100))
    flag.paste("red", (80, 20, 120, 100))
    with torch.no_grad():
        pixels = image_processor()(flag, return_tensors="pt")["pixel_values"]
        logits = real(texts["input_ids"], texts["attention_mask"], pixels).logits_per_image[0]
    assert logits[1] > logits[0]
