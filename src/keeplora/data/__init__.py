"""Task sources: folders, tables, `datasets`, parquet packs; questions and answers in LLaVA's format and in tables.

A new source is one file with ``read(spec, base_dir, probe)``, which returns a `RawTask` or, for questions, `RawConversations`,
and one line in `SOURCES`.

>>> from keeplora.data import load_task
>>> task = load_task({"name": "pets", "source": "folder", "path": "pets"}, Path("."))  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeplora.data.conversation_load import assemble_conversations
from keeplora.data.conversation_spec import ConversationSpec, parse
from keeplora.data.conversations import ConversationSet, ConversationTask
from keeplora.data.load import assemble
from keeplora.data.pictures import decode_picture, read_picture
from keeplora.data.sets import PictureSet, TaskData
from keeplora.data.spec import Source
from keeplora.data.splits import split_validation
from keeplora.errors import DataError
from keeplora.files import expand

_TABLE = {"image_column", "split_column", "delimiter"}
#: Every source by name.
SOURCES: dict[str, Source] = {
    "folder": Source("keeplora.data.folder"),
    "table": Source("keeplora.data.table", frozenset(_TABLE | {"label_column", "video_column"})),
    "datasets": Source(
        "keeplora.data.hub", frozenset({"image_column", "label_column", "config", "revision", "streaming"})
    ),
    "pack": Source("keeplora.data.pack", frozenset({"task"})),
    "fgvc-aircraft": Source("keeplora.data.benchmarks.fgvc_aircraft"),
    "caltech101": Source("keeplora.data.benchmarks.caltech101"),
    "cifar100": Source("keeplora.data.benchmarks.cifar100"),
    "dtd": Source("keeplora.data.benchmarks.dtd"),
    "eurosat": Source("keeplora.data.benchmarks.eurosat"),
    "flowers102": Source("keeplora.data.benchmarks.flowers102"),
    "food101": Source("keeplora.data.benchmarks.food101"),
    "mnist": Source("keeplora.data.benchmarks.mnist", frozenset({"shots"})),
    "oxford-pet": Source("keeplora.data.benchmarks.oxford_pet"),
    "stanford-cars": Source("keeplora.data.benchmarks.stanford_cars"),
    "sun397": Source("keeplora.data.benchmarks.sun397"),
    "coop": Source("keeplora.data.benchmarks.coop", frozenset({"split_file", "images", "shots"})),
    "llava": Source("keeplora.data.llava", frozenset({"images", "videos", "references"}), "generation"),
    "llava-pack": Source("keeplora.data.llava_pack", kind="generation"),
    "video-qa": Source("keeplora.data.video_qa", frozenset({"answers", "videos"}), "generation"),
    "vqa-table": Source(
        "keeplora.data.vqa_table",
        frozenset(_TABLE | {"images", "videos", "video_column", "question_column", "answer_column"}),
        "generation",
    ),
    "vqa-datasets": Source(
        "keeplora.data.hub_vqa",
        frozenset(
            {
                "images",
                "image_column",
                "video_column",
                "question_column",
                "answer_column",
                "config",
                "revision",
                "streaming",
            }
        ),
        "generation",
    ),
}


def load_task(spec: Mapping[str, Any], base_dir: str | Path, *, probe: bool = False) -> TaskData | ConversationTask:
    """Load one task, or one probe set that is tested but never trained on.

    Every picture file is read once (hash and header check; ``check: full`` decodes it too); pictures are decoded
    again when asked for, and never kept.

    Args:
        spec: ``name``, ``source`` (one of `SOURCES`), ``path`` or ``train`` / ``test`` / ``validation``,
            and the options that docs/data.md lists.
        base_dir: where relative paths start; a ``base_dir`` of the spec's own is laid over it.
        probe: only ``test`` is filled; a source without a test split gives all it has.

    Returns:
        The task, of the source's kind; things that a person should know but that stop nothing are in its ``warnings``.

    Raises:
        ConfigError: a key or value of ``spec``.
        DataError: a file, row or class, named, with the way to mend it.
    """
    parsed = parse(spec, SOURCES)
    reader = importlib.import_module(SOURCES[parsed.source].module)
    try:
        raw = reader.read(parsed, Path(base_dir) / expand(parsed.base_dir), probe)
        if isinstance(raw, TaskData | ConversationTask):  # a stream is not assembled: it is not known what is in it
            return raw
        if isinstance(parsed, ConversationSpec):
            return assemble_conversations(raw, parsed, probe=probe)
        return assemble(raw, parsed, probe=probe)
    except DataError as error:
        raise type(error)(f"task {parsed.name!r}: {error}") from error


__all__ = [
    "SOURCES", "ConversationSet", "ConversationTask", "PictureSet", "TaskData", "decode_picture", "load_task",
    "read_picture", "split_validation",
]  # fmt: skip
