"""Coming from PEFT, choosing settings, questions: the code runs, the numbers are those of the pages they are taken from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.documents import ROOT, blocks, run_block

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DOCS = ROOT / "docs"


def test_coming_from_peft(here: Path) -> None:
    namespace: dict[str, Any] = {}
    to_run = [block for block in blocks(DOCS / "migrating-from-peft.md") if block.runs]
    assert len(to_run) == 5
    for block in to_run:
        run_block(block, here, namespace)
    kept, accuracy, loaders = namespace["kept"], namespace["accuracy"], namespace["loaders"]
    assert type(kept) is type(namespace["plain"])
    assert not any("lora" in name for name, _ in kept.named_parameters())
    assert all(accuracy(kept, loader) > 60 for loader in loaders.values())
    old, new = namespace["learner"].records
    assert all(torch.count_nonzero(factors.B) == 0 for factors in old.factors.values())
    assert any(torch.count_nonzero(factors.B) > 0 for factors in new.factors.values())


def test_the_table_of_names_is_of_fields_that_there_are() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    from keeplora import KeepLoraConfig

    text = (DOCS / "migrating-from-peft.md").read_text(encoding="utf-8")
    theirs, ours = {f.name for f in fields(LoraConfig)}, {f.name for f in fields(KeepLoraConfig)}
    shared = re.search(r"`LoraConfig\(([\w, ]+)\)`", text)
    assert shared is not None
    assert set(shared[1].split(", ")) <= theirs & ours
    dropped = {
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "init_lora_weights",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "bias",
    }
    assert all(f"`{name}`" in text for name in dropped)
    assert dropped <= theirs
    assert not dropped & ours
    assert {"free_modules", "gamma", "schedule"} <= ours


def numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])[+-]?\d+\.\d+(?![\w.])", text.replace("−", "-")))


@pytest.mark.parametrize("page", ["choosing-settings.md", "faq.md"])
def test_numbers_are_those_of_the_page_that_measured_them(page: str) -> None:
    """A figure with a decimal point is a setting of the presets, or stands on a page of evidence too."""
    evidence = numbers(
        "".join(
            (DOCS / name).read_text(encoding="utf-8") for name in ("results.md", "speed.md", "audit.md", "analyze.md")
        )
    )
    settings = {"0.85", "0.2", "0.6", "0.99", "0.95", "0.04", "0.3", "3.2"}  # defaults, γ², and Proposition 3.2
    rounded = {"1.4"}  # 1.43 % on the page of speed
    stated = numbers((DOCS / page).read_text(encoding="utf-8"))
    assert stated - settings - rounded <= evidence | {n.lstrip("+-") for n in evidence}, "not on any page of evidence"


def test_defaults_that_are_stated_are_those_there_are() -> None:
    from keeplora import KeepLoraConfig

    config, text = KeepLoraConfig(), (DOCS / "choosing-settings.md").read_text(encoding="utf-8")
    assert config.energy_weights == {"vision": 0.85, "text": 0.2, "default": 0.6}
    assert "0.85 vision, 0.2 text (the reference's), 0.6 elsewhere" in text
    assert (config.energy_features, config.gamma, config.r, config.lora_alpha) == (0.99, 0.2, 16, 16.0)
    assert "With the default 0.99" in text
    assert "Leave 0.2." in text
