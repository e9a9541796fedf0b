"""Teaching the video stand-in's decoder: clips drawn anew in every step, several independent questions each."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from stand_in_bank import POOLED
from stand_in_mixture import Turn
from stand_in_reels import MAKERS, Reel
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from video_clips import SAMPLED

BATCH, ROOM, MOST_TURNS = 32, 112, 8
PICTURES = 0.12
"""Share of batches that show single pictures of the picture stand-in's mixture, each as a clip of one frame."""
PICTURE_BATCH = 64
SHARES = {"line": 0.4, "lane": 0.18, "slide": 0.22, "act": 0.2}


@dataclass
class Batch:
    """`frames` float16 [B, F * 16, D]; `ids`, `labels`, `positions` [B, T]; `mask` bool [B, 1, P + T, P + T]."""

    frames: np.ndarray
    prefix: Tensor
    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor


class Clips:
    """Draws batches of clips from the bank and of single pictures."""

    def __init__(
        self,
        reels: Sequence[Reel],
        bank: np.ndarray,
        pictures: np.ndarray,
        asked: Sequence[Sequence[Turn]],
        tokenizer: Any,
    ) -> None:
        self.by_kind = {kind: [reel for reel in reels if reel.kind == kind] for kind in SHARES}
        self.bank, self.pictures, self.asked = bank, pictures, asked
        self.encode = lru_cache(200_000)(lambda text: tokenizer.encode(text, add_special_tokens=False))
        self.end = tokenizer.eos_token_id
        self.prefix = self.encode("<s>USER: ")

    def clip(self, rng: Random) -> tuple[np.ndarray, Sequence[Turn]]:
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        reel = rng.choice(self.by_kind[kind])
        clip = MAKERS[kind][1](reel, rng)
        return self.bank[[reel.base + state for state in clip.states]], clip.turns

    def batch(self, rng: Random) -> Batch:
        if rng.random() < PICTURES:
            rows = [rng.randrange(len(self.asked)) for _ in range(PICTURE_BATCH)]
            drawn = [(self.pictures[row][None], self.asked[row]) for row in rows]
        else:
            drawn = [self.clip(rng) for _ in range(BATCH)]
        frames = np.stack([f.reshape(-1, f.shape[-1]) for f, _ in drawn])
        offset = len(self.prefix) + frames.shape[1] + 1
        ids = torch.zeros(len(drawn), ROOM, dtype=torch.long)
        labels, positions, whose = torch.full_like(ids, -100), torch.zeros_like(ids), torch.full_like(ids, -2)
        for number, (_, turns) in enumerate(drawn):
            tokens, targets, places, numbers = self._line(turns, rng)
            ids[number, : len(tokens)] = torch.tensor(tokens)
            labels[number, : len(tokens)] = torch.tensor(targets)
            positions[number, : len(tokens)] = torch.tensor(places) + offset
            whose[number, : len(tokens)] = torch.tensor(numbers)
        whose = torch.cat([torch.full((len(drawn), offset), -1), whose], dim=1)
        total = offset + ROOM
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        same = (whose[:, :, None] == whose[:, None, :]) | (whose == -1)[:, None, :]
        return Batch(frames, torch.tensor(self.prefix), ids, labels, positions, (same & causal)[:, None])

    def _line(self, turns: Sequence[Turn], rng: Random) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, targets, positions and turn numbers: every turn sees the frames and itself."""
        tokens: list[int] = []
        targets: list[int] = []
        places: list[int] = []
        numbers: list[int] = []
        for number, (_, question, answer) in enumerate(rng.sample(list(turns), min(len(turns), MOST_TURNS))):
            asked, said = self.encode(f"\n{question} ASSISTANT:"), [*self.encode(f" {answer}"), self.end]
            if len(tokens) + len(asked) + len(said) > ROOM:
                continue
            tokens += [*asked, *said]
            targets += [-100] * len(asked) + said
            places += range(len(asked) + len(said))
            numbers += [number] * (len(asked) + len(said))
        return tokens, targets, places, numbers


def loss_of(model: LlavaOnevisionForConditionalGeneration, batch: Batch) -> Tensor:
    """Cross entropy on the answers' tokens."""
    language = model.model.language_model
    embed = language.get_input_embeddings()
    rows = len(batch.ids)
    before = embed(batch.prefix)[None].expand(rows, -1, -1)
    seen = torch.from_numpy(batch.frames.astype(np.float32))
    newline = model.model.image_newline[None, None].expand(rows, 1, -1)
    whole = torch.cat([before, seen, newline, embed(batch.ids)], dim=1)
    offset = whole.shape[1] - batch.ids.shape[1]
    start = torch.arange(offset)[None].expand(rows, -1)
    # The plain attention adds its mask to the scores: a boolean one would hide nothing.
    hidden_from = torch.zeros(batch.mask.shape, dtype=whole.dtype).masked_fill(
        ~batch.mask, torch.finfo(whole.dtype).min
    )
    hidden = language(
        inputs_embeds=whole,
        attention_mask=hidden_from,
        position_ids=torch.cat([start, batch.positions], dim=1),
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, offset:-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:][wanted])


def own_state(model: LlavaOnevisionForConditionalGeneration) -> dict[str, Tensor]:
    """Everything but the tower."""
    return {n: t for n, t in model.state_dict().items() if not n.startswith("model.vision_tower")}


def teach(
    model: LlavaOnevisionForConditionalGeneration,
    clips: Clips,
    checkpoint: Path,
    total: int,
    rate: float,
    seed: int = 0,
) -> dict[str, float]:
    """Teach decoder and newline for `total` steps; goes on from `checkpoint` (written every 200) when it is there."""
    taught = [
        p for n, p in model.named_parameters() if "vision_tower" not in n and "multi_modal_projector" not in n
    ]  # fmt: skip
    optimiser = torch.optim.AdamW(taught, lr=rate, betas=(0.9, 0.98), weight_decay=0.03)
    warm, step = min(100, total // 10), 0

    def factor(at: int) -> float:
        return min(1.0, (at + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, at / total)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    model.train()
    language = model.model.language_model
    # The fused kernel's backward pass is many times slower than the plain one on a CPU when a mask is given.
    language.set_attn_implementation("eager")
    plain = language.forward
    language.forward = torch.compile(plain, dynamic=False)
    started, first, recent = time.time(), step, []
    while step < total:
        batch = clips.batch(Random(f"{seed} {step}"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(taught, 1.0)
        optimiser.step()
        schedule.step()
        step += 1
        if batch.frames.shape[1] > POOLED:
            recent.append(loss.item())
        if step % 25 == 0:
            pace = (time.time() - started) / (step - first)
            print(f"step {step}/{total} loss {np.mean(recent[-50:]):.4f} {pace:.2f} s a step", flush=True)
        if step % 200 == 0 or step == total:
            state = {
                "model": own_state(model),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    language.forward = plain
    language.set_attn_implementation("sdpa")
    model.eval()
    return {"steps": total, "final_loss": round(float(np.mean(recent[-200:])), 4) if recent else 0.0}


assert SAMPLED * POOLED == 128
