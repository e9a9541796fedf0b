"""Teaching the stand-in: batches of pictures with several independent questions each, and the loop."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from stand_in_mixture import Sample
from stand_in_model import PATCHES
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

BATCH, MOST_TURNS = 32, 7
ROOMS = (72, 104)
"""Tokens of questions and answers per picture: two lengths, so that two compiled graphs serve all batches."""
CONVERSATIONS = 0.2
"""Share of pictures whose turns follow each other as in a chat; in the others each turn sees only the picture and itself."""


@dataclass
class Batch:
    """Everything after the picture's places: `ids`, `labels`, `positions` [B, T]; `mask` bool [B, 1, P + T, P + T]."""

    rows: list[int]
    prefix: Tensor
    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor


class Batches:
    """Turns the samples into batches; which turns a picture is asked is drawn anew in every epoch."""

    def __init__(self, samples: list[Sample], tokenizer: PreTrainedTokenizerFast) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        end = tokenizer.eos_token_id
        self.prefix = encode("<s>USER: ")
        self.turns = []
        for sample in samples:
            found = []
            for kind, question, answer in sample.turns:
                asked, said = encode(f"\n{question} ASSISTANT:"), [*encode(f" {answer}"), end]
                later = encode(f"USER: {question} ASSISTANT:")
                found.append((kind, asked, later, said))
            self.turns.append(found)
        self.lengths = [sum(len(asked) + len(said) for _, asked, _, said in t) for t in self.turns]

    def epoch(self, seed: int) -> list[tuple[int, list[int]]]:
        """The epoch's batches: (room in tokens, pictures), pictures with much to ask together."""
        rng = Random(seed)
        found = []
        for low, room in zip((0, *ROOMS), ROOMS, strict=False):
            rows = [i for i, n in enumerate(self.lengths) if low < min(n, ROOMS[-1]) <= room]
            rng.shuffle(rows)
            found += [(room, rows[start : start + BATCH]) for start in range(0, len(rows) - BATCH + 1, BATCH)]
        rng.shuffle(found)
        return found

    def batch(self, length: int, rows: list[int], rng: Random) -> Batch:
        lines = [self._line(self.turns[row], length, rng) for row in rows]
        offset = len(self.prefix) + PATCHES
        ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        turn = torch.full((len(rows), length), -2)
        for number, (tokens, targets, places, numbers) in enumerate(lines):
            ids[number, : len(tokens)] = torch.tensor(tokens)
            labels[number, : len(tokens)] = torch.tensor(targets)
            positions[number, : len(tokens)] = torch.tensor(places) + offset
            turn[number, : len(tokens)] = torch.tensor(numbers)
        whose = torch.cat([torch.full((len(rows), offset), -1), turn], dim=1)
        total = offset + length
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        same = (whose[:, :, None] == whose[:, None, :]) | (whose == -1)[:, None, :]
        return Batch(rows, torch.tensor(self.prefix), ids, labels, positions, (same & causal)[:, None])

    @staticmethod
    def _line(turns: list[tuple[str, list[int], list[int], list[int]]], room: int, rng: Random):
        chat = rng.random() < CONVERSATIONS
        tokens: list[int] = []
        targets: list[int] = []
        places: list[int] = []
        numbers: list[int] = []
        for number, (_, asked, later, said) in enumerate(rng.sample(turns, min(len(turns), MOST_TURNS))):
            question = later if chat and number else asked
            if len(tokens) + len(question) + len(said) > room:
                break
            start = len(tokens) if chat else 0
            tokens += question + said
            targets += [-100] * len(question) + said
            places += range(start, start + len(question) + len(said))
            numbers += [0 if chat else number] * (len(question) + len(said))
        return tokens, targets, places, numbers


def loss_of(model: LlavaForConditionalGeneration, batch: Batch, image: Tensor) -> Tensor:
    """Cross entropy on the answers' tokens; `image` [B, 64, F] are the tower's cached features."""
    language = model.model.language_model
    embed = language.get_input_embeddings()
    before = embed(batch.prefix)[None].expand(len(batch.rows), -1, -1)
    seen = model.model.multi_modal_projector(image)
    whole = torch.cat([before, seen.to(before.dtype), embed(batch.ids)], dim=1)
    offset = whole.shape[1] - batch.ids.shape[1]
    start = torch.arange(offset)[None].expand(len(batch.rows), -1)
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


def teach(
    model: LlavaForConditionalGeneration,
    samples: list[Sample],
    cached: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Path,
    epochs: int,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """Teach projector and decoder; goes on from `checkpoint` (written every 500 steps) when it is there."""
    taught = [p for n, p in model.named_parameters() if not n.startswith("model.vision_tower")]
    optimiser = torch.optim.AdamW(taught, lr=rate, betas=(0.9, 0.98), weight_decay=0.03)
    batches = Batches(samples, tokenizer)
    per_epoch = len(batches.epoch(seed))
    total, step = epochs * per_epoch, 0
    warm = min(200, total // 10)

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
    for epoch in range(step // per_epoch, epochs):
        for number, (room, rows) in enumerate(batches.epoch(seed + epoch)):
            if epoch * per_epoch + number < step:
                continue
            batch = batches.batch(room, rows, Random(f"{seed} {epoch} {number}"))
            image = torch.from_numpy(cached[batch.rows].astype(np.float32))
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch, image)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(taught, 1.0)
            optimiser.step()
            schedule.step()
            step += 1
            recent.append(loss.item())
            if step % 50 == 0:
                pace = (time.time() - started) / (step - first) / BATCH
                print(
                    f"step {step}/{total} loss {np.mean(recent[-50:]):.4f} {1000 * pace:.1f} ms per picture", flush=True
                )
            if step % 500 == 0 or step == total:
                own = {n: t for n, t in model.state_dict().items() if not n.startswith("model.vision_tower")}
                state = {
                    "model": own,
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
