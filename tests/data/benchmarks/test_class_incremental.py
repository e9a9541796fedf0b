from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from picture_files import Tree

from keeplora.data import TaskData, load_task
from keeplora.data.benchmarks.class_incremental import part_of
from keeplora.data.sets import Entry, HeldBytes
from keeplora.data.spec import RawTask
from keeplora.errors import ConfigError, DataError

LETTERS = "a b c d e f g"


def load(root: Path, probe: bool = False, **spec: Any) -> TaskData:
    return load_task({"name": "letters", "path": "letters", **spec}, root, probe=probe)


@pytest.fixture
def letters(tree: Tree) -> Path:
    """Seven classes, 3 training and 2 test pictures each."""
    tree.classes("letters/train", LETTERS, 3)
    tree.classes("letters/test", LETTERS, 2)
    return tree.root


def raw(count: int) -> RawTask:
    names = [str(n) for n in range(count)]
    return RawTask({"train": [Entry(n, n, n, HeldBytes(b"")) for n in reversed(names)]}, class_order=names)


# --- the cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "of", "sizes"), [(100, 10, [10] * 10), (7, 3, [3, 2, 2]), (11, 4, [3, 3, 3, 2])])
@pytest.mark.parametrize("seed", [None, 1993])
def test_parts_cover_the_classes_once(count: int, of: int, sizes: list[int], seed: int | None) -> None:
    parts = [part_of(raw(count), index, of, seed).class_order or [] for index in range(1, of + 1)]
    assert [len(part) for part in parts] == sizes
    every = [name for part in parts for name in part]
    assert sorted(every, key=int) == raw(count).class_order
    assert (every == raw(count).class_order) is (seed is None)


def test_seed_1993_is_the_order_of_the_field() -> None:
    # the first ten of CIFAR-100 in iCaRL-style protocols (numpy.random.seed(1993); permutation(100))
    wanted = [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    first = part_of(raw(100), 1, 10, 1993)
    assert first.class_order == [str(number) for number in wanted]
    # the pictures keep the order of the source
    assert [int(entry.label) for entry in first.splits["train"]] == sorted(wanted, reverse=True)


def test_without_an_order_classes_are_sorted() -> None:
    task = raw(12)
    task.class_order = None
    assert part_of(task, 1, 6, None).class_order == ["0", "1"]
    assert part_of(task, 6, 6, None).class_order == ["10", "11"]  # numbers by value


def test_a_task_needs_two_classes() -> None:
    assert part_of(raw(8), 4, 4, None).class_order == ["6", "7"]
    with pytest.raises(DataError, match=r"7 classes cannot be cut into 4 tasks of two classes or more; set .* to 3 or"):
        part_of(raw(7), 1, 4, None)
    with pytest.raises(DataError, match="1 classes cannot be cut into 1 tasks"):
        part_of(raw(1), 1, 1, None)


# --- through the loader -----------------------------------------------------------------------------------------------


def test_parts_of_a_folder(letters: Path) -> None:
    tasks = [load(letters, part={"index": index, "of": 3}) for index in (1, 2, 3)]
    assert [task.classes for task in tasks] == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    assert tasks[1].train.labels == [0, 0, 0, 1, 1, 1]
    assert tasks[1].test.labels == [0, 0, 1, 1]
    assert all(key.split("/")[1] in "de" for key in tasks[1].train.keys + tasks[1].test.keys)
    assert tasks[1].warnings == []
    assert load(letters, probe=True, part={"index": 2, "of": 3}).classes == ["d", "e"]


def test_a_seeded_part_numbers_its_classes_in_the_shuffled_order(letters: Path) -> None:
    tasks = [load(letters, part={"index": index, "of": 3, "seed": 1}) for index in (1, 2, 3)]
    assert [task.classes for task in tasks] == [["g", "c", "b"], ["a", "e"], ["d", "f"]]
    assert [tasks[0].classes[label] for label in tasks[0].train.labels] == [
        key.split("/")[1] for key in tasks[0].train.keys
    ]


def test_classes_are_applied_before_the_cut(letters: Path) -> None:
    order = list("gfedcba")
    assert load(letters, classes=order, part={"index": 1, "of": 3}).classes == ["g", "f", "e"]
    renamed = load(letters, classes={"a": "ant", "g": "gnu"}, part={"index": 1, "of": 3})
    assert renamed.classes == ["ant", "b", "c"]


def test_only_the_pictures_of_a_part_are_read(letters: Path) -> None:
    (letters / "letters/train/a/0.png").write_bytes(b"rubbish")
    assert load(letters, part={"index": 2, "of": 3}).classes == ["d", "e"]
    with pytest.raises(DataError, match=r"a/0\.png"):
        load(letters, part={"index": 1, "of": 3})


def test_a_part_without_test_pictures_is_cut_like_a_task(tree: Tree) -> None:
    tree.classes("letters", LETTERS, 5)
    task = load(tree.root, part={"index": 3, "of": 3})
    assert task.classes == ["f", "g"]
    assert (len(task.train), len(task.test)) == (8, 2)


def test_an_empty_class_is_told_in_every_part(letters: Path) -> None:
    (letters / "letters/train/h").mkdir()
    with pytest.raises(DataError, match="the class folder 'h' holds no picture"):
        load(letters, part={"index": 1, "of": 3})


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("1/3", "`part` is '1/3': give a mapping with index, of, seed"),
        ({"index": 1}, "it needs `index` and `of`"),
        ({"of": 3}, "it needs `index` and `of`"),
        ({"index": 0, "of": 3}, "`index` in `part` is 0: give a whole number, from 1 to 3"),
        ({"index": 4, "of": 3}, "`index` in `part` is 4: give a whole number, from 1 to 3"),
        ({"index": True, "of": 3}, "`index` in `part` is True"),
        ({"index": 1, "of": 0}, "`of` in `part` is 0: give a whole number, 1 or more"),
        ({"index": 1, "of": 3, "seed": -1}, "`seed` in `part` is -1: give a whole number, from 0 to 4294967295"),
        ({"index": 1, "of": 3, "seed": 2**32}, "`seed` in `part`"),
        ({"index": 1, "of": 3, "sed": 1}, "unknown key 'sed' in `part`; did you mean 'seed'"),
    ],
)
def test_wrong_parts(part: object, told: str, letters: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(letters, part=part)
    assert told in str(error.value)
    assert "task 'letters'" in str(error.value)


def test_too_many_parts_are_refused_for_the_data(letters: Path) -> None:
    with pytest.raises(DataError, match="task 'letters': 7 classes cannot be cut into 4"):
        load(letters, part={"index": 1, "of": 4})


# --- published counts -------------------------------------------------------------------------------------------------


def test_counts_that_differ_from_the_published_ones(letters: Path) -> None:
    assert load(letters, expect={"classes": 7, "train": 21, "test": 14}).warnings == []
    assert load(letters, expect={"classes": 8, "train": 22, "test": 13}).warnings == [
        "not paper-comparable: there are 7 classes where the published protocol has 8",
        "not paper-comparable: train has 21 pictures where the published protocol has 22",
        "not paper-comparable: test has 14 pictures where the published protocol has 13",
    ]
    assert len(load(letters, expect={"test": 13}).warnings) == 1
    # pictures held out for validation are still training pictures of the protocol
    assert load(letters, expect={"train": 21}, validation=0.3).warnings == []
    assert load(letters, probe=True, expect={"train": 22, "test": 13}).warnings == [
        "not paper-comparable: test has 14 pictures where the published protocol has 13"
    ]


@pytest.mark.parametrize(
    "chosen", [{"part": {"index": 1, "of": 3}}, {"max_train_per_class": 2}, {"max_test_per_class": 1}]
)
def test_counts_of_a_chosen_sample_are_not_compared(chosen: dict[str, Any], letters: Path) -> None:
    assert load(letters, expect={"classes": 8, "train": 22, "test": 13}, **chosen).warnings == []


@pytest.mark.parametrize(
    ("expect", "told"),
    [
        (3, "`expect` is 3: give a mapping with classes, train, test"),
        ({"trian": 3}, "unknown key 'trian' in `expect`; did you mean 'train'"),
        ({"train": 0}, "`train` in `expect` is 0: give a whole number, 1 or more"),
        ({"train": "3"}, "`train` in `expect` is '3'"),
    ],
)
def test_wrong_counts(expect: object, told: str, letters: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(letters, expect=expect)
    assert told in str(error.value)
