"""A few test items of every set with their pictures or key frames, so that a report can show what was asked beside what was
answered."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from keeplora.data.conversations import ConversationSet
from keeplora.data.video import Clip, Sampling
from keeplora.files import atomic_write_bytes, atomic_write_json

SAMPLES = 12
SIDE = 336
"""Longest side of a kept picture, in pixels."""
FRAME = 112
"""Longest side of a frame in the strip of a video's frames."""


def film_strip(clip: Clip, most: int = 8) -> Image.Image:
    """At most ``most`` frames side by side, the first and the last among them."""
    count = min(most, len(clip.frames))
    chosen = [clip.frames[round(i * (len(clip.frames) - 1) / max(1, count - 1))].copy() for i in range(count)]
    for frame in chosen:
        frame.thumbnail((FRAME, FRAME))
    gap = 3
    width = sum(frame.width for frame in chosen) + gap * (len(chosen) - 1)
    strip = Image.new("RGB", (width, max(frame.height for frame in chosen)), "white")
    left = 0
    for frame in chosen:
        strip.paste(frame, (left, 0))
        left += frame.width + gap
    return strip


def write_samples(folder: Path, name: str, conversations: ConversationSet, seed: int, sampling: Sampling) -> None:
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
        place, times = None, []
        if conversation.videos:
            clip = conversations.clips(i, sampling)[0]
            shown, times = film_strip(clip), [round(time, 3) for time in clip.times]
        elif conversation.pictures:
            shown = conversations.pictures(i)[0].copy()
            shown.thumbnail((SIDE, SIDE))
        else:
            shown = None
        if shown is not None:
            place = f"samples/{name}/{n}.webp"
            buffer = io.BytesIO()
            shown.save(buffer, "WEBP", quality=85)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(folder / place, buffer.getvalue())
        entries.append(
            {
                "n": n, "key": conversation.key, "question": conversation.question,
                "references": list(conversation.references), "picture": place,
                "pictures": len(conversation.pictures), "videos": len(conversation.videos), "times": times,
            }
        )  # fmt: skip
    index.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(index, entries)
