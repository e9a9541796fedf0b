"""Class folders and tables of video files."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

from picture_files import encode

from keeplora.data import TaskData, load_task
from keeplora.data.sets import PictureSet
from keeplora.data.video import Sampling, VideoError
from keeplora.errors import ConfigError, DataError
from tests.data.clip_files import plain, write_clip

ENDINGS = {"jump": ".mp4", "run": ".webm"}


def levels(label: str, i: int) -> list[float]:
    return (
        [40 + 30 * step + 2 * i for step in range(6)] if label == "jump" else [200 - 20 * step - i for step in range(4)]
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """actions/{train,test}/{jump,run}: three clips to learn from, two to test."""
    for split, count in (("train", 3), ("test", 2)):
        for n, (label, ending) in enumerate(ENDINGS.items()):
            for i in range(count):
                place = tmp_path / "actions" / split / label / f"{i}{ending}"
                write_clip(place, plain(levels(label, i), seed=100 * n + 10 * i + (split == "test")))
    return tmp_path


def load(root: Path, **spec: Any) -> TaskData:
    given = {"name": "actions", "source": "folder", "path": "actions", **spec}
    return load_task(given, root)  # type: ignore[return-value]


def table(root: Path, name: str, header: str, lines: list[str]) -> str:
    (root / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return name


def rows(root: Path, split: str) -> list[str]:
    found = sorted((root / "actions" / split).rglob("*.*"))
    return [f"{path.relative_to(root).as_posix()},{path.parent.name}" for path in found]


def test_folders_of_videos(root: Path) -> None:
    task = load(root)
    assert (task.medium, task.train.medium, task.classes) == ("video", "video", ["jump", "run"])
    assert task.train.labels == [0, 0, 0, 1, 1, 1]
    assert task.test.keys == [f"test/{label}/{i}{ENDINGS[label]}" for label in ENDINGS for i in range(2)]
    assert (task.warnings, task.test.skipped) == ([], 0)
    assert repr(task.train) == "PictureSet(6 videos, 2 classes)"
    assert task.train.where(0).endswith("actions/train/jump/0.mp4")


def test_clips_have_the_frames_that_were_asked_for(root: Path) -> None:
    train = load(root).train
    for index, label, i in ((1, "jump", 1), (5, "run", 2)):
        clip = train.clip(index, Sampling("uniform", frames=3))
        assert [frame.size for frame in clip.frames] == [(48, 40)] * 3
        want = [levels(label, i)[n] for n in ((0, 2, 5) if label == "jump" else (0, 1, 3))]
        found = [float(np.asarray(frame).mean()) for frame in clip.frames]
        assert found == pytest.approx(want, abs=6)
    assert len(train.clip(0, Sampling("fps", frames=8, fps=4)).frames) == 3  # 0.75 s


def test_sets_of_videos_go_to_other_processes(root: Path) -> None:
    train = load(root).train
    again = pickle.loads(pickle.dumps(train))
    sampling = Sampling(frames=2)
    assert again.clip(3, sampling).frames[1].tobytes() == train.clip(3, sampling).frames[1].tobytes()
    part = train.subset([4, 0])
    assert (part.medium, part.keys) == ("video", ["train/run/1.webm", "train/jump/0.mp4"])


def test_fingerprint_is_of_the_bytes(root: Path) -> None:
    first = load(root)
    assert load(root, name="other").fingerprint == first.fingerprint
    again = PictureSet([*first.train.entries], first.train.labels)
    assert again.fingerprint == first.train.fingerprint
    write_clip(root / "actions/train/run/0.webm", plain([10, 20, 30], seed=7))
    changed = load(root)
    assert changed.train.fingerprint != first.train.fingerprint
    assert changed.test.fingerprint == first.test.fingerprint


def test_skipped_items_are_part_of_the_fingerprint(root: Path) -> None:
    test = load(root).test
    counted = PictureSet(test.entries, test.labels, skipped=1)
    assert counted.fingerprint != test.fingerprint
    assert PictureSet(test.entries, test.labels, skipped=2).fingerprint != counted.fingerprint
    plain_one = hashlib.sha256()
    for key, label, index in zip(test.keys, test.labels, range(len(test)), strict=True):
        plain_one.update(json.dumps([key, label, test.digest(index)]).encode() + b"\n")
    assert test.fingerprint == plain_one.hexdigest()  # as it was before anything could be skipped
    assert counted.subset([0]).skipped == 0


def test_tables_name_videos(root: Path) -> None:
    train = table(root, "train.csv", "file,label", rows(root, "train"))
    test = table(root, "test.csv", "clip,label", rows(root, "test"))
    task = load(root, source="table", path=None, train=train, test=test)
    assert (task.medium, task.train.medium, len(task.train), len(task.test)) == ("video", "video", 6, 4)
    folder = load(root)
    assert [task.train.digest(i) for i in range(6)] == [folder.train.digest(i) for i in range(6)]
    with pytest.raises(ConfigError, match="`image_column` and `video_column` are both given"):
        load(root, source="table", path=None, train=train, test=test, image_column="file", video_column="file")


def test_a_named_column_of_videos_may_have_any_ending(root: Path) -> None:
    for file in sorted((root / "actions").rglob("*.mp4")):
        file.rename(file.with_suffix(".bin"))
    train = table(root, "train.csv", "file,label", rows(root, "train"))
    test = table(root, "test.csv", "file,label", rows(root, "test"))
    task = load(root, source="table", path=None, train=train, test=test, video_column="file")
    assert (task.medium, task.test.keys[0]) == ("video", "test/actions/test/jump/0.bin")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_mix_of_pictures_and_videos_is_refused(root: Path, split: str) -> None:
    picture = root / f"actions/{split}/run/frame.png"
    picture.write_bytes(encode(1))
    with pytest.raises(
        DataError, match=r"frame\.png is a picture and .* is a video: a task is of one or the other; take"
    ):
        load(root)


def test_pictures_beside_videos_in_two_tasks_are_fine(root: Path) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = root / "stills" / split / label
            folder.mkdir(parents=True)
            (folder / "x.gif").write_bytes(encode(sum(map(ord, split + label)), "GIF"))  # a picture, as ever
    stills = load(root, name="stills", path="stills")
    assert (stills.medium, load(root).medium) == ("picture", "video")
    assert stills.train.picture(0).size == (12, 10)


def test_one_video_on_both_sides_is_found(root: Path) -> None:
    (root / "actions/test/jump/copy.mp4").write_bytes((root / "actions/train/jump/0.mp4").read_bytes())
    assert "1 video(s) of train are also in test" in " ".join(load(root).warnings)


def test_messages_speak_of_videos(root: Path) -> None:
    write_clip(root / "actions/train/loose.mp4", plain([1, 2]))
    (root / "actions/train/run/notes.txt").write_text("x")
    (root / "actions/test/run/sub").mkdir()
    warnings = " ".join(load(root).warnings)
    assert "1 video(s) outside the class folders ignored" in warnings
    assert "1 file(s) that are not pictures or videos ignored (1 .txt)" in warnings
    (root / "actions/train/empty").mkdir()
    with pytest.raises(DataError, match="'empty' holds no video; add videos or delete the folder"):
        load(root)


def test_a_video_that_is_none_is_refused_by_name(root: Path) -> None:
    (root / "actions/train/jump/0.mp4").write_bytes(encode(3))
    with pytest.raises(VideoError, match=r"train/jump/0\.mp4: .*set `on_error: skip`"):
        load(root)


def test_unreadable_videos_of_a_test_are_counted(root: Path) -> None:
    (root / "actions/test/jump/0.mp4").write_bytes(b"nothing")
    (root / "actions/train/run/1.webm").write_bytes(b"nothing")
    task = load(root, on_error="skip", max_skipped=0.5)
    assert (len(task.test), task.test.skipped) == (3, 1)
    assert (len(task.train), task.train.skipped) == (5, 0)
