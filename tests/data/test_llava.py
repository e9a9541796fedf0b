from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from picture_files import encode

from keeplora.data import ConversationTask, load_task
from keeplora.data.conversations import Turn
from keeplora.errors import ConfigError, DataError, KeepLoraError


def talk(number: int, question: str = "What is it?", answer: str = "a cat", **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"n{number}", "image": f"{number}.png", "conversations": turns, **keys}


def flat(number: int, **keys: Any) -> dict[str, Any]:
    return {"question_id": number, "image": f"{number}.png", "text": "What is it?", "answer": "a cat", **keys}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(30):
        (tmp_path / f"pictures/{number}.png").write_bytes(encode(number))
    write(tmp_path / "train.json", [talk(n) for n in range(10)])
    write(tmp_path / "test.json", [flat(n) for n in range(20, 25)])
    return tmp_path


def write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def load(root: Path, *, probe: bool = False, **keys: Any) -> ConversationTask:
    spec = {"name": "t", "source": "llava", "train": "train.json", "test": "test.json", "images": "pictures", **keys}
    task = load_task(spec, root, probe=probe)
    assert isinstance(task, ConversationTask)
    return task


def test_the_files_of_the_benchmarks(root: Path):
    task = load(root, scorer="contains", max_new_tokens=7, licence="MIT", expect={"train": 10, "test": 5})
    assert (len(task.train), len(task.test), task.validation) == (10, 5, None)
    assert (task.scorer, task.max_new_tokens, task.prompt, task.licence) == ("contains", 7, None, "MIT")
    assert task.warnings == []
    told = task.test.conversation(0)
    assert told.key == "test/20"
    assert told.turns == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a cat"))
    assert told.references == ("a cat",)
    assert told.where == f"{root}/test.json, entry 1 (id 20)"
    assert task.train.keys[3] == "train/n3"
    assert task.train.pictures(3)[0].tobytes() == load(root).train.pictures(3)[0].tobytes()
    assert len(told.digests) == 1


@pytest.mark.parametrize(
    ("entry", "turns", "references"),
    [
        ({"image": "1.png", "question": "Q", "answer": 3}, ["<image>\nQ", "3"], ("3",)),
        ({"question": "Q", "answers": ["b", "a", "a"]}, ["Q", "a"], ("b", "a", "a")),
        ({"question": "Q", "answers": [{"answer": "yes"}, {"answer": "no"}]}, ["Q", "yes"], ("yes", "no")),
        ({"image": ["1.png", "2.png"], "text": "Q", "answer": "A"}, ["<image>\n<image>\nQ", "A"], ("A",)),
        (
            {"image": "1.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            ["<image>\nQ", "A"], ("A",),
        ),
        (
            {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            ["Q", "A"], ("A",),
        ),
        ({"conversations": [{"from": "human", "value": "Q"}], "answer": "A"}, ["Q", "A"], ("A",)),
        (
            {
                "images": ["1.png", "2.png"], "references": ["A", "a"],
                "conversations": [
                    {"from": "system", "value": "S"}, {"from": "human", "value": "Is <image> or"},
                    {"from": "gpt", "value": "Yes"}, {"from": "human", "value": "<image> it?"}, {"from": "gpt", "value": "A"},
                ],
            },
            ["S", "Is <image> or", "Yes", "<image> it?", "A"], ("A", "a"),
        ),
    ],
)  # fmt: skip
def test_every_published_form(root: Path, entry: dict[str, Any], turns: list[str], references: tuple[str, ...]):
    write(root / "test.json", [entry])
    told = load(root).test.conversation(0)
    assert [turn.text for turn in told.turns] == turns
    assert told.references == references
    assert told.key == "test/1"
    assert len(told.pictures) == "".join(turns).count("<image>")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("x", "'x' is no JSON object"),
        ({"id": 4, "text": "Q"}, r" \(id 4\): has no answer among its keys id, text"),
        ({"answer": "A"}, "has no question among its keys answer"),
        ({"text": ["Q"], "answer": "A"}, "the question is .*give text"),
        ({"text": "Q", "answer": True}, "an answer is True; give text"),
        ({"text": "Q", "answer": ["A", " "]}, "an answer is ' '"),
        ({"video": "http://a/b.mp4", "text": "Q", "answer": "A"}, "download the videos first"),
        ({"video": 3, "text": "Q", "answer": "A"}, "a video is 3; give the path of a file"),
        ({"text": "<video> Q", "answer": "A"}, r"1 '<video>' in the text but 0 video\(s\)"),
        ({"conversations": "x"}, "`conversations` is 'x'; give a list"),
        ({"conversations": ["x"]}, "a turn is 'x'"),
        ({"conversations": [{"from": "robot", "value": "Q"}]}, "from 'robot'; it must be from human, gpt or system"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a turn of human says 3"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "ends without an answer"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "turn 1 is the assistant's"),
        ({"image": 3, "text": "Q", "answer": "A"}, "an image is 3"),
        ({"image": "http://a/b.png", "text": "Q", "answer": "A"}, "is an address, not a file"),
        (
            {"image": ["1.png", "2.png"], **talk(1) | {"image": ["1.png", "2.png"]}},
            "1 '<image>' in the text but 2 picture",
        ),
        (talk(1) | {"image": None}, "1 '<image>' in the text but 0 picture"),
    ],
)
def test_a_bad_entry_is_named(root: Path, entry: Any, message: str):
    write(root / "test.json", [entry])
    with pytest.raises(DataError, match=f"task 't': {root}/test.json, entry 1.*{message}"):
        load(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "test.json, line 1: not JSON"),
        ("[]", "test.json: holds no entries for test"),
        ('{"images": [], "info": 1}', "holds dict with images, info, not a list"),
        ("\xff", "byte 0 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_list(root: Path, text: str, message: str):
    (root / "test.json").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"train": "trian.json"}, DataError, "no such file; did you mean 'train.json'"),
        ({"images": "picture"}, DataError, "no such folder; did you mean 'pictures'"),
        ({"classes": ["a", "b"]}, ConfigError, "unknown key 'classes' for source 'llava'"),
        ({"scorrer": "x"}, ConfigError, "did you mean 'scorer'"),
        ({"max_train": 0}, ConfigError, "`max_train` is 0"),
        ({"max_new_tokens": "x"}, ConfigError, "`max_new_tokens` is 'x'"),
        ({"prompt": 3}, ConfigError, "`prompt` is 3: give text"),
        ({"expect": {"classes": 3}}, ConfigError, "unknown key 'classes' in `expect`"),
        ({"train": None}, ConfigError, "no training file named"),
        ({"source": "lava"}, ConfigError, "did you mean 'llava'"),
    ],
)
def test_bad_keys(root: Path, keys: dict[str, Any], error: type[KeepLoraError], message: str):
    with pytest.raises(error, match=message):
        load(root, **keys)


def test_json_lines_and_usual_names(root: Path):
    lines = "\n".join(json.dumps(flat(n)) for n in range(20, 23))
    (root / "pictures/test.jsonl").write_text(lines)
    write(root / "pictures/train.json", [talk(n) for n in range(4)])
    write(root / "pictures/val.json", [talk(n) for n in range(5, 7)])
    spec = {"name": "t", "source": "llava", "path": "pictures"}
    task = load_task(spec, root)
    assert isinstance(task, ConversationTask)
    assert task.validation is not None
    assert (len(task.train), len(task.test), len(task.validation)) == (4, 3, 2)
    write(root / "pictures/train.json", [{"id": 1}])
    assert len(load_task(spec, root, probe=True).train) == 0  # a probe's training file is not even read
    assert load_task(spec, root, probe=True).test.keys == ["test/20", "test/21", "test/22"]


def test_a_probe_needs_a_test_file_alone(root: Path):
    task = load(root, probe=True, train=None)
    assert (len(task.train), len(task.test)) == (0, 5)
    assert len(load(root, probe=True, test=None).test) == 10


def test_the_prompt_ends_every_question(root: Path):
    write(root / "test.json", [flat(20), flat(21, text="What is it?\nBe brief.")])
    task = load(root, prompt="Be brief.")
    texts = {c.turns[0].text for s in (task.train, task.test) for c in s.conversations}
    assert texts == {"<image>\nWhat is it?\nBe brief."}
    assert task.prompt == "Be brief."
    assert load(root, prompt=" Be brief.").train.conversation(0).question == "What is it? Be brief."
    write(root / "test.json", [{"image": "1.png", "caption": "a cat"}])
    assert load(root, prompt="Describe it.").test.conversation(0).turns[0].text == "<image>\nDescribe it."


def test_equal_ids_are_told_apart(root: Path):
    write(root / "train.json", [talk(1), talk(1, answer="a dog"), talk(2)])
    write(root / "test.json", [flat(20), flat(21, question_id=20)])
    task = load(root)
    assert task.train.keys == ["train/n1", "train/n1#2", "train/n2"]
    assert task.warnings == ["1 id(s) of test are there more than once; each entry counts"]


def test_captions_of_one_picture_are_references_of_one_item(root: Path):
    write(root / "train.json", [talk(1, answer="a cat"), talk(1, answer="a small cat")])
    write(root / "test.json", [flat(20), flat(20, answer="a small cat"), flat(21), flat(20, text="Where?")])
    task = load(root, scorer="caption")
    assert [c.references for c in task.test.conversations] == [("a cat", "a small cat"), ("a cat",), ("a cat",)]
    assert len(task.train) == 2  # every caption is taught
    assert len(load(root, scorer="exact").test) == 4


def test_references_from_a_file_of_captions(root: Path):
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(20, 25)],
        "annotations": [{"image_id": n, "caption": f" caption {n} {m}"} for n in range(20, 25) for m in range(3)],
    }
    write(root / "captions.json", coco)
    task = load(root, scorer="caption", references="captions.json")
    assert task.test.conversation(1).references == ("caption 21 0", "caption 21 1", "caption 21 2")
    assert task.test.conversation(1).turns[-1].text == "a cat"
    coco["annotations"] = coco["annotations"][3:]
    write(root / "captions.json", coco)
    with pytest.raises(DataError, match=r"entry 1 \(id 20\): no caption of 20.png in captions.json"):
        load(root, references="captions.json")
    write(root / "captions.json", {"images": [{"id": 1}], "annotations": []})
    with pytest.raises(DataError, match=r"captions\.json: not COCO captions"):
        load(root, references="captions.json")


def test_samples_are_the_same_every_time(root: Path):
    task = load(root, max_train=4, max_test=2, expect={"train": 10, "test": 5})
    assert (len(task.train), len(task.test), task.warnings) == (4, 2, [])
    assert load(root, max_train=4, max_test=2).train.keys == task.train.keys
    assert load(root, max_train=6).train.keys != task.train.keys
    assert set(task.train.keys) < set(load(root, max_train=6).train.keys)
    assert load(root, max_train=4, split_seed=3).train.keys != task.train.keys
    for number in range(10):  # pictures that are not used are not looked at
        if f"train/n{number}" not in task.train.keys:
            (root / f"pictures/{number}.png").unlink()
    assert load(root, max_train=4).train.keys == task.train.keys


def test_without_a_test_file_whole_pictures_are_held_out(root: Path):
    write(root / "train.json", [talk(n // 2, f"Question {n}?") for n in range(20)])
    task = load(root, test=0.3)
    assert (len(task.train), len(task.test), task.warnings) == (14, 6, [])
    sides = [{s.conversation(i).digests for i in range(len(s))} for s in (task.train, task.test)]
    assert not sides[0] & sides[1]
    assert load(root, test=None).warnings == [
        "no test entries were named: 20% (split_seed 0) are held out; set `test` to choose"
    ]
    assert len(load(root, test=0.3, validation=0.2).validation or ()) == 2
    write(root / "train.json", [talk(1, f"Question {n}?") for n in range(4)])
    with pytest.raises(DataError, match=r"nothing can be held out .* 4 entries about 1 file\(s\)"):
        load(root, test=None)


def test_an_unusable_picture_stops_or_is_skipped(root: Path):
    (root / "pictures/3.png").write_bytes(b"")
    (root / "pictures/21.png").unlink()
    with pytest.raises(DataError, match=r"pictures/3.png \(.*train.json, entry 4 \(id 'n3'\)\): the file is empty"):
        load(root)
    task = load(root, on_error="skip", max_skipped=0.9)
    assert (len(task.train), len(task.test)) == (9, 4)
    assert [warning.split(":")[0] for warning in task.warnings] == [
        "1 unusable picture(s) of train skipped", "1 entries of train left out with their unusable files",
        "1 unusable picture(s) of test skipped", "1 entries of test score 0 for their unusable files",
    ]  # fmt: skip
    assert [c.key for c in task.test.skipped] == ["test/21"]
    assert task.train.skipped == []
    with pytest.raises(DataError, match=r"1 of the 10 pictures of train cannot be used, more than the share of 0.01"):
        load(root, on_error="skip")
    for number in range(20, 25):
        (root / f"pictures/{number}.png").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no usable entry is left in test"):
        load(root, on_error="skip", max_skipped=1)


def test_the_same_question_about_the_same_picture_on_both_sides(root: Path):
    (root / "pictures/20.png").write_bytes(encode(2))  # the picture of n2 under another name
    (root / "pictures/21.png").write_bytes(encode(3))
    turns = talk(3)["conversations"] + [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "left"}]
    write(root / "train.json", [talk(2), talk(3) | {"conversations": turns}, talk(4, "Else?")])
    write(root / "test.json", [flat(20), flat(21), flat(4)])
    (warning,) = load(root).warnings
    assert warning.startswith("2 question(s) of train are also in test, which flatters the result: ")
    assert "entry 1 (id 'n2')" in warning
    assert "entry 2 (id 'n3')" in warning  # every question of a training conversation counts
    assert load(root, duplicates="drop").train.keys == ["train/n4"]
    with pytest.raises(DataError, match=r"2 question\(s\) of train are also in test: .*`duplicates: drop`"):
        load(root, duplicates="refuse")


def test_counts_that_are_not_the_published_ones(root: Path):
    assert load(root, expect={"train": 11, "test": 5}).warnings == [
        "not paper-comparable: train has 10 entries where the published protocol has 11"
    ]
