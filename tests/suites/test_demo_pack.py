"""The committed demo pack keeps its promises: sizes, honest splits, licences, decodable pictures."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from keeplora.data import load_task
from keeplora.suites import load_suite, suite_folder

PACK = suite_folder() / "demo"
DEMO = load_suite("demo")
TASKS, PROBES = ([spec["name"] for spec in DEMO[kind]] for kind in ("tasks", "probes"))
COLUMNS = ["task", "split", "label", "class_name", "item", "origin", "licence", "image"]


def rows(name: str) -> list[dict]:
    return pq.read_table(PACK / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def pack() -> dict[str, list[dict]]:
    return {name: rows(name) for name in (*TASKS, *PROBES)}


@pytest.fixture(scope="module")
def pictures(pack) -> dict[str, list[Image.Image]]:
    decoded = {}
    for name, found in pack.items():
        decoded[name] = []
        for row in found:
            with Image.open(io.BytesIO(row["image"])) as image:
                image.load()
                decoded[name].append(image)
    return decoded


def test_five_tasks_and_two_probes_of_the_promised_size(pack):
    assert len(TASKS) == 5
    assert len(PROBES) == 2
    for name in TASKS:
        sides = Counter(row["split"] for row in pack[name])
        assert sides["train"] >= 300, name
        assert sides["test"] >= 150, name
    for name in PROBES:
        sides = Counter(row["split"] for row in pack[name])
        assert sides["train"] == 0, name
        assert sides["test"] >= 200, name


def test_columns_labels_and_classes(pack):
    for name, found in pack.items():
        assert pq.read_schema(PACK / f"{name}.parquet").names == COLUMNS
        assert {row["task"] for row in found} == {name}
        assert len({(row["label"], row["class_name"]) for row in found}) == len({row["label"] for row in found})
        assert {row["label"] for row in found} == set(range(len({row["class_name"] for row in found})))


def test_every_class_has_pictures_on_each_side(pack):
    for name, found in pack.items():
        classes = {row["class_name"] for row in found}
        for side in ("train", "test") if name in TASKS else ("test",):
            counts = Counter(row["class_name"] for row in found if row["split"] == side)
            assert min(counts[class_name] for class_name in classes) >= (10 if side == "train" else 4), (name, side)


def test_no_item_on_both_sides(pack):
    for name in TASKS:
        sides = {side: {row["item"] for row in pack[name] if row["split"] == side} for side in ("train", "test")}
        assert not sides["train"] & sides["test"], name


def test_no_letter_of_a_script_on_both_sides(pack):
    letters = {
        side: {c for row in pack["scripts"] if row["split"] == side for c in row["item"]} for side in ("train", "test")
    }
    assert not letters["train"] & letters["test"]


def test_items_of_the_two_emoji_vendors_are_not_both_there(pack):
    assert max(Counter(row["item"] for row in pack["emoji"]).values()) == 1


def near(images: list[Image.Image]) -> list[tuple[int, int]]:
    """Pairs of near-duplicates: difference hash within 12 of 256 bits, thumbnails within 6 levels, correlation 0.96."""
    grey = np.stack([np.asarray(i.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16) for i in images])
    signs = np.where(grey[:, :, 1:] > grey[:, :, :-1], 1.0, -1.0).reshape(len(images), -1).astype(np.float32)
    thumbs = np.stack([np.asarray(i.resize((16, 16), Image.Resampling.BOX), np.float32).ravel() for i in images])
    shapes = thumbs - thumbs.mean(axis=1, keepdims=True)
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True).clip(1e-6)
    close = np.triu((signs @ signs.T >= 256 - 24) & (shapes @ shapes.T >= 0.96), 1)
    return [(i, j) for i, j in np.argwhere(close).tolist() if np.abs(thumbs[i] - thumbs[j]).mean() <= 6]


def test_no_exact_or_near_duplicate_anywhere(pack, pictures):
    flat = [(name, row["split"], row["item"]) for name, found in pack.items() for row in found]
    images = [image for found in pictures.values() for image in found]
    assert len({image.tobytes() for image in images}) == len(images)
    assert [(flat[i], flat[j]) for i, j in near(images)] == []


def test_the_search_for_near_duplicates_finds_one(pictures):
    image = pictures["road-signs"][0]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    with Image.open(buffer) as copy:
        assert near([image, copy.convert("RGB"), pictures["digits"][0]]) == [(0, 1)]


def test_every_picture_decodes_as_rgb_of_one_size(pictures):
    for name, found in pictures.items():
        assert {(image.mode, image.size) for image in found} == {("RGB", (112, 112))}, name


def test_no_picture_is_blank(pictures):
    for found in pictures.values():
        assert all(np.asarray(image.convert("L")).std() > 2 for image in found)


def test_clip_art_is_what_the_alignment_head_is_never_trained_on(pack):
    for row in pack["clip-art"]:
        assert row["origin"] == "openclipart-png"
        assert row["item"] == row["item"].strip().lower()
        assert int(hashlib.sha256(row["item"].encode()).hexdigest()[:8], 16) % 10 < 4, row["item"]
    assert not any(row["origin"] == "openclipart-png" for name in TASKS for row in pack[name])
    assert not any(row["origin"].startswith("emoji") for name in TASKS for row in pack[name])


def test_every_origin_is_attributed_with_its_licence(pack):
    text = (PACK / "ATTRIBUTION.md").read_text(encoding="utf-8")
    sections = {part.split(" ", 1)[0]: part for part in text.split("\n## ")[1:]}
    origins = {(row["origin"], row["licence"]) for found in pack.values() for row in found}
    for origin, licence in origins:
        assert f"licence: {licence}" in sections[origin]
        for word in ("copyright:", "taken:", "changed:"):
            assert word in sections[origin]
    assert not any("SA" in licence.split("-") or "GPL" in licence for _, licence in origins)


def test_the_pack_is_small_and_its_provenance_is_its_own(pack):
    assert sum(file.stat().st_size for file in PACK.iterdir()) <= 15 * 2**20
    provenance = json.loads((PACK / "provenance.json").read_text(encoding="utf-8"))
    assert set(provenance["sets"]) == set(pack)
    for name, record in provenance["sets"].items():
        assert record["sha256"] == hashlib.sha256((PACK / f"{name}.parquet").read_bytes()).hexdigest(), name
        assert record["test"] == sum(row["split"] == "test" for row in pack[name])
    assert all(len(source["sha256"]) == 64 for source in provenance["sources"])


def test_probes_are_known_well_above_chance_and_tasks_leave_room():
    figures = json.loads((PACK / "provenance.json").read_text(encoding="utf-8"))["untouched_model"]["accuracy"]
    for name in PROBES:
        assert figures[name]["zero_shot"] > 4 * figures[name]["chance"], name
    for name in TASKS:
        assert figures[name]["linear_probe"] > figures[name]["zero_shot"] + 30, name


@pytest.mark.parametrize("name", ["demo", "demo-small"])
def test_suites_load_through_the_data_room(name):
    suite = load_suite(name)
    tasks = [load_task(spec, suite_folder()) for spec in suite["tasks"]]
    probes = [load_task(spec, suite_folder(), probe=True) for spec in suite["probes"]]
    assert [task.name for task in tasks] == TASKS
    assert [probe.name for probe in probes] == PROBES
    assert [task.warnings for task in (*tasks, *probes)] == [[]] * 7
    assert all("{}" in template for task in tasks for template in task.templates)
    if name == "demo-small":
        assert all(80 <= len(task.train) <= 120 and 60 <= len(task.test) <= 90 for task in tasks)
        assert all(60 <= len(probe.test) <= 90 for probe in probes)


def test_the_reference_set_is_in_no_task_and_no_probe(pictures):
    """What a method distils on must not be what it is tested on: no reserved item, no equal and no near picture."""
    assert load_suite("demo")["reference"] == load_suite("demo-small")["reference"]
    task = load_task(DEMO["reference"], suite_folder(), probe=True)
    found = rows("reference")
    assert len(task.test) == len(task.classes) == len(found) >= 300
    assert {row["split"] for row in found} == {"test"}
    assert {row["origin"] for row in found} == {"openclipart-png"}
    for row in found:
        stem = row["item"].split("/")[-1].strip().lower()  # the name by which an item is reserved
        assert int(hashlib.sha256(stem.encode()).hexdigest()[:8], 16) % 10 >= 4, row["item"]
    others = [image for images in pictures.values() for image in images]
    mine = [task.test.picture(i) for i in range(len(task.test))]
    assert {image.size for image in mine} == {(112, 112)}
    assert all(j < len(others) for _, j in near([*others, *mine]))
