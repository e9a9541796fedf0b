"""Data sets of small pictures as the files that streams are made of: parquet, JSON lines, tar."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
from picture_files import encode

NAMES = ("zebra", "sea_lion", "owl")


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"photo": {"bytes": encode(start + i), "path": None}, "animal": i % 3} for i in range(count)]


def parquet(folder: Path, shards: dict[str, list[int]], *, typed: bool = True) -> Path:
    """``{"train": [4, 4], "test": [3]}``: files of so many rows each; untyped ones hold class names as text."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, counts in shards.items():
        for n, count in enumerate(counts):
            held = rows(count, start)
            label = datasets.ClassLabel(names=list(NAMES)) if typed else datasets.Value("string")
            if not typed:
                held = [{**row, "animal": NAMES[row["animal"]]} for row in held]
            features = datasets.Features({"photo": datasets.Image(), "animal": label})
            datasets.Dataset.from_list(held, features=features).to_parquet(folder / f"{split}-{n:02d}.parquet")
            start += count
    return folder


def tar(file: Path, count: int, start: int = 0) -> Path:
    """A WebDataset: ``KEY.png`` and ``KEY.cls`` for each sample."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for i in range(count):
            for ending, data in (("png", encode(start + i)), ("cls", str(i % 3).encode())):
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file


def questions(folder: Path, train: int, test: int) -> Path:
    """JSON lines of questions about pictures that lie beside them."""
    (folder / "pictures").mkdir(parents=True)
    for split, count, start in (("train", train, 0), ("test", test, 500)):
        lines = []
        for i in range(count):
            (folder / "pictures" / f"{split}{i}.png").write_bytes(encode(start + i))
            lines.append({"image": f"pictures/{split}{i}.png", "question": "What is it?", "answer": NAMES[i % 3]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
