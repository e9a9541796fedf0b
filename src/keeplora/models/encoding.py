"""Conversations with pictures and videos as a processor's tensors, with what is learned of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keeplora.errors import DataError, KeepLoraError
from keeplora.models.batching import ANSWER, IGNORED, IMAGE, TEXT, shorten
from keeplora.models.chat import ChatFormat, Turn, check_turns, overlap, shift
from keeplora.models.checkpoint import first_line
from keeplora.models.opening import chat_template, placeholders
from keeplora.models.video_clips import Clip, as_pictures, picture_options, reads_videos, video_arguments
from keeplora.models.video_processors import stacked
from keeplora.models.video_sizes import SMOL, kind_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoder:
    """What `Generative.encode` does, on the processor's side.

    Args:
        processor: of the class. config: the model's. name: for error messages.
        video_side: side in pixels of the square that a frame fills at most; None is the class's own size.

    Attributes:
        chat: the chat template. videos: whether clips go through the class's own video input; else they are drawn as
        their frames. shown: ids of the tokens that stand for pictures and videos.
    """

    def __init__(self, processor: Any, config: Any, name: str, video_side: int | None = None) -> None:
        self.processor, self.name, self.video_side = processor, name, video_side
        self.tokenizer = processor.tokenizer
        self.chat = ChatFormat(
            self.tokenizer, chat_template(processor, name), reserved=placeholders(processor), name=name
        )
        token = getattr(processor, "video_token", None)
        self.videos = reads_videos(processor, config.model_type, bool(token) and self.chat.writes(str(token)))
        found = [_token_id(config, processor, "image")]
        if self.videos:
            found.append(_token_id(config, processor, "video"))
            # Videos of different length in one conversation come as a list, and are filled up here.
            processor.skip_tensor_conversion = [*processor.skip_tensor_conversion, "pixel_values_videos"]
        self.shown = torch.tensor([i for i in found if i is not None])

    def encode(
        self, turns: Sequence[Turn], pictures: Sequence[Image], clips: Sequence[Clip], where: str, *, answers: bool,
        max_length: int | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """See `Generative.encode`."""
        turns = turns[:-1] if not answers and turns and turns[-1].role == "assistant" else turns
        check_turns(turns, len(pictures), where, answers=answers, videos=len(clips))
        if any(not clip.frames for clip in clips):
            raise DataError(f"{where}: a video has no frames")
        drawn = bool(clips) and not self.videos
        if drawn:
            turns, pictures = as_pictures(turns, pictures, clips, self.video_side)
        text, spans = self.chat.whole(turns, where) if answers else self.chat.prompt(turns, where)
        out = self._process(text, list(pictures), clips if self.videos else (), where, whole=drawn)
        replaced = out.pop("text_replacement_offsets", None) if pictures or clips else []
        out.pop("text_replacement_offsets", None)
        if replaced is None:
            raise KeepLoraError(
                f"{self.name}: its {type(self.processor).__name__} does not tell which tokens stand for a picture "
                "(return_text_replacement_offsets), so answers cannot be told from questions"
            )
        placed = replaced[0] if replaced else []
        offsets = out.pop("offset_mapping")[0]
        item: dict[str, Tensor] = {key: value for key, value in out.items() if isinstance(value, Tensor)}
        ids = item["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for start, end in spans if answers else []:
            inside = overlap(offsets, shift(start, placed), shift(end, placed))
            labels[0, inside] = ids[0, inside]
        kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8)
        kinds[labels != IGNORED] = ANSWER
        kinds[torch.isin(ids, self.shown)] = IMAGE
        item |= {"labels": labels, "token_kinds": kinds}
        if max_length is not None and ids.shape[1] > max_length:
            taken = [overlap(offsets, *place["new_span"]) for place in placed]
            return shorten(item, taken, max_length, where, answers=answers)
        return item

    def _process(
        self, text: str, pictures: list[Any], clips: Sequence[Clip], where: str, *, whole: bool
    ) -> dict[str, Any]:
        if clips and pictures and kind_of(self.processor.video_processor) == SMOL:
            raise DataError(
                f"{where}: {self.name} reads pictures or videos, not both in one conversation; leave the pictures out, or "
                "give them as videos of one frame"
            )
        options: dict[str, Any] = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        if pictures and (own := picture_options(self.processor, whole=whole)):
            options["images_kwargs"] = own
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):  # the template wrote it; the tokenizer would write it again
            options["add_special_tokens"] = False
        try:
            if clips:
                options |= video_arguments(self.processor, clips, self.video_side)
            else:
                options["return_tensors"] = "pt"
            out = dict(self.processor(text=[text], images=[pictures] if pictures else None, **options))
        except (ValueError, TypeError, IndexError, RuntimeError, OSError) as error:
            raise DataError(f"{where}: the processor of {self.name} refuses it: {first_line(error)}") from error
        if isinstance(videos := out.get("pixel_values_videos"), list):
            out["video_frames"] = torch.tensor([len(video) for video in videos])
            out["pixel_values_videos"] = stacked(videos)
        return out


def _token_id(config: Any, processor: Any, what: str) -> int | None:
    found = getattr(config, f"{what}_token_id", None)
    found = getattr(processor, f"{what}_token_id", None) if found is None else found
    return None if found is None else int(found)
