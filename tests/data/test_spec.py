from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from picture_files import Tree

from keeplora.data import SOURCES, load_task
from keeplora.errors import ConfigError, KeepLoraError

GOOD = {"name": "pets", "source": "folder", "path": "pets"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "a task needs a `name`"),
        ({"name": "  "}, "a task needs a `name`"),
        ({"source": "foldr"}, "unknown source 'foldr'; did you mean 'folder'"),
        ({"pth": "x"}, "unknown key 'pth' for source 'folder'; did you mean 'path'"),
        ({"image_column": "x"}, "unknown key 'image_column' for source 'folder'"),
        ({"source": "table", "image_colum": "x"}, "did you mean 'image_column'"),
        ({"path": None}, "no pictures named: give `path`"),
        ({"path": ["a"]}, "`path` is .*give text"),
        ({"test": 1.5}, "`test` is 1.5: give a fraction"),
        ({"test": True}, "`test` is True: give a fraction"),
        ({"validation": 0}, "`validation` is 0: give a fraction"),
        ({"max_skipped": 1.5}, "`max_skipped` is 1.5: give a share from 0 to 1"),
        ({"on_error": "ignore"}, "`on_error` is 'ignore' .*raise, skip"),
        ({"duplicates": "warm"}, "did you mean 'warn'"),
        ({"check": "ful"}, "did you mean 'full'"),
        ({"max_train_per_class": 0}, "`max_train_per_class` is 0: give a whole number, 1 or more"),
        ({"max_test_per_class": 2.5}, "`max_test_per_class` is 2.5"),
        ({"max_pixels": 1e12}, "max_pixels is 1000000000000.0: give a whole number"),
        ({"split_seed": -1}, "`split_seed` is -1"),
        ({"classes": "cat"}, "`classes` is 'cat': give a list"),
        ({"classes": ["cat"]}, "at least two classes"),
        ({"classes": ["cat", "cat"]}, "names 'cat' twice"),
        ({"classes": [True, "maybe"]}, "quote it"),
        ({"classes": {"cat": None}}, "a class name must be text"),
        ({"templates": []}, "`templates` is"),
        ({"templates": "a photo"}, r"'a photo' must hold \{\} or \{c\}"),
        ({"templates": ["a {c}", "a {class}"]}, r"'a \{class\}' must hold"),
    ],
)
def test_bad_keys_and_values(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task({**GOOD, **change}, tmp_path)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "folder"),
        ({"source": "llava", "path": "t.csv"}, "file"),
        ({"source": "table", "path": None, "train": "t.csv"}, "table"),
        ({"source": "table", "path": "t.csv"}, "name of that column"),
        ({"source": "table", "path": "s.csv"}, "split's name"),
    ],
)
def test_a_word_that_is_no_split_is_told_what_may_stand_there(split, change, kind, pets: Tree) -> None:
    picture = next(path for path in pets.root.rglob("*") if path.is_file()).relative_to(pets.root)
    (pets.root / "t.csv").write_text(f"image,label\n{picture},cat\n")
    (pets.root / "s.csv").write_text(f"image,label,split\n{picture},cat,train\n")
    spec = {key: value for key, value in {**GOOD, **change, split: "lots"}.items() if value is not None}
    with pytest.raises(KeepLoraError) as caught:
        load_task(spec, pets.root)
    assert "lots" in str(caught.value)
    assert str(caught.value).endswith(f"; `{split}` takes a {kind}, or a share to hold out of training, such as 0.2")


def test_templates_and_licence_arrive(pets: Tree) -> None:
    task = load_task({**GOOD, "templates": ["a {}", "b {c}"], "licence": "CC0-1.0"}, pets.root)
    assert (task.templates, task.licence) == (["a {}", "b {c}"], "CC0-1.0")
    assert load_task({**GOOD, "templates": "a {}"}, str(pets.root)).templates == ["a {}"]


def test_none_means_absent_and_folder_is_the_default(pets: Tree) -> None:
    spec = {"name": "pets", "path": "pets", "classes": None, "test": None, "max_pixels": None, "validation": None}
    assert len(load_task(spec, pets.root).train) == 8


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_reads_alike(source: str) -> None:
    module = importlib.import_module(SOURCES[source][0])
    assert list(inspect.signature(module.read).parameters) == ["spec", "base_dir", "probe"]
