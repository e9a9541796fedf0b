"""Held-out scores of the stand-in beside the answer prior and the same model without a picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from random import Random
from typing import Any

import numpy as np
import torch
from stand_in_mixture import KINDS, Sample
from stand_in_model import pixels
from transformers import LlavaForConditionalGeneration, LlavaProcessor

Question = tuple[str, str, str, np.ndarray]
"""(kind, question, answer, picture)"""


def rouge_l(said: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words."""
    a, b = said.lower().replace(".", "").split(), wanted.lower().replace(".", "").split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b)) if a and b else float(a == b)


def score(kind: str, said: str, wanted: str) -> float:
    """ROUGE-L of captions, else exact match ignoring case."""
    return (
        rouge_l(said, wanted) if kind.startswith("caption") else float(said.strip().lower() == wanted.strip().lower())
    )


def questions(samples: list[Sample], each: int, seed: int = 0) -> list[Question]:
    """At most `each` questions of every kind, at most one of a kind per picture."""
    rng = Random(seed)
    found: dict[str, list[Question]] = defaultdict(list)
    for sample in samples:
        kinds = {kind for kind, _, _ in sample.turns}
        for kind in sorted(kinds):
            question, answer = rng.choice([(q, a) for k, q, a in sample.turns if k == kind])
            found[kind].append((kind, question, answer, sample.picture))
    return [q for kind in KINDS for q in rng.sample(found[kind], min(each, len(found[kind])))]


def greedy(model: Any, tokenizer: Any, texts: list[str], most: int, autocast: bool = True, **shown: Any) -> list[str]:
    """Answers to one batch of prompts, stopped at </s> or `most` tokens; `shown` are the pixels, as the model takes them."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    tokenizer.padding_side = side
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=most,
            do_sample=False,
            **shown,
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: list[str],
    pictures: np.ndarray,
    batch: int = 32,
    autocast: bool = True,
) -> list[str]:
    """Greedy answers, stopped at </s> or 24 tokens; pictures uint8 [N, 112, 112, 3]."""
    said: list[str] = []
    for start in range(0, len(asked), batch):
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            ).replace("<image>", "<image>" * 64)
            for question in asked[start : start + batch]
        ]
        shown = pixels(pictures[start : start + batch])
        said += greedy(model, processor.tokenizer, texts, 24, autocast, pixel_values=shown)
    return said


def table(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: list[Question], grey: tuple[int, int, int]
) -> dict[str, dict[str, Any]]:
    """Per kind: number of questions, held-out score, prior and blind score."""
    pictures = np.stack([q[3] for q in asked])
    mean = np.broadcast_to(np.array(grey, np.uint8), pictures.shape)
    said, blind = (answers(model, processor, [q[1] for q in asked], p) for p in (pictures, mean))
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(q[0] for q in asked):
        rows = [i for i, q in enumerate(asked) if q[0] == kind]
        prior = Counter(asked[i][2] for i in rows).most_common(1)[0][0]
        found[kind] = {
            "questions": len(rows),
            "score": _mean([score(kind, said[i], asked[i][2]) for i in rows]),
            "blind": _mean([score(kind, blind[i], asked[i][2]) for i in rows]),
            "prior": _mean([score(kind, prior, asked[i][2]) for i in rows]),
        }
    found["mean"] = {
        "questions": len(asked),
        **{key: _mean([row[key] for row in found.values()]) for key in ("score", "blind", "prior")},
    }
    return found


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)
