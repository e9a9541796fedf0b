"""Teach the video stand-in and write the files that the package carries.

    pip install "keeplora[assets,video]" resvg-py==0.5.0 fonttools
    keeplora assets fetch
    python scripts/train_stand_in.py --work build/stand-in
    python scripts/train_stand_in_video.py --work build/stand-in

The picture stand-in's projector stays as it is and its decoder is taught further, on clips drawn from reels of frames and
on single pictures of the picture stand-in's own mixture. About fifteen minutes for the frames and half an hour for the
teaching on two cores with bfloat16 units; it goes on where it was stopped. Every choice is seeded; floating point differs
a little between machines, so the weights do too.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaConfig, LlavaOnevisionForConditionalGeneration

from keeplora.files import atomic_write_bytes, atomic_write_json, sha256_file
from keeplora.models.assets import VISION, embedded_path
from keeplora.models.stand_in import FOLDER_FILES, PICTURES, RECORD, VIDEOS, tower_state

sys.path.insert(0, str(Path(__file__).parent))
from pack_sources import SOURCES, fetch
from stand_in_bank import bank, projected
from stand_in_mixture import TRAIN, Turn, mixture, things, with_words
from stand_in_model import SIDE, build_tower
from stand_in_video_model import build_config, build_model, build_tokenizer, write_processor
from stand_in_video_score import packs, table
from stand_in_video_teach import BATCH, Clips, own_state, teach
from stand_in_video_teach import PICTURES as PICTURE_SHARE

REELS = {"line": 1800, "lane": 1000, "slide": 2000, "act": 900}


def asked_of(folders: Any, drawn: Any, file: Path) -> list[list[Turn]]:
    """The questions of the picture stand-in's mixture, picture by picture."""
    if not file.is_file():
        samples = with_words(mixture(folders, drawn, "train", TRAIN, 0), drawn, 0)
        file.write_bytes(pickle.dumps([sample.turns for sample in samples]))
    return pickle.loads(file.read_bytes())


def projected_pictures(projector: torch.nn.Module, features: Path, file: Path) -> np.ndarray:
    """The mixture's pictures as single frames, from the tower features that train_stand_in.py cached."""
    if not file.is_file():
        if not features.is_file():
            raise SystemExit(f"{features} is missing: run train_stand_in.py with the same --work first")
        part = file.with_suffix(".part.npy")
        np.save(part, projected(projector, np.load(features, mmap_mode="r")))
        part.rename(file)
    return np.load(file)


def write(model: LlavaOnevisionForConditionalGeneration, tokenizer: Any, out: Path) -> None:
    """The committed files except the record; what the picture stand-in's file has too stays out."""
    out.mkdir(parents=True, exist_ok=True)
    own = {n: t.half().contiguous() for n, t in own_state(model).items() if "multi_modal_projector" not in n}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_processor(tokenizer, folder)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        ids = model.config.text_config
        GenerationConfig(
            bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id, do_sample=False
        ).save_pretrained(folder)
        save_file(own, folder / VIDEOS.weights, metadata={"format": "pt"})
        for name in (*FOLDER_FILES, VIDEOS.weights):
            atomic_write_bytes(out / name, (folder / name).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/stand-in"), help="that of train_stand_in.py")
    parser.add_argument("--packages", type=Path, help="where the packages are downloaded to (default: WORK/packages)")
    parser.add_argument("--videos", type=Path, help="where reels and checkpoints are kept (default: WORK/videos)")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to start from")
    parser.add_argument("--snapshot", type=Path, help="write the files from this checkpoint and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    own = args.videos or args.work / "videos"
    own.mkdir(parents=True, exist_ok=True)
    packages = (args.packages or args.work / "packages").resolve()
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    model = build_model(config)
    model.model.vision_tower.load_state_dict(tower_state(embedded_path(), SIDE))
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["model"], strict=False)
    if args.snapshot:
        model.load_state_dict(torch.load(args.snapshot, weights_only=True)["model"], strict=False)
        write(model, tokenizer, VIDEOS.files)
        if not (VIDEOS.files / RECORD).is_file():
            atomic_write_json(VIDEOS.files / RECORD, {})
        return
    projector = model.model.multi_modal_projector
    drawn = things(lambda key: fetch(SOURCES[key], packages), args.work / "things.pkl")
    started = time.time()
    asked = asked_of(lambda key: fetch(SOURCES[key], packages), drawn, own / "asked.pkl")
    tower = build_tower(LlavaConfig.from_pretrained(PICTURES.files), embedded_path())
    reels, frames = bank(drawn["emoji"], REELS, tower, projector, own)
    pictures = projected_pictures(projector, args.work / "features.npy", own / "pictures.npy")
    print(
        f"{len(reels)} reels, {len(frames)} frames, {len(pictures)} pictures: {time.time() - started:.0f} s", flush=True
    )
    clips = Clips(reels, frames, pictures, asked, tokenizer)
    started = time.time()
    record = teach(model, clips, own / f"teach-{args.steps}-{args.rate:g}.pt", args.steps, args.rate)
    minutes = (time.time() - started) / 60
    write(model, tokenizer, VIDEOS.files)
    scores = table(model, tokenizer, packs())
    print(json.dumps(scores, indent=1))
    result = {
        "what": "a stand-in: a small vision-language model that reads short videos, for examples and tests, not a model to use",
        "command": "python scripts/train_stand_in_video.py",
        "tower": {
            "package": VISION.package,
            "version": VISION.version,
            "sha256": VISION.sha256,
            "licence": VISION.licence,
        },
        "projector": f"the picture stand-in's ({PICTURES.weights}), unchanged",
        "decoder": "the picture stand-in's, taught further",
        "parameters": {
            "decoder": sum(p.numel() for n, p in model.named_parameters() if "language_model" in n or "lm_head" in n)
        },
        "mixture": {
            "reels": REELS,
            "frames": len(frames),
            "pictures": len(pictures),
            "share_of_picture_batches": PICTURE_SHARE,
            "sources": [
                {"package": s.package, "version": s.version, "sha256": s.sha256, "licence": s.licence}
                for s in (SOURCES[key] for key in ("emoji-google", "emoji-twitter"))
            ],
        },
        "teaching": {**record, "rate": args.rate, "batch": BATCH, "minutes": round(minutes, 1)}
        | ({"started_from": args.start.name} if args.start else {}),
        "held_out": scores,
        "weights_sha256": sha256_file(VIDEOS.files / VIDEOS.weights),
    }
    atomic_write_json(VIDEOS.files / RECORD, result)


if __name__ == "__main__":
    main()
