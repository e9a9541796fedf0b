"""A few test items of every set with their pictures, so that a report can show what was asked beside what was answered."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from keeplora.data.conversations import ConversationSet
from keeplora.files import atomic_write_bytes, atomic_write_json

SAMPLES = 12
SIDE = 336
"""Longest side of a kept picture, in pixels."""


def write_samples(folder: Path, name: str, conversations: ConversationSet, seed: int) -> None:
    """Write ``samples/NAME.json`` and the pictures beside it, unless they are there.

    The items are drawn by ``seed``, before anything is answered: no answer has a say in which are shown.
    """
    index = folder / "samples" / f"{name}.json"
    if index.is_file():
        return
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(len(conversations), generator=generator)[:SAMPLES].tolist())
    entries = []
    for n, i in enumerate(chosen):
        conversation = conversations.conversation(i)
        pictures = conversations.pictures(i)
        place = None
        if pictures:
            place = f"samples/{name}/{n}.webp"
            picture = pictures[0].copy()
            picture.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=85)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(folder / place, buffer.getvalue())
        entries.append(
            {
                "n": n, "key": conversation.key, "question": conversation.question,
                "references": list(conversation.references), "picture": place, "pictures": len(pictures),
            }
        )  # fmt: skip
    index.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(index, entries)
