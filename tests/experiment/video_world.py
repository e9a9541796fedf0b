"""A small world of questions about videos: clips whose colour changes, two tasks, a general set, all on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
from PIL import Image

from tests.models.tiny_generative import tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
SETS = {
    "first": ("What colour comes first?", lambda first, last: first),
    "last": ("What colour comes last?", lambda first, last: last),
    "general": ("What is seen?", lambda first, last: f"{first} then {last}"),
}


def write_clip(file: Path, colours: list[tuple[int, int, int]], *, rate: int = 4, size: int = 48) -> None:
    """An H.264 clip with one frame for each colour."""
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"threads": "1"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_image(Image.new("RGB", (size, size), colour))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_set(root: Path, name: str, train: int, test: int) -> None:
    """LLaVA JSON: ``NAME/train.json``, ``NAME/test.json``, ``NAME/clips/*.mp4``."""
    question, answer = SETS[name]
    folder = root / name
    (folder / "clips").mkdir(parents=True)
    names = list(COLOURS)
    for split, count in (("train", train), ("test", test)):
        entries = []
        for i in range(count):
            first, last = names[i % 4], names[(i + 1 + i // 4) % 4]
            shades = [tuple(max(0, min(255, c + 2 * i + (split == "test"))) for c in COLOURS[n]) for n in (first, last)]
            file = f"{split}-{i}.mp4"
            write_clip(folder / "clips" / file, [shades[0]] * 4 + [shades[1]] * 4)  # type: ignore[list-item]
            turns = [
                {"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer(first, last)}
            ]  # fmt: skip
            entries.append({"id": f"{split}-{i}", "video": file, "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")


def spec(name: str, scorer: str = "exact", **keys: Any) -> dict[str, Any]:
    return {
        "name": name, "source": "llava", "train": f"{name}/train.json", "test": f"{name}/test.json",
        "videos": f"{name}/clips", "scorer": scorer, "max_new_tokens": 4, **keys,
    }  # fmt: skip


def make_world(root: Path, kind: str = "llava") -> dict[str, Any]:
    """A configuration whose every path is in ``root``; nothing is run."""
    for name in SETS:
        make_set(root, name, 8, 5)
    tiny(kind, root / "model")
    probe = {k: v for k, v in spec("general", "rouge-l").items() if k != "train"}
    return {
        "name": "clips", "model": str(root / "model"), "base_dir": str(root), "tasks": [spec("first"), spec("last")],
        "probes": [probe], "method": "keeplora++", "preset": "default", "device": "cpu", "seed": 3,
        "tuner": {"r": 4, "energy_weights": 0.3, "energy_features": 0.9},
        "training": {"epochs": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 0.01, "eval_batch_size": 4},
        "video": {"frames": 4, "statistics_frames": 2},
    }  # fmt: skip
