"""Scores of the video stand-in on the packs, beside the answer prior, no frames to see, and one frame alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from stand_in_bank import POOLED
from stand_in_model import pixels
from stand_in_score import greedy, score
from stand_in_video_model import VIDEO
from transformers import LlavaOnevisionForConditionalGeneration
from video_clips import SAMPLED, decode, sampled

PACKS = Path(__file__).resolve().parent.parent / "src/keeplora/suites/video"
SETS = ("counting", "motion", "order", "speed", "actions", "general")
Row = tuple[str, str, str, np.ndarray]
"""(set and kind, question, answer, frames uint8 [8, 112, 112, 3])"""


def read(file: Path, split: str = "test") -> list[Row]:
    """One split of a pack, each clip as its eight evenly spread frames."""
    rows = []
    for row in pq.read_table(file).to_pylist():
        if row["split"] != split:
            continue
        asked, answer = (turn["value"] for turn in json.loads(row["conversations"])[:2])
        frames = decode(row["video"])
        shown = np.stack([frames[i] for i in sampled(len(frames))])
        name = file.stem if file.stem == row["kind"] else f"{file.stem}: {row['kind']}"
        rows.append((name, asked.removeprefix(f"{VIDEO}\n"), answer, shown))
    return rows


@torch.inference_mode()
def answers(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: Any,
    asked: Sequence[str],
    clips: np.ndarray,
    batch: int = 34,
) -> list[str]:
    """Greedy answers, stopped at </s> or 20 tokens; clips uint8 [N, 8, 112, 112, 3]."""
    said: list[str] = []
    for start in range(0, len(asked), batch):
        shown = clips[start : start + batch]
        places = VIDEO * (SAMPLED * POOLED + 1)
        texts = [f"<s>USER: {places}\n{question} ASSISTANT:" for question in asked[start : start + batch]]
        frames = pixels(shown.reshape(-1, *shown.shape[2:])).view(len(shown), SAMPLED, 3, *shown.shape[2:4])
        said += greedy(model, tokenizer, texts, 20, pixel_values_videos=frames)
    return said


def table(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: Any, rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """Per set (and kind of the general set): questions, score, blind (grey frames), one frame (the fifth, eight times), and
    the share of the most frequent answer."""
    clips = np.stack([row[3] for row in rows])
    grey = np.broadcast_to(clips.mean(axis=(0, 1, 2, 3)).astype(np.uint8), clips.shape)
    one = np.broadcast_to(clips[:, 4:5], clips.shape)
    asked = [row[1] for row in rows]
    shown = {"score": clips, "blind": grey, "one_frame": one}
    said = {key: answers(model, tokenizer, asked, frames) for key, frames in shown.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row[0] for row in rows):
        own = [i for i, row in enumerate(rows) if row[0] == name]
        kind = name.split(": ")[-1]
        prior = Counter(rows[i][2] for i in own).most_common(1)[0][0]
        found[name] = {"questions": len(own)} | {
            key: _mean([score(kind, texts[i], rows[i][2]) for i in own]) for key, texts in said.items()
        }
        found[name]["prior"] = _mean([score(kind, prior, rows[i][2]) for i in own])
    general = [row for name, row in found.items() if name.startswith("general")]
    found["general"] = {"questions": sum(row["questions"] for row in general)} | {
        key: _mean([row[key] for row in general]) for key in ("score", "blind", "one_frame", "prior")
    }
    return found


def packs() -> list[Row]:
    """The test clips of all packs."""
    return [row for name in SETS for row in read(PACKS / f"{name}.parquet")]


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)
