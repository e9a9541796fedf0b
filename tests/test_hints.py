"""Hints after an unknown key: a handful, the nearest first, of what the page that they name shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keeplora.data import SOURCES, load_task
from keeplora.data.conversation_spec import CONVERSATION_KEYS
from keeplora.data.spec import COMMON_KEYS
from keeplora.errors import HANDFUL, ConfigError, did_you_mean
from keeplora.experiment.config_errors import FILE_ONLY_KEYS, SECTIONS, WRITTEN_KEYS, unknown_key
from keeplora.experiment.config_schema import ExperimentConfig
from keeplora.suites import _PASSED_ON, _TYPES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def told(sentence: str) -> tuple[str | None, list[str], str]:
    """The key that is meant, the others that are named, and the page."""
    meant = re.search(r"did you mean '([^']+)'\?", sentence)
    found = re.search(r"\((?:or|there are) ([^;]*); (docs/\S+\.md) has all\)$", sentence)
    assert found, sentence
    return meant[1] if meant else None, found[1].split(", "), found[2]


def test_a_handful_the_nearest_first():
    names = [f"rank_{k}" for k in range(20)] + ["gamma"]
    meant, others, page = told(did_you_mean("gama", names, "docs/x.md"))
    assert (meant, page) == ("gamma", "docs/x.md")
    assert len(others) == HANDFUL - 1
    meant, others, _ = told(did_you_mean("rank-19", names, "docs/x.md"))
    assert meant == "rank_19"
    assert others[0] == "rank_9"
    meant, others, _ = told(did_you_mean("zzzz", names, "docs/x.md"))
    assert meant is None
    assert len(others) == HANDFUL
    assert did_you_mean("zzzz", ["b", "a"], "docs/x.md") == " (one of: a, b)"


@pytest.mark.parametrize("section", ["", "tuner", "training", "model", "video", "judge"])
def test_a_section_names_no_key_that_keeplora_writes_itself(section):
    path = (section, "zzzz") if section else ("zzzz",)
    _, others, page = told(unknown_key(path).sentence)
    assert page == "docs/formats.md"
    assert len(others) <= HANDFUL
    for key in WRITTEN_KEYS:
        sentence = unknown_key((key[:-1] + "x",)).sentence
        assert key not in sentence
        assert key in ExperimentConfig.model_fields


def test_a_task_names_no_key_that_a_suite_writes(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_task({"name": "a", "source": "folder", "path": "a", "parts": 3}, tmp_path)
    meant, others, page = told(str(caught.value))
    assert meant == "path"
    assert "part" not in others
    assert page == "docs/data.md"


def test_the_pages_have_all_the_keys():
    formats = (
        (DOCS / "formats.md").read_text(encoding="utf-8").split("Every key of an experiment with")[1].split("\n## ")[0]
    )
    named = {key for model in (ExperimentConfig, *SECTIONS.values()) for key in model.model_fields}
    missing = [key for key in named if f"`{key}`" not in formats]
    assert missing == []
    data = (DOCS / "data.md").read_text(encoding="utf-8")
    keys = {
        *COMMON_KEYS,
        *CONVERSATION_KEYS,
        *(key for name in ("folder", "table", "datasets", "llava") for key in SOURCES[name].keys),
    }
    assert [key for key in keys - {"part"} if key not in data] == []
    suites = (DOCS / "suites.md").read_text(encoding="utf-8")
    assert [key for key in (*_TYPES, *_PASSED_ON) if f"`{key}" not in suites] == []
    assert FILE_ONLY_KEYS == ("per_method",)
