"""Streams of pictures: order, blocks, positions, ranks, classes, and what is said where something is wrong."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from stream_files import NAMES, parquet, questions, tar

from keeplora.data import load_task
from keeplora.data import streams as streams_module
from keeplora.data.sets import Entry
from keeplora.data.streams import ROWS, Reader, SampleStream, SpanBytes
from keeplora.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def quiet_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("keeplora.data.remote.FIRST_WAIT", 0.0)
    datasets.disable_progress_bars()


def load(root: Path, probe: bool = False, path: str = "animals", **spec: Any) -> Any:
    spec = {"source": "datasets", "streaming": {"samples": 10}, **spec}
    return load_task({"name": "animals", "path": path, **spec}, root, probe=probe)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    parquet(tmp_path / "animals", {"train": [4, 3, 5], "test": [6]})
    return tmp_path


def numbers(reader: Reader, n: int = 100) -> list[int]:
    return [sample.number for sample in reader.take(n)]


def test_a_task_has_a_stream_to_learn_and_a_set_to_test(animals: Path) -> None:
    task = load(animals)
    assert isinstance(task.train, SampleStream)
    assert task.classes == ["zebra", "sea lion", "owl"]
    assert (len(task.train), task.train.shards) == (10, 3)
    (first, *_) = task.train.reader(None).take(2)
    assert isinstance(first.item, Entry)
    assert (first.number, first.label, task.train.where(2 * ROWS + 1)[-14:]) == (0, 0, "shard 2, row 1")
    # the test set lies on the local disk by now
    assert task.test.labels == [0, 1, 2] * 2
    assert isinstance(task.test.entries[0].source, SpanBytes)
    assert task.test.picture(4).size == (12, 10)
    assert pickle.loads(pickle.dumps(task.test)).picture(0).tobytes() == task.test.picture(0).tobytes()
    probe = load(animals, probe=True)
    assert (len(probe.train), len(probe.test)) == (0, 6)
    assert len(load(animals, streaming={"samples": 3, "test_samples": 4}).test) == 4


def test_the_fingerprint_tells_one_stream_from_another(animals: Path) -> None:
    before = load(animals).fingerprint
    assert load(animals).fingerprint == before
    assert load(animals, streaming={"samples": 9}).fingerprint != before
    parquet(animals / "animals", {"train": [4, 4]})
    assert load(animals).fingerprint != before


def test_passes_shuffle_shards_and_go_on_from_any_place(animals: Path) -> None:
    stream = load(animals).train
    natural = [shard * ROWS + row for shard, count in enumerate((4, 3, 5)) for row in range(count)]
    assert numbers(stream.reader(None)) == natural
    orders = {tuple(numbers(stream.reader(seed))) for seed in range(12)}
    assert len(orders) == 6  # of three shards
    for seed in (None, 3):
        whole = numbers(stream.reader(seed))
        for cut in range(13):
            reader = stream.reader(seed)
            assert numbers(reader, cut) == whole[:cut]
            kept = json.loads(json.dumps(reader.position))
            assert numbers(stream.reader(seed, kept), 4) == whole[cut : cut + 4]
            assert numbers(reader, 4) == whole[cut : cut + 4]  # and so does the one that was looked at


def test_ranks_have_shards_of_their_own(animals: Path) -> None:
    stream = load(animals, streaming={"samples": 10, "split_by": "shards"}).train
    parts = [numbers(stream.reader(5, part=(rank, 3))) for rank in range(3)]
    assert sorted(n for part in parts for n in part) == sorted(numbers(stream.reader(None)))
    assert all(len({n // ROWS for n in part}) == 1 for part in parts)
    with pytest.raises(DataError, match=r"3 shard\(s\) for 4 ranks.*split_by: samples"):
        stream.reader(5, part=(0, 4))


def test_every_kind_of_file(tmp_path: Path) -> None:
    tar(tmp_path / "tars/train-0.tar", 6)
    tar(tmp_path / "tars/test-0.tar", 3)
    options = {"label_column": "cls", "classes": ["0", "1", "2"]}
    task = load(tmp_path, path="tars", streaming={"samples": 6}, **options)
    assert [s.label for s in task.train.reader(None).take(6)] == [0, 1, 2] * 2
    assert task.test.picture(0).size == (12, 10)
    with pytest.raises(DataError, match="a stream is not cut"):
        load(tmp_path, path="tars/train-0.tar", **options)
    parquet(tmp_path / "a", {"train": [6], "test": [3]})
    saved = datasets.load_dataset(str(tmp_path / "a"))
    saved.save_to_disk(tmp_path / "saved")
    task = load(tmp_path, path="saved", streaming=True)
    assert (len(task.train), task.train.shards) == (6, 6)


def test_classes_must_be_told(tmp_path: Path) -> None:
    parquet(tmp_path / "animals", {"train": [6], "test": [3]}, typed=False)
    with pytest.raises(
        ConfigError, match=r"'animal' does not tell its classes.*list them as\s+`classes: \[cat, dog\]`"
    ):
        load(tmp_path, label_column="animal")
    task = load(tmp_path, label_column="animal", classes=["owl", "zebra", "sea_lion"])
    assert task.classes == ["owl", "zebra", "sea lion"]
    assert [s.label for s in task.train.reader(None).take(3)] == [1, 2, 0]
    assert task.test.labels == [1, 2, 0]
    renamed = load(tmp_path, label_column="animal", classes={"owl": "an owl", "zebra": "a zebra", "sea_lion": "a seal"})
    assert renamed.classes == ["an owl", "a zebra", "a seal"]
    short = {"label_column": "animal", "classes": ["owl", "zebra"]}
    with pytest.raises(DataError, match=r"shard 0, row 1: label 'sea_lion' is not in `classes`"):
        load(tmp_path, **short)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"streaming": True}, ConfigError, r"does not tell how many samples it has.*streaming: \{samples: N\}"),
        ({"streaming": {"samples": 0}}, ConfigError, "`samples` in `streaming` is 0"),
        ({"streaming": {"sample": 3}}, ConfigError, "unknown key 'sample' in `streaming`; did you mean 'samples'"),
        (
            {"streaming": {"samples": 3, "split_by": "shard"}},
            ConfigError,
            "`split_by` in `streaming` is 'shard'; did you mean",
        ),
        ({"test": 0.2}, ConfigError, "`test: 0.2` would cut a stream"),
        ({"max_train_per_class": 3}, ConfigError, "`max_train_per_class` needs to know every sample"),
        ({"duplicates": "drop"}, ConfigError, "`duplicates: drop` needs to know every sample"),
        ({"source": "folder"}, ConfigError, "unknown key 'streaming' for source 'folder'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(animals: Path, spec: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load(animals, **spec)


def test_a_network_that_fails_is_tried_again_and_then_named(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = load(animals).train
    whole = numbers(stream.reader(None))
    failures = Counter[str]()
    real = datasets.IterableDataset.__iter__

    def flaky(self: Any) -> Any:
        for i, row in enumerate(real(self)):
            if i == 2 and failures["left"] > 0:
                failures["left"] -= 1
                raise TimeoutError("no answer")
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", flaky)
    failures["left"] = 3
    reader = stream.reader(None)
    assert numbers(reader, 5) + numbers(reader, 7) == whole  # nothing twice, nothing left out
    failures["left"] = 4
    with pytest.raises(
        DataError, match=r"split 'train', shard 0, after row 0: cannot be read on \(TimeoutError: no answer\)"
    ):
        stream.reader(None).take(5)


def test_unusable_pictures_are_named_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "animals", {"train": [5], "test": [3]})
    bad = datasets.Dataset.from_parquet(str(tmp_path / "animals/train-00.parquet")).cast_column(
        "photo", datasets.Image(decode=False)
    )
    held = [row if i != 2 else {**row, "photo": {"bytes": b"no picture", "path": None}} for i, row in enumerate(bad)]
    features = datasets.Features({"photo": datasets.Image(), "animal": datasets.ClassLabel(names=list(NAMES))})
    datasets.Dataset.from_list(held, features=features).to_parquet(tmp_path / "animals/train-00.parquet")
    stream = load(tmp_path, on_error="skip").train
    assert numbers(stream.reader(None)) == [0, 1, 3, 4]
    assert stream.skipped == 1
    monkeypatch.setattr(streams_module, "LOOK_AFTER", 5)
    with pytest.raises(
        DataError, match=r"1 of 5 samples cannot be used, more than the share of 0.01 that `max_skipped`"
    ):
        stream.reader(None).take(5)


def test_questions_stream_from_json_lines(tmp_path: Path) -> None:
    questions(tmp_path / "quiz", 7, 4)
    spec = {"name": "quiz", "source": "vqa-datasets", "path": "quiz", "prompt": "One word."}
    task = load_task({**spec, "streaming": {"samples": 7}}, tmp_path)
    (first, *_) = task.train.reader(None).take(7)
    assert first.item.turns[0].text == "<image>\nWhat is it?\nOne word."
    assert first.item.references == ("zebra",)
    assert first.item.pictures[0].read()
    assert [c.references[0] for c in task.test.conversations] == ["zebra", "sea_lion", "owl", "zebra"]
    assert task.test.pictures(2)[0].size == (12, 10)


def test_the_local_copy_of_a_test_split_goes_with_the_process(animals: Path) -> None:
    path = load(animals).test.entries[0].source.path
    assert path.is_file()
    assert oct(os.stat(path.parent).st_mode & 0o777) == "0o700"
