"""Train the alignment head of the embedded default model and write it with its provenance.

    python scripts/train_head.py                 # data by apt-get and npm, towers by `keeplora assets fetch`

Needs Debian or Ubuntu (apt-get, dpkg-deb), npm, and `pip install resvg-py 'keeplora[assets]'`. Features of the frozen towers
are cached, so a second call takes minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import head_data as data
import numpy as np
import torch
from torch import Tensor, nn

from keeplora.files import cache_dir
from keeplora.models import assets
from keeplora.models.embedded import EmbeddedDualEncoder, image_processor


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, chosen on a tenth of the allowed items."""

    epochs: int = 40
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    noise: float = 0.0
    scale: float = 3.0
    text_identity: bool = True


@dataclass
class Features:
    """Tower features: pictures [views, N, 768], texts [M, 384], and which texts belong to which picture."""

    keys: list[str]
    image: Tensor
    texts: list[str]
    text: Tensor
    captions: list[list[int]]


def towers() -> tuple[EmbeddedDualEncoder, object]:
    from transformers import AutoTokenizer

    folder = assets.fetch()
    return EmbeddedDualEncoder.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def image_features(model: EmbeddedDualEncoder, items: list[data.Item], views: int) -> tuple[Tensor, np.ndarray]:
    """[cls; mean of patches] of each view [views, N, 768] and difference hashes [N, 256].

    Views: as the processor crops it; the whole picture on a white square; the first one mirrored.
    """
    process = image_processor(model.config.image_size)
    out, hashes = torch.empty(views, len(items), 2 * model.config.vision_config.hidden_size), []
    for start in range(0, len(items), 64):
        pictures = [data.picture(i) for i in items[start : start + 64]]
        hashes += [data.difference_hash(p) for p in pictures]
        for view in range(views):
            shown = [data.squared(p) for p in pictures] if view == 1 else pictures
            pixels = process([p.resize(_shrunk(p)) for p in shown], return_tensors="pt")["pixel_values"]
            pixels = pixels.flip(-1) if view == 2 else pixels
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.vision_model(pixel_values=pixels).last_hidden_state.float()
            out[view, start : start + len(pictures)] = torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=-1)
    return out, np.stack(hashes)


def _shrunk(picture: object) -> tuple[int, int]:
    # A picture of four megapixels is first brought near the final size: bicubic from there is the same and quicker.
    width, height = picture.size  # type: ignore[attr-defined]
    factor = min(1.0, 336 / min(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


@torch.no_grad()
def text_features(model: EmbeddedDualEncoder, tokenizer: object, texts: list[str]) -> Tensor:
    """Mean of the last hidden states over each text's tokens [M, 384]."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: less padding
    out = torch.empty(len(texts), model.config.text_config.hidden_size)
    for start in range(0, len(texts), 256):
        part = order[start : start + 256]
        batch = tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt")  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.text_model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        out[part] = (hidden * mask).sum(1) / mask.sum(1)
    return out


def features(work: Path, torch_threads: int) -> dict[str, Features]:
    """Features of the training items ("train") and of the two held-out sets ("held-out", "emoji"), cached in `work`.

    A training item is dropped when any of its names is reserved or it is a near-duplicate of a reserved
    openclipart item or of a judged emoji.
    """
    wheel = assets.VISION.sha256 + assets.TEXT.sha256
    source = "".join(Path(__file__).with_name(n).read_text() for n in ("head_data.py", "train_head.py")[:1])
    cache = work / f"features-{hashlib.sha256((wheel + source).encode()).hexdigest()[:12]}.pt"
    if cache.is_file():
        return {k: Features(**v) for k, v in torch.load(cache, weights_only=True).items()}
    torch.set_num_threads(torch_threads)
    data.download(work)
    everything = data.clipart(work)
    reserved = [i for i in everything if any(map(data.is_reserved, i.names))]
    names = {i.key for i in reserved}
    allowed = [i for i in everything if i.key not in names] + data.icons(work)
    emoji, _ = data.emoji(work)
    model, tokenizer = towers()
    found = {}
    for name, items, views in (("held-out", reserved, 1), ("emoji", emoji, 1), ("train", allowed, 3)):
        started = time.time()
        found[name] = (items, *image_features(model, items, views))
        print(f"{name}: {len(items)} pictures, {time.time() - started:.0f} s", flush=True)
    judged = np.concatenate([found["held-out"][2], found["emoji"][2]])
    keep = ~data.near_duplicates(found["train"][2], judged)
    print(f"train: {(~keep).sum()} near-duplicates of held-out pictures dropped")
    found["train"] = ([i for i, k in zip(allowed, keep) if k], found["train"][1][:, torch.from_numpy(keep)], None)
    out = {}
    for name, (items, image, _) in found.items():
        captions = [i.captions if name == "train" else [i.full_caption] for i in items]
        texts = sorted({c for group in captions for c in group})
        number = {t: n for n, t in enumerate(texts)}
        numbers = [[number[c] for c in group] for group in captions]
        out[name] = Features([i.key for i in items], image, texts, text_features(model, tokenizer, texts), numbers)
    torch.save({k: asdict(v) for k, v in out.items()}, cache)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=cache_dir() / "head", help="where data and features are kept")
    args = parser.parse_args()
    features(args.work, 2)
