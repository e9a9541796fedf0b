"""A person's own questions or captions: CSV, TSV or JSONL, one row for each picture or video, question and answer."""

from __future__ import annotations

from pathlib import Path

from keeplora.data.conversation_entries import (
    ANSWERS,
    IDS,
    KINDS,
    QUESTIONS,
    Entries,
    pictures_of,
    videos_of,
)
from keeplora.data.conversation_spec import ConversationSpec, RawConversations
from keeplora.data.conversations import Conversation
from keeplora.data.spec import anywhere
from keeplora.data.table import IMAGE_COLUMNS, VIDEO_COLUMNS, Row, Table, pick_column, split_tables
from keeplora.errors import ConfigError


def read(spec: ConversationSpec, base_dir: Path, probe: bool) -> RawConversations:
    """One table for each split, or one at ``path`` whose split column (where it has one) tells them apart.

    Pictures' paths start at ``images``, videos' at ``videos``, else at the table's folder. A table has a column of pictures,
    one of videos, or both; a row without either is a question about none. Without a column of questions, ``prompt`` is the
    question.
    """
    raw = RawConversations()
    images, videos = (
        anywhere(spec.extra[key], base_dir, kind="folder") if key in spec.extra else None
        for key in ("images", "videos")
    )
    for split, (table, rows, columns) in split_tables(spec, base_dir, probe).items():
        folders = (images or table.parent, videos or images or table.parent)
        raw.splits[split] = _read(table, rows, columns, split, spec, folders)
    return raw


def _read(
    table: Table, rows: list[Row], columns: list[str], split: str, spec: ConversationSpec, folders: tuple[Table, Table]
) -> list[Conversation]:
    video = spec.extra.get("video_column") or next((name for name in VIDEO_COLUMNS if name in columns), None)
    if video is not None:
        video = pick_column(video, (), columns, table, "video_column")
    image = spec.extra.get("image_column")
    if image is not None or video is None or any(name in columns for name in ("image", "images")):
        image = pick_column(image, IMAGE_COLUMNS, columns, table, "image_column")
    answer = pick_column(spec.extra.get("answer_column"), ANSWERS, columns, table, "answer_column")
    question = None
    if "question_column" in spec.extra or spec.prompt is None or any(name in columns for name in QUESTIONS):
        question = pick_column(spec.extra.get("question_column"), QUESTIONS, columns, table, "question_column")
    named = [column for column in (image, video) if column is not None]
    if len({*named, answer, question}) < len(named) + 2:
        raise ConfigError(
            f"{table}: one column cannot be picture or video, question and answer at once; name a column for each"
        )
    entries, found = Entries(split, spec.prompt), []
    for line, row in rows:
        where = f"{table}, line {line}"
        entry = {
            "image": row.get(image) if image else None,
            "video": row.get(video) if video else None,
            "answer": row.get(answer),
            "question": row.get(question) if question else None,
        }
        entry |= {name: row[name] for name in (*IDS, *KINDS) if name in row and name not in (*named, answer, question)}
        pictures, videos = pictures_of(entry, folders[0], where), videos_of(entry, folders[1], where)
        found.append(entries.conversation(entry, pictures, where, line, videos))
    return found
