"""Miniature trees of Food101, MNIST, Oxford-IIIT Pet, Stanford Cars, SUN397 and of CoOp's splits, in their true formats.

A picture is one colour, its class's with a small shift of its own, so that classes can be learned and `colour_of` tells
which picture was read.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

PETS = {3: "american_pit_bull_terrier", 1: "Abyssinian", 2: "american_bulldog"}
FOODS = ("apple_pie", "baby_back_ribs", "baklava")
CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012")
SCENES = ("a/abbey", "a/airplane_cabin", "c/church/indoor", "c/church/outdoor")
LANDS = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
TRAIN, VAL, TEST = 5, 2, 3


def colour_of(label: str, name: str, seed: int) -> tuple[int, int, int]:
    """RGB of the picture ``name`` of the class ``label``."""
    base = hashlib.sha256(label.encode()).digest()[:3]
    shift = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:3]
    red, green, blue = (30 + b * 195 // 255 + s % 41 - 20 for b, s in zip(base, shift, strict=True))
    return red, green, blue


def write_picture(path: Path, label: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour_of(label, path.name, seed)).save(buffer, "JPEG", quality=95)
    path.write_bytes(buffer.getvalue())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def make_food101(root: Path, seed: int) -> None:
    base = root / "food-101"
    write_lines(base / "meta/classes.txt", FOODS)
    write_lines(base / "meta/labels.txt", [name.replace("_", " ").capitalize() for name in FOODS])
    for split, numbers in (("train", range(1000, 1000 + TRAIN)), ("test", range(2000, 2000 + TEST))):
        listed = {name: [f"{name}/{number}" for number in numbers] for name in FOODS}
        write_lines(base / f"meta/{split}.txt", [line for lines in listed.values() for line in lines])
        (base / f"meta/{split}.json").write_text(json.dumps(listed))
        for name, lines in listed.items():
            for line in lines:
                write_picture(base / f"images/{line}.jpg", name, seed)


def digits(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` pictures of each digit, [N, 28, 28], a bright bar whose row is the digit; and their labels [N]."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(10, dtype=np.uint8), count))
    pictures = generator.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[2 * label + 4 : 2 * label + 6] = 250
    return pictures, labels


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return header + array.tobytes()


def make_mnist(root: Path, seed: int) -> None:
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    for prefix, number, count in (("train", 2 * seed, TRAIN), ("t10k", 2 * seed + 1, TEST)):
        pictures, labels = digits(number, count)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def make_oxford_pet(root: Path, seed: int) -> None:
    base = root / "oxford-iiit-pet"
    first = 1
    for file, count in (("trainval.txt", TRAIN), ("test.txt", TEST)):
        rows = [(f"{breed}_{first + i}", number) for number, breed in PETS.items() for i in range(count)]
        write_lines(base / "annotations" / file, [f"{image} {number} {2 - (number == 1)} 1" for image, number in rows])
        for image, number in rows:
            write_picture(base / f"images/{image}.jpg", PETS[number], seed)
        first += count


def save_annotations(path: Path, rows: list[tuple[str, int]], *, labelled: bool = True) -> None:
    """The struct array of Stanford Cars: a box, the class (from 1) where there is one, and the file name."""
    boxes = [(f"bbox_{side}", object) for side in ("x1", "y1", "x2", "y2")]
    table = np.zeros((1, len(rows)), dtype=[*boxes, *([("class", object)] if labelled else []), ("fname", object)])
    for at, (file, number) in enumerate(rows):
        for side, value in zip(("x1", "y1", "x2", "y2"), (1, 2, 9, 8), strict=True):
            table[f"bbox_{side}"][0, at] = np.uint16(value)
        if labelled:
            table["class"][0, at] = np.uint8(number)
        table["fname"][0, at] = file
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": table})


def make_stanford_cars(root: Path, seed: int) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True, exist_ok=True)
    names = np.empty((1, len(CARS)), dtype=object)
    names[0] = CARS
    savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows = [(f"{i + 1:05d}.jpg", i % len(CARS) + 1) for i in range(count * len(CARS))]
        for file, number in rows:
            write_picture(base / f"cars_{split}" / file, CARS[number - 1], seed if split == "train" else seed + 1)
        where = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        save_annotations(base / where, rows)
    save_annotations(base / "devkit/cars_test_annos.mat", rows, labelled=False)


def make_sun397(root: Path, seed: int) -> None:
    base = root / "SUN397"
    write_lines(base / "ClassName.txt", [f"/{scene}" for scene in SCENES])
    for scene in SCENES:
        for number in range(8):
            letters = hashlib.sha256(f"{scene}{number}".encode()).hexdigest()[:16]
            write_picture(base / scene / f"sun_{letters}.jpg", scene, seed)


#: dataset -> (folder, split file, folder of pictures)
COOP_LAYOUT = {
    "aircraft": ("fgvc_aircraft", None, "images"),
    "caltech101": ("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
    "dtd": ("dtd", "split_zhou_DescribableTextures.json", "images"),
    "eurosat": ("eurosat", "split_zhou_EuroSAT.json", "2750"),
    "flowers": ("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
    "food": ("food-101", "split_zhou_Food101.json", "images"),
    "pets": ("oxford_pets", "split_zhou_OxfordPets.json", "images"),
    "cars": ("stanford_cars", "split_zhou_StanfordCars.json", "."),
    "sun397": ("sun397", "split_zhou_SUN397.json", "SUN397"),
}
AIRCRAFT = ("707-320", "DC-10", "F/A-18")


def _coop_picture(dataset: str, label: int, number: int, split: str) -> str:
    """The picture's path in the dataset's own style; ``number`` counts within the class."""
    serial = 100 * label + number + 1
    texture = ("banded", "blotchy", "braided")[label % 3]
    if dataset == "food":
        return f"{FOODS[label]}/{1000 + serial}.jpg"
    if dataset == "eurosat":
        folder = list(LANDS)[label]
        return f"{folder}/{folder}_{number + 1}.jpg"
    if dataset == "sun397":
        return f"{SCENES[label]}/sun_{hashlib.sha256(str(serial).encode()).hexdigest()[:16]}.jpg"
    return {
        "caltech101": f"{('Faces', 'accordion', 'water_lilly')[label % 3]}/image_{number + 1:04d}.jpg",
        "dtd": f"{texture}/{texture}_{serial:04d}.jpg",
        "flowers": f"image_{serial:05d}.jpg",
        "pets": f"{PETS[label % 3 + 1]}_{number + 1}.jpg",
        "cars": f"cars_{'test' if split == 'test' else 'train'}/{serial:05d}.jpg",
    }[dataset]


COOP_CLASSES: dict[str, tuple[str, ...]] = {
    "caltech101": ("face", "accordion", "water_lilly"),
    "dtd": ("banded", "blotchy", "braided"),
    "eurosat": tuple(LANDS.values()),
    "flowers": ("pink primrose", "colt's foot", "rose"),
    "food": FOODS,
    "pets": tuple(PETS[number].lower() for number in sorted(PETS)),
    "cars": ("2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 Ram C/V Cargo Van Minivan"),
    "sun397": ("abbey", "airplane_cabin", "indoor church", "outdoor church"),
}


def make_coop(root: Path, seed: int) -> None:
    """X-TAIL's ten domains as CoOp's DATASETS.md lays them out, in a ``root`` of their own."""
    make_mnist(root, seed)
    for dataset, classes in COOP_CLASSES.items():
        folder, file, images = COOP_LAYOUT[dataset]
        splits: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
        for label, name in enumerate(classes):
            for number in range(TRAIN + VAL + TEST):
                split = "train" if number < TRAIN else "val" if number < TRAIN + VAL else "test"
                picture = _coop_picture(dataset, label, number, split)
                splits[split].append([picture, label, name])
                write_picture(root / folder / images / picture, name, seed)
        splits["train"] = [splits["train"][i] for i in np.random.default_rng(seed).permutation(len(splits["train"]))]
        assert file is not None
        (root / folder / file).write_text(json.dumps(splits, indent=4))
    base = root / "fgvc_aircraft"
    write_lines(base / "variants.txt", AIRCRAFT)
    for start, split, count in ((0, "train", TRAIN), (TRAIN, "val", VAL), (TRAIN + VAL, "test", TEST)):
        rows = [(f"{label}{start + i:06d}", name) for i in range(count) for label, name in enumerate(AIRCRAFT)]
        write_lines(base / f"images_variant_{split}.txt", [f"{picture} {name}" for picture, name in rows])
        for picture, name in rows:
            write_picture(base / f"images/{picture}.jpg", name, seed)


#: Source -> writer of its miniature tree below a data folder, with a seed for the pictures.
MAKERS_B: dict[str, Callable[[Path, int], None]] = {
    "food101": make_food101,
    "mnist": make_mnist,
    "oxford-pet": make_oxford_pet,
    "stanford-cars": make_stanford_cars,
    "sun397": make_sun397,
    "coop": make_coop,
}
