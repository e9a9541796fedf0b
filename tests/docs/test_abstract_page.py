"""docs/abstract.md: every number with an interval is a claim, and the figure is of these claims."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType

import pytest
from PIL import Image

from tests.docs.documents import ROOT

PAGE = "docs/abstract.md"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


claims, figure = script("claims"), script("claims_figure")
VALUES = {claim["id"]: claim["value"] for claim in claims.read()}


def test_every_interval_on_the_page_is_a_claim() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    of_page = {c["value"] for c in claims.read() if c["page"] == PAGE or PAGE in c.get("also", ())}
    printed = re.findall(r"[+−-]?\d[\d.]*(?: points)? (?:\[[^\]\n]*\d\]|± [\d.]+)", text)
    assert len(printed) >= 24
    assert [value for value in printed if value not in of_page] == []


def test_each_claim_of_the_abstract_has_a_verdict_and_a_section_with_a_command() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    verdicts = re.findall(r"^\| (\d) \| [^|]+ \| (.+) \|$", text, re.M)
    assert [number for number, _ in verdicts] == [str(n) for n in range(1, 10)]
    sections = re.split(r"^## (?=\d\. )", text, flags=re.M)[1:]
    assert len(sections) == len(verdicts)
    above = False
    for (number, verdict), section in zip(verdicts, sections, strict=True):
        assert section.startswith(f"{number}. ")
        assert re.search(r"\*\*(holds|does not hold|not decided)", verdict)
        assert re.search(r"\*\*(holds|does not hold|not decided|mixed)", section, re.I), number
        assert re.search(r"^\| .+ \| .+ \| .+ \|$", section, re.M), number
        assert re.search(r"^ {4}(keeplora|python) ", section, re.M), number
        own = re.search(r"^!\[.+\]\(images/.+\.png\)$", section, re.M) is not None
        drawn = any(f"(claim {number})" in title for title in figure.PANELS) or (
            above and "the figure above" in section
        )
        assert own or drawn, f"claim {number} has no figure"
        above = own


def test_the_figure_is_of_these_claims() -> None:
    with Image.open(figure.IMAGE) as image:
        drawn = json.loads(image.info["Description"])
    assert drawn == json.loads(json.dumps(figure.rows(VALUES))), "run python scripts/claims_figure.py"


def test_what_is_better_when_less_is_turned() -> None:
    panels = figure.rows({**VALUES, "abstract.forgetting": "-9.2 [-13.6, −4.8]"})
    assert panels["Keeping what was learned (claim 5)"][0][1:] == (9.2, 4.8, 13.6)
    panels = figure.rows({**VALUES, "abstract.inference.clip": "1.020 [0.99, 1.050]"})
    assert panels["Time saved at inference, % of the base model's (claim 9)"][0][1:] == (-2.0, -5.0, 1.0)


def test_a_value_without_an_interval_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"'57\.9' is no mean with an interval"):
        figure.interval("57.9")
