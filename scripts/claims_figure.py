"""The differences of docs/abstract.md as one figure, from the values of docs/claims/claims.yaml.

python scripts/claims_figure.py      # writes docs/images/abstract.png
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from keeplora.files import atomic_write_bytes
from keeplora.report.palette import SERIES
from keeplora.report.plots import INK, LINE, SOFT

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims" / "claims.yaml"
IMAGE = ROOT / "docs" / "images" / "abstract.png"
#: Panels: what is compared, and the claim that tells it.
PANELS = {
    "Learning (claim 2)": {
        "questions: MFT": "abstract.vqa.mft",
        "videos: MFT": "abstract.video.mft",
    },
    "Keeping what was learned (claim 5)": {
        "pictures: forgetting, sign turned": "abstract.forgetting",
        "questions: BWT": "abstract.vqa.bwt",
        "videos: BWT": "abstract.video.bwt",
        "pictures, 22 tasks: BWT": "long.bwt",
    },
    "Keeping what was known before (claim 6)": {
        "pictures: Transfer and Probe": "abstract.unseen",
        "questions: general": "abstract.vqa.general",
        "videos: general": "abstract.video.general",
        "pictures, 22 tasks: probes at the end": "long.probe.last",
        "pictures, 22 tasks: probes, mean": "long.probe",
    },
    "After the last task (claim 8)": {
        "pictures: Last": "demo-small.difference",
        "questions: MFN": "vqa.difference",
        "videos: MFN": "video.difference",
        "pictures, 22 tasks: Last": "long.last",
    },
    "γ < 1 less γ = 1, pictures (claim 7)": {
        "γ 0.2: Last, own rates": "abstract.front",
        "γ 0.2: Probe, own rates": "abstract.front.probe",
        "γ 0.2: Last, both at Probe 25": "abstract.front.at25",
        "γ 0.2: Last, both at Probe 20": "abstract.front.at20",
        "γ 0.2: Last, both at Probe 15": "abstract.front.at15",
        "Last, one rate": "abstract.gamma.last",
        "Transfer and Probe, one rate": "abstract.gamma.unseen",
        "Last, tuned": "abstract.tuned.last",
        "Transfer and Probe, tuned": "abstract.tuned.unseen",
    },
    "Time saved at inference, % of the base model's (claim 9)": {
        "a block of CLIP": "abstract.inference.clip",
        "a block of LLaMA": "abstract.inference.llama",
    },
}
#: Claims whose sign is turned, since less is better.
TURNED = {"abstract.forgetting"}
#: Claims that are ratios: 1 is drawn at 0, 0.9 at 10.
RATIOS = {"abstract.inference.clip", "abstract.inference.llama"}
_NUMBER = r"([+−-]?\d+(?:\.\d+)?)"
_INTERVAL = re.compile(rf"{_NUMBER}(?: points)? \[{_NUMBER}, {_NUMBER}\]")


def interval(value: str) -> tuple[float, float, float]:
    """A claim's mean and bounds.

    >>> interval("-3.6 [-6.7, −0.5]")
    (-3.6, -6.7, -0.5)
    """
    found = _INTERVAL.fullmatch(value)
    if found is None:
        raise ValueError(f"{value!r} is no mean with an interval")
    mean, low, high = (float(word.replace("−", "-")) for word in found.groups())
    return mean, low, high


def rows(claims: dict[str, str]) -> dict[str, list[tuple[str, float, float, float]]]:
    """Each panel's rows as label, mean, low, high, turned so that more is better."""
    turned: dict[str, list[tuple[str, float, float, float]]] = {}
    for title, entries in PANELS.items():
        turned[title] = []
        for label, name in entries.items():
            mean, low, high = interval(claims[name])
            if name in RATIOS:
                mean, low, high = (round(100 * (1 - ratio), 6) for ratio in (mean, high, low))
            turned[title].append((label, -mean, -high, -low) if name in TURNED else (label, mean, low, high))
    return turned


def draw(panels: dict[str, list[tuple[str, float, float, float]]]) -> Figure:
    """One panel below the other on one scale; filled where the interval leaves out 0."""
    blue, orange = SERIES["light"][:2]
    figure = Figure(figsize=(8.2, 7.6), facecolor="white", layout="constrained")
    heights = [len(entries) + 0.8 for entries in panels.values()]
    every = figure.subplots(len(panels), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    for axes, (title, entries) in zip(every, panels.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=SOFT, length=0, labelsize=9)
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(entries)), [label for label, *_ in entries], color=INK)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        for k, (_, mean, low, high) in enumerate(entries):
            colour, sure = blue if mean >= 0 else orange, low > 0 or high < 0
            axes.plot([low, high], [k, k], color=colour, linewidth=2)
            axes.plot(mean, k, "o", color=colour, markersize=7, markerfacecolor=colour if sure else "white")
    every[-1].set_xlabel(
        "difference in points (%), 95 % interval; right: better; hollow: the interval holds 0", color=INK
    )
    return figure


def main() -> int:
    claims = {claim["id"]: claim["value"] for claim in yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))}
    panels, stream = rows(claims), io.BytesIO()
    # The numbers go with the picture, so that a test can see whether it is of today's claims.
    draw(panels).savefig(stream, format="png", dpi=110, metadata={"Description": json.dumps(panels)})
    atomic_write_bytes(IMAGE, stream.getvalue())
    print(IMAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
