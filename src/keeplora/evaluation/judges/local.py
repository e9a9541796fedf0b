"""A judge that is a language model on this machine."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.errors import ConfigError
from keeplora.evaluation.judges.base import Heard, JudgeError, Question, Verdict
from keeplora.evaluation.judges.prompt import PROMPT_VERSION, messages
from keeplora.evaluation.judges.reply import parse_score

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float16", "float32")


class LocalJudge:
    """A causal language model of `transformers`, asked in batches and greedily.

    It is loaded at the first question and held until `close`.

    Args:
        model: a folder, or a name on the hub.
        revision: of a name on the hub.
        device: "auto" (the first accelerator, else the CPU; several where `accelerate` finds them), or one such as "cuda:1".
        dtype: one of `DTYPES`.
        batch_size: questions at once.
        max_tokens: of the judge's words.
        chat_template_kwargs: passed to the chat template, e.g. ``{"enable_thinking": False}``.
    """

    def __init__(
        self, model: str, *, revision: str | None = None, device: str = "auto", dtype: str = "auto", batch_size: int = 16,
        max_tokens: int = 128, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.revision, self.device, self.dtype = model, revision, device, dtype
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.template = dict(chat_template_kwargs or {})
        self.identity: Mapping[str, Any] = {
            "kind": "local", "model": model, "revision": revision, "dtype": dtype, "max_tokens": max_tokens,
            "template": self.template, "prompt": PROMPT_VERSION,
        }  # fmt: skip
        self._loaded: tuple[Any, Any] | None = None

    def close(self) -> None:
        self._loaded = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def judge(self, items: Sequence[Question], heard: Heard | None = None) -> list[Verdict]:
        verdicts: list[Verdict] = [Verdict(None)] * len(items)
        if not items:
            return verdicts
        tokenizer, model = self._load()
        prompts = [self._prompt(tokenizer, item) for item in items]
        # Prompts of like length side by side: little padding, and the longest batch, which needs the most memory, at once.
        order = sorted(range(len(items)), key=lambda i: (-len(prompts[i]), i))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for place, text in zip(chosen, self._answers(tokenizer, model, [prompts[i] for i in chosen]), strict=True):
                verdicts[place] = Verdict(parse_score(text), text)
                if heard is not None:
                    heard(place, verdicts[place])
        return verdicts

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            if self.dtype not in DTYPES:
                raise ConfigError(f"judge.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
            options: dict[str, Any] = {"revision": self.revision} if self.revision else {}
            place: dict[str, Any] = {"device_map": "auto"} if self.device == "auto" and _accelerated() else {}
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model, padding_side="left", **options)
                place |= {"dtype": self.dtype, "use_safetensors": True}
                model: Any = AutoModelForCausalLM.from_pretrained(self.model, **options, **place)
            except (OSError, ValueError) as error:
                what = "folder" if Path(self.model).exists() else "model"
                raise JudgeError(
                    f"the judge {self.model!r} cannot be loaded from that {what}: {' '.join(str(error).split())[:300]}"
                ) from error
            if self.device != "auto":
                model = model.to(self.device)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            if tokenizer.pad_token_id is None:
                raise JudgeError(
                    f"the judge {self.model!r} has a tokenizer without any padding token; name another model"
                )
            self._loaded = tokenizer, model.eval()
        return self._loaded

    def _prompt(self, tokenizer: Any, item: Question) -> str:
        """The chat as the model's own template writes it; plain text where it has none."""
        chat = messages(item)
        if not tokenizer.chat_template:
            return "\n\n".join(turn["content"] for turn in chat) + "\n"
        options = {"tokenize": False, "add_generation_prompt": True, **self.template}
        try:
            return str(tokenizer.apply_chat_template(chat, **options))
        except Exception:  # a template says in its own way (jinja's TemplateError) that it takes no system turn
            joined = {"role": "user", "content": "\n\n".join(turn["content"] for turn in chat)}
            return str(tokenizer.apply_chat_template([joined], **options))

    def _answers(self, tokenizer: Any, model: Any, prompts: list[str]) -> list[str]:
        import torch

        # A template writes the special tokens itself.
        batch = tokenizer(
            prompts, padding=True, return_tensors="pt", add_special_tokens=not tokenizer.chat_template,
            return_token_type_ids=False,
        ).to(model.device)  # fmt: skip
        with torch.inference_mode():
            found: torch.Tensor = model.generate(
                **batch, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None,
                top_k=None, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _accelerated() -> bool:
    import torch

    return torch.accelerator.is_available()
