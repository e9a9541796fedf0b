"""The video suite's packs: real clips, whose answers need several frames, and no picture on both sides."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from keeplora.files import sha256_file
from keeplora.suites import load_suite

ROOT = Path(__file__).resolve().parents[2]
PACKS = ROOT / "src/keeplora/suites/video"
TASKS = ("counting", "motion", "order", "speed", "actions")
COLUMNS = ["split", "id", "video", "conversations", "kind", "origin", "licence", "items"]


def rows(name: str) -> list[dict]:
    return pq.read_table(PACKS / f"{name}.parquet").to_pylist()


def frames(video: bytes) -> tuple[list[np.ndarray], str, float]:
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        codec, rate = stream.codec_context.name, float(stream.average_rate)
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], codec, rate


def answer(row: dict) -> str:
    return json.loads(row["conversations"])[1]["value"]


@pytest.mark.parametrize("name", [*TASKS, "general"])
def test_every_row_is_a_clip_and_a_question(name: str):
    found = rows(name)
    assert pq.read_schema(PACKS / f"{name}.parquet").names == COLUMNS
    assert len({row["id"] for row in found}) == len(found)
    assert Counter(row["split"] for row in found) == (
        {"test": 204} if name == "general" else {"train": 300, "test": 100}
    )
    for row in found:
        asked, said = json.loads(row["conversations"])
        assert (asked["from"], said["from"]) == ("human", "gpt")
        assert asked["value"].startswith("<video>\n")
        assert asked["value"].count("<video>") == 1
        assert said["value"] == said["value"].strip().lower()
        assert 0 < len(said["value"].split()) <= 16
        assert all(row[key] for key in ("kind", "origin", "licence", "items"))


@pytest.mark.parametrize("name", [*TASKS, "general"])
def test_the_clips_are_short_h264_and_change(name: str):
    still = 0
    chosen = rows(name)[::9]
    for row in chosen:
        shown, codec, rate = frames(row["video"])
        assert (codec, rate, shown[0].shape) == ("h264", 8.0, (112, 112, 3))
        assert 16 <= len(shown) <= 24
        still += max(np.abs(shown[0].astype(int) - frame).mean() for frame in shown[1:]) < 0.5
    assert still <= len(chosen) / 3


@pytest.mark.parametrize("name", TASKS)
def test_no_picture_of_a_task_is_on_both_sides(name: str):
    sides = {side: [row for row in rows(name) if row["split"] == side] for side in ("train", "test")}
    items = {side: {item for row in found for item in row["items"].split("; ")} for side, found in sides.items()}
    assert all(item.startswith("emoji ") for found in items.values() for item in found)
    assert not items["train"] & items["test"]
    assert len(items["test"]) >= 40
    assert not {row["video"] for row in sides["train"]} & {row["video"] for row in sides["test"]}


def test_the_general_set_shares_no_picture_with_any_task():
    tasks = {item for name in TASKS for row in rows(name) for item in row["items"].split("; ")}
    general = {item for row in rows("general") for item in row["items"].split("; ") if item.startswith("emoji ")}
    assert general
    assert not tasks & general


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_balanced_and_the_same_on_both_sides(name: str):
    counts = {side: Counter(answer(r) for r in rows(name) if r["split"] == side) for side in ("train", "test")}
    assert set(counts["train"]) == set(counts["test"])
    for found in counts.values():
        assert max(found.values()) <= 0.26 * sum(found.values())
    questions = {json.loads(row["conversations"])[0]["value"] for row in rows(name)}
    assert len(questions) >= 2


@pytest.mark.parametrize("name", ["motion", "speed"])
def test_no_single_frame_gives_the_answer_away(name: str):
    """Where on the frame something is at any one moment says no more of the answer than chance: the frames' mean, answer by
    answer, is the same whatever the moment."""
    found = [row for row in rows(name) if row["split"] == "train"]
    if name == "speed":  # of one emoji: three paces; the races' lanes are alike by construction
        found = [row for row in found if answer(row) in ("faster and faster", "slower and slower", "at one pace")]
    for moment in (0.0, 0.5, 1.0):
        ink: dict[str, list[np.ndarray]] = {}
        for row in found:
            shown, _, _ = frames(row["video"])
            frame = shown[round(moment * (len(shown) - 1))].astype(float).mean(axis=2)
            ground = np.median(frame)
            weight = np.abs(frame - ground) > 12
            ys, xs = np.nonzero(weight)
            # Places go round: the mean direction on the circle, not the mean place.
            turn = 2 * np.pi / 112
            ink.setdefault(answer(row), []).append(
                np.array(
                    [
                        np.cos(xs * turn).mean(),
                        np.sin(xs * turn).mean(),
                        np.cos(ys * turn).mean(),
                        np.sin(ys * turn).mean(),
                    ]
                )
            )
        groups = [np.stack(v) for v in ink.values()]
        between = np.stack([g.mean(axis=0) for g in groups])
        error = np.stack([g.std(axis=0) / len(g) ** 0.5 for g in groups])
        assert np.abs((between - between.mean(axis=0)) / error).max() < 4, moment


def test_the_packs_are_small_and_recorded():
    provenance = json.loads((PACKS / "provenance.json").read_text())
    assert set(provenance["sets"]) == {*TASKS, "general"} == {p.stem for p in PACKS.glob("*.parquet")}
    for name, record in provenance["sets"].items():
        assert sha256_file(PACKS / f"{name}.parquet") == record["sha256"], name
    attribution = (PACKS / "ATTRIBUTION.md").read_text()
    assert all(source["package"] in attribution for source in provenance["sources"])
    assert sum(p.stat().st_size for p in PACKS.iterdir()) <= 7_500_000


def test_the_suite_names_the_packs():
    suite = load_suite("video")
    assert [task["name"] for task in suite["tasks"]] == list(TASKS)
    assert [probe["name"] for probe in suite["probes"]] == ["general"]
    for spec in (*suite["tasks"], *suite["probes"]):
        assert (ROOT / "src/keeplora/suites" / spec["path"]).is_file()


def test_the_scripts_write_every_frame_as_it_was_drawn():
    pytest.importorskip("av")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from video_clips import Pose, decode, draw_frame, encode, sampled
    finally:
        sys.path.pop(0)
    from PIL import Image

    ground, square = Image.new("RGB", (112, 112), "white"), Image.new("RGBA", (40, 40), "red")
    drawn = [draw_frame(ground, [Pose(square, 56 + 8 * i, 56, 40)]) for i in range(16)]
    read = decode(encode(drawn))
    assert len(read) == 16
    assert max(np.abs(a.astype(int) - np.asarray(b)).mean() for a, b in zip(read, drawn, strict=True)) < 4
    red = [np.asarray(frame)[56, :, 1] < 128 for frame in drawn]
    assert all(row.sum() == 40 for row in red), "what leaves on one side comes in on the other"
    assert sampled(16) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert sampled(24)[-1] == 23
