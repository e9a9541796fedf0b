"""Questions and answers out of `datasets`: parquet, JSON lines, tar files, hub; whole, or as a stream.

A row holds ``conversations`` in LLaVA's form, or a question and an answer in columns of their own; pictures in a column
``image`` or ``images``. In a tar file (WebDataset) the row's JSON brings the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from keeplora.data.conversation_entries import ANSWERS, IDS, KINDS, QUESTIONS, Entries
from keeplora.data.conversation_load import grouped, read_files
from keeplora.data.conversation_spec import ConversationSpec, RawConversations
from keeplora.data.conversations import Conversation, ConversationSet, ConversationTask
from keeplora.data.hub_open import Opened, check_stream, counted, open_dataset, source_in_row
from keeplora.data.remote import RemotePath
from keeplora.data.spec import anywhere, listing
from keeplora.data.splits import cap_per_class
from keeplora.data.streams import SampleStream, read_split
from keeplora.data.table import VIDEO_COLUMNS, pick_column, pick_splits
from keeplora.errors import DataError
from keeplora.json_text import parse_json

IMAGES = ("image", "images", "jpg", "png", "jpeg", "webp")


def read(spec: ConversationSpec, base_dir: Path, probe: bool) -> RawConversations | ConversationTask:
    """Take the data set's splits. Pictures are bytes, or paths that start at ``images``, else at the data's folder."""
    check_stream(spec)
    opened = open_dataset(spec, base_dir)
    if "images" in spec.extra:
        opened = replace(opened, base=anywhere(spec.extra["images"], base_dir, kind="folder"))
    chosen = pick_splits(list(opened.splits), spec, opened.where, probe)
    if spec.stream is not None:
        return _streamed(opened, chosen, spec, probe)
    raw = RawConversations()
    for split, name in chosen.items():
        dataset, make = _rows(opened, name, split, spec)
        where = f"{opened.where}, split {name!r}"
        raw.splits[split] = [make(row, str(i), f"{where}, row {i}")[0] for i, row in enumerate(dataset)]
    return raw


class _Conversations:
    """Rows as conversations; small and picklable."""

    def __init__(
        self, spec: ConversationSpec, columns: list[str], base: Path | RemotePath, split: str, where: str
    ) -> None:
        self.base, self.split, self.prompt = base, split, spec.prompt
        extra = spec.extra
        self.image = extra.get("image_column") or next((c for c in IMAGES if c in columns), None)
        self.video = extra.get("video_column") or next((c for c in (*VIDEO_COLUMNS, "videos") if c in columns), None)
        for key, column in (("image_column", self.image), ("video_column", self.video)):
            if column is not None:
                pick_column(column, (), columns, where, key)
        self.words: dict[str, str] = {}
        for key, target, usual in (("question_column", "question", QUESTIONS), ("answer_column", "answer", ANSWERS)):
            if (given := extra.get(key)) is not None:
                self.words[pick_column(given, usual, columns, where, key)] = target

    def __call__(self, row: Mapping[str, Any], key: str, where: str) -> tuple[Conversation, int]:
        entry = {
            self.words.get(name, name): value for name, value in row.items() if name not in (self.image, self.video)
        }
        if isinstance(entry.get("json"), Mapping):
            entry |= entry.pop("json")
        told = entry.get("conversations")
        if isinstance(told, str):
            try:
                entry["conversations"] = parse_json(told)
            except ValueError as error:
                raise DataError(f"{where}: `conversations` is not JSON ({error}); write a list of turns") from error
        if not any(entry.get(name) not in (None, "") for name in IDS):
            entry["id"] = key
        wanted = {*IDS, *KINDS, *QUESTIONS, *ANSWERS, "conversations"}
        entry = {name: value for name, value in entry.items() if name in wanted}
        pictures, videos = (
            tuple(source_in_row(value, self.base, where) for value in _listed(row.get(column) if column else None))
            for column in (self.image, self.video)
        )
        # A stream is not known as a whole: the place of a row makes its key unlike all others.
        made = Entries(self.split, self.prompt).conversation(entry, pictures, where, 0, videos)
        return replace(made, key=f"{self.split}/{key}"), 0


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _rows(opened: Opened, name: str, split: str, spec: ConversationSpec) -> tuple[Any, _Conversations]:
    """The split's rows with pictures left encoded, and what makes conversations of them."""
    import datasets

    dataset, where = opened.splits[name], f"{opened.where}, split {name!r}"
    columns = list(dataset.features or next(iter(dataset.take(1)), {}))
    if spec.stream is None:
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image | datasets.Video):
                dataset = dataset.cast_column(column, type(feature)(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image | datasets.Video):
                dataset = dataset.cast_column(column, datasets.List(type(feature.feature)(decode=False)))
    elif dataset.features:
        dataset = dataset.decode(False)
    return dataset, _Conversations(spec, columns, opened.base, split, where)


def _streamed(opened: Opened, chosen: dict[str, str], spec: ConversationSpec, probe: bool) -> ConversationTask:
    if "test" not in chosen:
        raise DataError(
            f"{opened.where}: has the splits {listing(opened.splits)}; a stream is not cut: name the split to test on with `test`"
        )
    sets: dict[str, Any] = {"train": ConversationSet([], max_pixels=spec.max_pixels)}
    warnings: list[str] = []
    for split, name in chosen.items():
        if probe and split != "test":
            continue
        where = f"{opened.where}, split {name!r}"
        dataset, make = _rows(opened, name, split, spec)
        if split == "train":
            origin = [opened.origin, name, spec.prompt, make.image, make.video, make.words]
            sets[split] = SampleStream(
                dataset, make, counted(spec, opened, name), name=where, origin=origin, videos=make.video is not None
            )
            continue
        found = [sample.item for sample in read_split(dataset, make, spec, where)]
        kept = grouped([item for item in found if isinstance(item, Conversation)], spec) if split == "test" else found
        if split == "test":
            chosen_items = cap_per_class([c.key for c in kept], [""] * len(kept), spec.max_test, spec.split_seed)
            kept = [kept[i] for i in chosen_items]
        usable, lost, told = read_files(kept, spec, split)  # type: ignore[arg-type]
        if not usable:
            raise DataError(f"no usable entry is left in {split}; see that its files can be opened")
        sets[split] = ConversationSet(usable, max_pixels=spec.max_pixels, skipped=lost)
        warnings += told
    return ConversationTask(
        name=spec.name, train=sets["train"], test=sets["test"], validation=sets.get("validation"), scorer=spec.scorer,
        max_new_tokens=spec.max_new_tokens, prompt=spec.prompt, warnings=warnings, licence=spec.licence,
    )  # fmt: skip
