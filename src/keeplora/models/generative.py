"""One interface to every image-text-to-text model of transformers: conversations in, losses and answers out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_dir
from keeplora.models.batching import ANSWER, IGNORED, IMAGE, PAD, TEXT, Item, join_items, length_grouped, lengths
from keeplora.models.chat import Turn, before
from keeplora.models.checkpoint import told_as
from keeplora.models.encoding import Encoder
from keeplora.models.opening import check_options, choose_dtype, end_tokens, length_limit, open_config, open_weights
from keeplora.models.parts import PARTS, checkpointing, find_targets, find_towers, unknown_part
from keeplora.models.processors import load_processor, save_processor, set_image_size
from keeplora.models.video_clips import Clip
from keeplora.models.video_features import video_by_video
from keeplora.models.video_sizes import check_side

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ANSWER", "Generative", "IMAGE", "PAD", "TEXT", "length_grouped", "lengths", "load_generative"]

_OURS = frozenset({"labels", "token_kinds", "index", "video_frames"})
_EXACT = frozenset({"second_per_grid_ts"})  # seconds, which bfloat16 would round
_KINDS = {"text": TEXT, "image": IMAGE, "answer": ANSWER}


class Generative:
    """A stock Hugging Face image-text-to-text model with its processor and chat template.

    `model` stays the ordinary module: an adapter that PEFT injects into it in place acts through every method here.

    Args:
        model: what `AutoModelForImageTextToText` gives. processor: its processor.
        name, revision: where it came from.
        max_length: the most tokens that a sample may have, pictures included; None means what the model was made for.
        video_size: side in pixels of the square that a frame of a video fills at most; None is the class's own size.

    Attributes:
        family: the config's model_type. model: nn.Module, in eval mode. tokenizer: the processor's.
        towers: {"language": ..., "vision": ..., "projector": ...}, module-name prefixes; of Video-LLaVA also "vision-2",
            its tower for videos.
        chat: the chat template.
    """

    kind: ClassVar[str] = "generation"

    in_step: bool = False
    """Whether several processes hold the model together and call it at the same times."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        name: str = "",
        revision: str | None = None,
        max_length: int | None = None,
        video_size: int | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.name, self.revision = name, revision
        config = self.model.config
        self.family: str = config.model_type
        label = name or self.family
        self.towers = find_towers(self.model, label)
        # Looked up once, before any adapter renames the linears (PEFT puts them under `.base_layer`).
        self._targets = find_targets(self.model, self.towers, label)
        self.max_length = length_limit(config, max_length, label)
        self._encoder = Encoder(processor, config, label, video_size)
        self.chat = self._encoder.chat
        self._ends = end_tokens(self.model, self.tokenizer, self.chat.end)
        pad = self.tokenizer.pad_token_id
        self._pad = int(self._ends[0] if pad is None else pad)

    # -- what the model is ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def reads_videos(self) -> bool:
        """Whether the class has a video input; if not, a video is shown as its frames, one picture each, in a row."""
        return self._encoder.videos

    def target_modules(self, parts: Sequence[str] = ("language",)) -> list[str]:
        """Full names of the linears of `parts`: of the blocks of "language" and "vision" (attention and MLP), and of the
        "projector". Never the head, embeddings, or linears inside an nn.MultiheadAttention."""
        for part in parts:
            if part not in PARTS:
                raise unknown_part(part)
        return [name for part in PARTS if part in parts for name in self._targets[part]]

    @property
    def default_target_modules(self) -> list[str]:
        """Linears of the language model's blocks and of the projector."""
        return self.target_modules(("language", "projector"))

    # -- samples and batches -------------------------------------------------------------------------------------

    def encode(
        self, turns: Sequence[Turn], pictures: Sequence[Image] = (), clips: Sequence[Clip] = (), *, where: str = "",
        answers: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One conversation as a batch of one.

        Args:
            turns: with one "<image>" per picture and one "<video>" per clip, in order. A last answer is left out when
                `answers` is False.
            pictures: RGB.
            clips: frames of videos with their times (`video_clips.Clip`).
            where: the sample, for error messages.
            answers: False gives the prompt alone, up to where the model's answer begins.

        Returns the processor's tensors, `labels` [1, T] int64 (-100 off the answers' tokens; the token that ends an
        answer belongs to it) and `token_kinds` [1, T] uint8 (PAD, TEXT, IMAGE for pictures and videos, ANSWER). Where
        `pixel_values_videos` is [videos, F, 3, H, W], `video_frames` [videos] tells how many frames of each are not filling.

        A class without a video input gets a clip as its frames, and then every picture in one piece. A conversation that
        is longer than `max_length` is cut at its end; where that would cut a picture or a video, or leave no token of an
        answer, or where it is a prompt, it is refused with `DataError`.
        """
        return self._encoder.encode(
            turns, pictures, clips, where or "the conversation", answers=answers, max_length=self.max_length
        )

    def join(self, items: Sequence[Item], *, side: str = "right") -> dict[str, Tensor]:
        """Several samples as one batch, padded on `side` to the longest; samples without pictures may be among them.

        Equal to what the processor makes of all of them at once, up to rows of zeros for samples without pictures.
        """
        return join_items(items, pad_token=self._pad, side=side)

    def masks(self, batch: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """How much each position counts in C and G of the language model: {prefix: [N, T]}.

        Args:
            weights: of "text", "image" and "answer" tokens, not negative; 1 where none is given. Pads never count.

        Returns bool where all weights are 0 or 1, else float32.
        """
        chosen = dict.fromkeys(_KINDS, 1.0) | dict(weights or {})
        if unknown := sorted(set(chosen) - set(_KINDS)):
            raise KeepLoraError(f"token_weights has {unknown[0]!r}; it takes text, image and answer")
        if negative := [kind for kind, value in chosen.items() if value < 0]:
            raise KeepLoraError(f"token_weights: {negative[0]} is {chosen[negative[0]]}; weights are not negative")
        table = torch.zeros(4)
        for kind, value in chosen.items():
            table[_KINDS[kind]] = value
        kinds = batch["token_kinds"]
        mask = table.to(kinds.device)[kinds.long()]
        return {self.towers["language"]: mask.bool() if set(chosen.values()) <= {0, 1} else mask}

    # -- training ------------------------------------------------------------------------------------------------

    def token_losses(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """Cross-entropy of each answer token: [answer tokens], float32, differentiable, sample by sample.

        Logits are computed for those positions alone: a row of the vocabulary for each answer token, not for each token.
        `model` is this model by default; another of the same class, such as a teacher, may be given.
        """
        labels = batch["labels"].to(self.device)
        # The position before a token predicts it; the first token is predicted by none.
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        rows = following != IGNORED
        logits = self._run(self.model if model is None else model, batch, rows)
        return nn.functional.cross_entropy(logits.float(), following[rows], reduction="none")

    def forward(self, batch: Mapping[str, Tensor]) -> None:
        """The forward pass without a loss, for statistics of activations."""
        rows = torch.zeros_like(batch["labels"], dtype=torch.bool, device=self.device)
        rows[0, 0] = True
        self._run(self.model, batch, rows)

    def _run(self, model: Any, batch: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Logits [rows, V] of the positions where `rows` [N, T] is True."""
        # Before the head and not behind the base model, so that what a class does to its logits (Gemma's soft cap) is done.
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][rows].unsqueeze(0),))
        try:
            with checkpointing(model), video_by_video(model, batch.get("video_frames")):
                return model(**self._inputs(batch), use_cache=False).logits[0]
        finally:
            hook.remove()

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {key: value.to(self.device) for key, value in batch.items() if key not in _OURS}
        return {
            key: value.to(self.dtype) if value.is_floating_point() and key not in _EXACT else value
            for key, value in inputs.items()
        }

    def gradient_checkpointing(self, on: bool) -> None:
        """Compute the blocks' activations again in the backward pass instead of keeping them, in eval mode too."""
        if not self.model.supports_gradient_checkpointing:
            raise KeepLoraError(f"{self.name or self.family} does not support gradient checkpointing; turn it off")
        state = "enable" if on else "disable"
        # transformers renames the method from 5.23 on
        change = getattr(self.model, f"activation_checkpointing_{state}", None)
        (change or getattr(self.model, f"gradient_checkpointing_{state}"))()
        if on and hasattr(self.model, "_require_grads_hooks"):
            # transformers has the embeddings ask for gradients, which its older, reentrant checkpoints needed: blocks below
            # the shallowest target would be computed again, and run backwards, for nothing.
            self.model.disable_input_require_grads()

    # -- answering -----------------------------------------------------------------------------------------------

    def generate(
        self, batch: Mapping[str, Tensor], *, max_new_tokens: int, sample: bool = False, temperature: float = 1.0,
        top_p: float = 1.0, seed: int = 0, stop: Sequence[str] = (),
    ) -> list[str]:  # fmt: skip
        """Answer a batch of prompts (`encode(..., answers=False)`, joined with `side="left"`).

        Greedy, or sampled with `seed`, which leaves torch's global random state as it was. An answer ends at the token
        that ends a turn, before the first of the texts in `stop`, or after `max_new_tokens`. Nothing else that a
        checkpoint's generation_config.json asks for (repetition penalties, beams, top-k) is done.

        Training flags and the model's state are afterwards as they were.
        """
        from transformers import GenerationConfig

        if not bool(batch["attention_mask"][:, -1].all()):
            raise KeepLoraError(
                'prompts that are answered together must be padded on the left: join(items, side="left")'
            )
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature if sample else 1.0,
            top_p=top_p if sample else 1.0, top_k=0 if sample else 50, num_beams=1, repetition_penalty=1.0,
            no_repeat_ngram_size=0, use_cache=True, eos_token_id=self._ends, pad_token_id=self._pad,
            stop_strings=list(stop) or None,
        )  # fmt: skip
        inputs = self._inputs(batch)
        options: dict[str, Any] = {"tokenizer": self.tokenizer} if stop else {}
        if self.in_step:
            options["synced_gpus"] = True
        devices = [self.device] if self.device.type == "cuda" else []
        videos = video_by_video(self.model, batch.get("video_frames"))
        with (
            torch.no_grad(), self._eval_mode(), self._kept_state(), videos,
            torch.random.fork_rng(devices, enabled=sample),
        ):  # fmt: skip
            if sample:
                torch.manual_seed(seed)
            found = self.model.generate(**inputs, generation_config=settings, **options)
        answers = self.tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [before(answer, stop).strip() for answer in answers]

    @contextlib.contextmanager
    def _kept_state(self) -> Iterator[None]:
        # Qwen-VL keeps the last prompt's position offsets on the module, where a later forward pass would find them.
        kept = [(m, m.rope_deltas) for m in self.model.modules() if hasattr(m, "rope_deltas")]
        try:
            yield
        finally:
            for module, value in kept:
                module.rope_deltas = value

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Generative]:
        """A block in eval mode without gradients; the flags are afterwards as they were."""
        with torch.no_grad(), self._eval_mode():
            yield self

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    # -- the rest ------------------------------------------------------------------------------------------------

    def around(self, model: nn.Module) -> Generative:
        """The same processor around another module of the same class, such as a copy with other weights."""
        other = copy.copy(self)
        other.model = model
        return other

    def to(self, device: str | torch.device) -> Generative:
        """Move the model to `device`."""
        self.model.to(device)
        return self

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write model and processor as an ordinary folder, which must not exist yet. An attached adapter is refused."""
        directory = Path(directory)
        if any(hasattr(module, "base_layer") for module in self.model.modules()):
            raise KeepLoraError(
                f"{directory}: an adapter is attached to the model, whose weights would be saved under PEFT's names; "
                "merge or unload it first"
            )
        if directory.exists():
            raise KeepLoraError(f"{directory} exists already; choose a new folder or remove it")
        with atomic_dir(directory) as part:
            self.model.save_pretrained(part)
            save_processor(self.processor, part)
        return directory


def load_generative(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    quantize: str | None = None,
    image_size: int | None = None,
    video_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    source: str | None = None,
) -> Generative:
    """Open an image-text-to-text model with its processor, in eval mode.

    Args:
        name_or_path: a local folder or a name on the Hugging Face hub.
        device: where to put it.
        dtype: "fp32", "bf16", or "auto": float32 on a CPU and for float32 checkpoints, else bfloat16.
        quantize: "8bit" or "4bit" (bitsandbytes): the language model's blocks; `dtype` is that of the rest.
        image_size: for classes that read pictures of any size, the side in pixels of the square that they fill at most.
        video_size: likewise of a video's frames.
        max_length: the most tokens that a sample may have; None is the model's own limit.
        source: where to read it, if not `name_or_path`, which then only names it.

    Raises:
        KeepLoraError: parts are missing or do not fit; a package is not installed.

    >>> family = load_generative("llava-hf/llava-1.5-7b-hf", dtype="bf16")  # doctest: +SKIP
    >>> family.towers["language"]  # doctest: +SKIP
    'model.language_model'
    """
    name = str(name_or_path)
    source = source or name
    check_options(dtype, quantize)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = open_config(name, source, options)
    processor = load_processor(name, source, config, options)
    if image_size is not None:
        set_image_size(processor, image_size, name)
    if video_size is not None:
        check_side(processor, video_size, name)
    chosen = choose_dtype(dtype, config, str(device))
    model = open_weights(name, source, config, options, dtype=chosen, quantize=quantize, device=str(device))
    commit = getattr(model.config, "_commit_hash", None) or revision
    with told_as(f"{name}: its processor cannot be used with its weights"):
        return Generative(model, processor, name=name, revision=commit, max_length=max_length, video_size=video_size)
