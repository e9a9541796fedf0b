"""A small world of questions about pictures: a tiny generative model, two tasks, a general set, all on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tests.models.tiny_generative import tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
SETS = {
    "colours": ("What colour is it?", lambda colour: colour),
    "answers": ("Is it red?", lambda colour: "yes" if colour == "red" else "no"),
    "general": ("Name the picture.", lambda colour: f"a {colour} square"),
}


def make_set(root: Path, name: str, train: int, test: int) -> None:
    """LLaVA JSON: ``NAME/train.json``, ``NAME/test.json``, ``NAME/pictures/*.png``."""
    question, answer = SETS[name]
    folder = root / name
    (folder / "pictures").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        entries = []
        for i in range(count):
            colour = list(COLOURS)[i % len(COLOURS)]
            shade = tuple(max(0, min(255, c + 3 * i + (1 if split == "test" else 0))) for c in COLOURS[colour])
            file = f"{split}-{i}.png"
            Image.new("RGB", (40, 40), shade).save(folder / "pictures" / file)
            turns = [
                {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer(colour)}
            ]  # fmt: skip
            entries.append({"id": f"{split}-{i}", "image": file, "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")


def spec(name: str, scorer: str = "exact") -> dict[str, Any]:
    return {
        "name": name, "source": "llava", "train": f"{name}/train.json", "test": f"{name}/test.json",
        "images": f"{name}/pictures", "scorer": scorer, "max_new_tokens": 4,
    }  # fmt: skip


def make_world(root: Path, kind: str = "llava") -> dict[str, Any]:
    """A configuration whose every path is in ``root``; nothing is run."""
    for name in SETS:
        make_set(root, name, 12, 6)
    tiny(kind, root / "model")
    probe = {k: v for k, v in spec("general", "rouge-l").items() if k != "train"}
    return {
        "name": "small", "model": str(root / "model"), "base_dir": str(root), "tasks": [spec("colours"), spec("answers")],
        "probes": [probe], "method": "keeplora++", "preset": "default", "device": "cpu", "seed": 3,
        "tuner": {"r": 4, "energy_weights": 0.3, "energy_features": 0.9},
        "training": {"epochs": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 0.01, "eval_batch_size": 4},
    }  # fmt: skip
