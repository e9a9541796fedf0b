"""Tasks of questions and answers for tiny generative models, with an objective like an experiment's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora.models.batching import join_items
from tests.models import tiny, tiny_generative

Item = dict[str, Tensor]
QUESTIONS = {
    "one": [("What is it?", "a red cat"), ("Which colour?", "blue"), ("Is it a dog or a cat?", "a cat"), ("Where?", "left")],
    "two": [("How many?", "seven"), ("Read the sign.", "stop here"), ("Is it round?", "no"), ("What shape is it in?", "square")],
}  # fmt: skip
KINDS = ("llama", "llava", "qwen2-5-vl")
"""A language model without pictures, one with a projector and one whose pictures are ragged lists of patches."""


def save_model(kind: str, folder: Path) -> Path:
    """Write the tiny model to ``folder``."""
    if kind != "llama":
        return tiny_generative.tiny(kind, folder)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():  # the config's 0.02 would hardly move the logits
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


class World:
    """A model, its processor, and how a question becomes tensors."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.processor: Any = None
        if kind == "llama":
            from transformers import LlamaForCausalLM

            self.model: Any = LlamaForCausalLM.from_pretrained(folder).eval()
            self.pad = 0
        else:
            from transformers import AutoModelForImageTextToText

            from keeplora.models.processors import load_processor

            self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
            self.processor = load_processor(str(folder), str(folder), self.model.config, {})
            self.pad = self.processor.tokenizer.pad_token_id

    @property
    def targets(self) -> list[str]:
        """The language model's linears, and the projector's."""
        names = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        wanted = ("language_model.layers", "projector") if self.processor is not None else ("model.layers",)
        return [n for n in names if any(w in n for w in wanted)]

    def prompt(self, question: str, number: int, picture: bool = True) -> Item:
        """The question up to where the answer begins, [1, T]."""
        if self.processor is None:
            return _plain([1, *(b % 100 + 20 for b in question.encode()), 3 + number])
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        pictures = (
            [tiny.pictures(number + 1, seed=number)[number].resize((20 + 8 * (number % 2), 16))] if picture else []
        )
        content[:0] = [{"type": "image"} for _ in pictures]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        found = self.processor(text=[text], images=pictures or None, return_tensors="pt")
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}

    def item(self, question: str, answer: str, number: int, picture: bool = True) -> Item:
        """Question and answer, and labels that are −100 off the answer."""
        item = self.prompt(question, number, picture)
        if self.processor is None:
            tokens = [*(b % 100 + 20 for b in answer.encode()), 2]
        else:
            tokenizer = self.processor.tokenizer
            tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, added = item["input_ids"], torch.tensor([tokens])
        item |= {
            "input_ids": torch.cat([ids, added], 1),
            "attention_mask": torch.ones(1, ids.shape[1] + len(tokens)).long(),
        }
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in item:
                item[key] = torch.cat([item[key], torch.zeros_like(added)], 1)
        return {**item, "labels": torch.cat([torch.full_like(ids, -100), added], 1)}

    @torch.no_grad()
    def logits(self, batch: Item) -> Tensor:
        return self.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits

    @torch.no_grad()
    def generate(self, prompt: Item, use_cache: bool = True) -> tuple[list[int], Tensor]:
        """Six greedy tokens, and the logits that they were chosen by."""
        n = prompt["input_ids"].shape[1]
        found = self.model.generate(
            **prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache,
            return_dict_in_generate=True, output_logits=True, pad_token_id=self.pad,
        )  # fmt: skip
        return found.sequences[0, n:].tolist(), torch.cat(found.logits)


def _plain(tokens: list[int]) -> Item:
    ids = torch.tensor([tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class GenerationTask:
    """Samples, batches and the objective of a task; the third of the first task's questions has no picture."""

    kind: ClassVar[str] = "generation"

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.items = [world.item(q, a, i, picture=(name, i) != ("one", 2)) for i, (q, a) in enumerate(QUESTIONS[name])]
        self.batches = [self.join(self.items[:2]), self.join(self.items[2:])]
        self.single_batches: Any = DataLoader(self.items, batch_size=1, collate_fn=self.join)  # type: ignore[arg-type]
        self.prompt = world.prompt(QUESTIONS[name][0][0], 0)

    def join(self, items: Sequence[Mapping[str, Tensor]]) -> Item:
        return join_items(items, pad_token=self.world.pad)

    def token_losses(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """[answer tokens], float32."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = (self.world.model if model is None else model)(**inputs, use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self.token_losses(batch)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.world.logits(dict(batch))

    def start(self, learner: Any, name: str, **kwargs: Any) -> nn.Module:
        values = {"objective": self, "forward_fn": self.forward, "single_batches": self.single_batches, **kwargs}
        return learner.start_task(name, self.batches, self.loss, **values)

    @torch.no_grad()
    def mean_loss(self) -> float:
        return float(torch.cat([self.token_losses(batch) for batch in self.batches]).mean())


def train(learner: Any, model: nn.Module, task: GenerationTask, *, steps: int = 4, lr: float = 5e-3) -> list[float]:
    """Steps over all batches; returns the penalties, NaN where there was none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return []
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    penalties = []
    for _ in range(steps):
        for batch in task.batches:
            optimizer.zero_grad()
            loss = task.loss(model, batch).mean()
            extra = learner.penalty(batch, None)
            (loss if extra is None else loss + extra).backward()
            optimizer.step()
            learner.after_step()
            penalties.append(float("nan") if extra is None else extra.item())
    return penalties


def learn(learner: Any, task: GenerationTask, name: str, **kwargs: Any) -> list[float]:
    """One task from start to end."""
    penalties = train(learner, task.start(learner, name), task, **kwargs)
    learner.finish_task()
    return penalties
