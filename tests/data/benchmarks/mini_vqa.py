"""Miniature UCIT and MLLM-DCL in the layout that their authors publish: a few small pictures and questions for each task.

The pictures of one answer share a tint, so that a model can learn them; every picture differs from all others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.data.benchmarks.mini import picture, write_jpeg

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "What is happening in the image? Generate a brief caption for the image."
CLASSES = {"n02088466": "bloodhound", "n02129165": "lion", "n07753592": "banana", "n04487394": "trombone"}
CAPTIONS = {
    "dog": ("A dog runs on the grass .", "A brown dog plays .", "The dog is outside .", "Dog on a lawn .", "A dog ."),
    "boat": ("A boat on a lake .", "Two people row a boat .", "A small boat .", "The boat is red .", "Rowing ."),
}
TRAIN, TEST = 8, 4
Row = tuple[str, str, str, str]  # id, picture, question, answer


def make_ucit(folder: Path, seed: int = 0) -> Path:
    """UCIT's ``instructions`` and ``datasets`` below ``folder``."""
    makers = {
        "ImageNet-R": _imagenet_r, "ArxivQA": _arxivqa, "VizWiz": _captions, "IconQA": _iconqa, "CLEVR": _clevr,
        "Flickr30k": _captions,
    }  # fmt: skip
    trains = {"ArxivQA": "train_4w", "CLEVR": "train_4w", "Flickr30k": "train_brief_4w"}
    for name, make in makers.items():
        instructions = folder / "instructions" / name
        for split, count in (("train", TRAIN), ("test", TEST)):
            rows = make(name, split, count)
            for _, place, _, answer in rows:
                pixels = picture(name, seed, answer.split()[0], _number(split, place), (40, 32))
                write_jpeg(folder / "datasets" / place, pixels)
            if split == "train":
                key = "question_id" if name in ("VizWiz", "IconQA", "Flickr30k") else "id"
                _write(instructions / f"{trains.get(name, 'train')}.json", _talks(rows, key))
            else:
                _write(instructions / "test_3000.json", _flat(rows))
                if make is _captions:
                    _write(instructions / "val_coco_type_3000.json", _coco(rows))
    return folder


def make_mllm_dcl(folder: Path, seed: int = 0) -> Path:
    """A folder with train.json, test.json and images for each domain."""
    makers = {"RS": _rs, "Med": _med, "AD": _ad, "Sci": _sci, "Fin": _fin}
    for name, make in makers.items():
        for split, count in (("train", TRAIN), ("test", TEST)):
            rows = make(split, count)
            for _, place, _, answer in rows:
                write_jpeg(folder / name / place, picture(name, seed, answer, _number(split, place), (40, 32)))
            _write(folder / name / f"{split}.json", _talks(rows, "id") if split == "train" else _flat(rows))
    return folder


def _number(split: str, place: str) -> int:
    """A number of its own for each picture."""
    return sum(map(ord, place)) * 2 + (split == "test")


def _talks(rows: Sequence[Row], key: str) -> list[dict[str, Any]]:
    return [
        {
            key: name, "image": place,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for name, place, question, answer in rows
    ]  # fmt: skip


def _flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {"question_id": f"q{n}", "image": place, "text": question, "answer": answer}
        for n, (_, place, question, answer) in enumerate(rows)
    ]


def _coco(rows: Sequence[Row]) -> dict[str, Any]:
    images = [{"id": n, "file_name": Path(place).name} for n, (_, place, _, _) in enumerate(rows, start=1)]
    captions = [(n, caption) for n, row in enumerate(rows, start=1) for caption in _captions_of(row[3])]
    annotations = [{"id": m, "image_id": n, "caption": caption} for m, (n, caption) in enumerate(captions, start=1)]
    return {"images": images, "annotations": annotations}


def _captions_of(caption: str) -> tuple[str, ...]:
    return next(captions for captions in CAPTIONS.values() if caption in captions)


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _imagenet_r(name: str, split: str, count: int) -> list[Row]:
    rows = []
    for n in range(count):
        wnid, answer = list(CLASSES.items())[n % len(CLASSES)]
        file = f"art_{n}" if split == "train" else f"sketch_{n}"
        question = f"What is the object in the image? {WORD}"
        rows.append((f"{wnid}/{file}", f"ImageNet-R/{split}/{wnid}/{file}.jpg", question, answer))
    return rows


def _arxivqa(name: str, split: str, count: int) -> list[Row]:
    first = 0 if split == "train" else 100
    question = f"What does the solid line show? A. A rise. B. A fall. C. Nothing. {LETTER}"
    return [
        (str(n), f"ArxivQA/images/19{first + n:02d}.0285_{n}.jpg", question, "AB"[n % 2]) for n in range(count)
    ]  # fmt: skip


def _captions(name: str, split: str, count: int) -> list[Row]:
    """In training two captions, and so two rows with one id, for each picture."""
    rows = []
    for n in range(count):
        number = n // 2 if split == "train" else n
        caption = list(CAPTIONS.values())[number % 2][n % 2 if split == "train" else 0]
        part = "train" if split == "train" else "val"
        file = f"VizWiz_{part}_{number:08d}.jpg" if name == "VizWiz" else f"{100 * (part == 'val') + number}.jpg"
        rows.append((f"{number:08d}", f"{name}/{part}/{file}", CAPTION, caption))
    return rows


def _iconqa(name: str, split: str, count: int) -> list[Row]:
    part = "train" if split == "train" else "val"
    place = "IconQA/iconqa_data/iconqa/{}/fill_in_blank/{}/image.png"
    return [
        (str(n), place.format(part, 9000 + n), f"How many triangles are there? {WORD}", str(n % 4 + 1))
        for n in range(count)
    ]


def _clevr(name: str, split: str, count: int) -> list[Row]:
    part = "train" if split == "train" else "val"
    question = f"Subtract all spheres. How many objects are left? {WORD}"
    return [(str(n), f"CLEVR/images/{part}/CLEVR_{part}_{n:06d}.png", question, str(n % 3)) for n in range(count)]


def _places(split: str, count: int, prefix: str = "") -> list[str]:
    return [f"images/{prefix}{n if split == 'train' else 500 + n}.jpg" for n in range(count)]


def _rs(split: str, count: int) -> list[Row]:
    question = f"Is there a road in the image? {WORD}"
    return [(str(n), place, question, "yes" if n % 2 else "no") for n, place in enumerate(_places(split, count))]


def _med(split: str, count: int) -> list[Row]:
    question = "What is present? Answer the question with a single word (or phrase)."
    return [
        (str(n), place, question, ("Liver", "spleen")[n % 2]) for n, place in enumerate(_places(split, count, "image_"))
    ]  # fmt: skip


def _ad(split: str, count: int) -> list[Row]:
    question = "Is the car ahead moving? Only answer with yes or no directly."
    return [(str(n), place, question, "Yes" if n % 2 else "No.") for n, place in enumerate(_places(split, count))]


def _sci(split: str, count: int) -> list[Row]:
    kinds = (
        ("AI2D_", f"Which letter is the leaf? A. a B. b {LETTER}", "A"),
        ("TQA_", f"What is shown? A. a cell B. a star {LETTER}", "B"),
        ("VQA_", f"Which force acts? A. drag B. lift {LETTER}", "A"),
        ("map_", "Which states have the lowest value? Answer with a list.", "Ohio,Utah"),
    )
    rows = []
    for n in range(count):
        prefix, question, answer = kinds[n % len(kinds)]
        rows.append((str(n), _places(split, count, prefix)[n], question, answer))
    return rows


def _fin(split: str, count: int) -> list[Row]:
    question = "Did the stock rise? A. yes B. no Answer the question with a single letter choice."
    return [(str(n), place, question, "AB"[n % 2]) for n, place in enumerate(_places(split, count))]
