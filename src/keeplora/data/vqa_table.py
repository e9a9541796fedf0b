"""A person's own questions or captions: CSV, TSV or JSONL, one row for each picture, question and answer."""

from __future__ import annotations

from pathlib import Path

from keeplora.data.conversation_entries import ANSWERS, IDS, KINDS, QUESTIONS, Entries, pictures_of
from keeplora.data.conversation_spec import ConversationSpec, RawConversations
from keeplora.data.conversations import Conversation
from keeplora.data.spec import locate
from keeplora.data.table import IMAGE_COLUMNS, Row, pick_column, split_tables
from keeplora.errors import ConfigError


def read(spec: ConversationSpec, base_dir: Path, probe: bool) -> RawConversations:
    """One table for each split, or one at ``path`` whose split column (where it has one) tells them apart.

    Pictures' paths start at ``images``, else at the table's folder. A row without a picture is a question about none. Without
    a column of questions, ``prompt`` is the question.
    """
    raw = RawConversations()
    images = locate(spec.extra["images"], base_dir, kind="folder") if "images" in spec.extra else None
    for split, (table, rows, columns) in split_tables(spec, base_dir, probe).items():
        raw.splits[split] = _read(table, rows, columns, split, spec, images or table.parent)
    return raw


def _read(
    table: Path, rows: list[Row], columns: list[str], split: str, spec: ConversationSpec, images: Path
) -> list[Conversation]:
    image = pick_column(spec.extra.get("image_column"), IMAGE_COLUMNS, columns, table, "image_column")
    answer = pick_column(spec.extra.get("answer_column"), ANSWERS, columns, table, "answer_column")
    question = None
    if "question_column" in spec.extra or spec.prompt is None or any(name in columns for name in QUESTIONS):
        question = pick_column(spec.extra.get("question_column"), QUESTIONS, columns, table, "question_column")
    if len({image, answer, question}) < 3:
        raise ConfigError(f"{table}: one column cannot be picture, question and answer at once; name three columns")
    entries, found = Entries(split, spec.prompt), []
    for line, row in rows:
        where = f"{table}, line {line}"
        entry = {
            "image": row.get(image),
            "answer": row.get(answer),
            "question": row.get(question) if question else None,
        }
        entry |= {name: row[name] for name in (*IDS, *KINDS) if name in row and name not in (image, answer, question)}
        found.append(entries.conversation(entry, pictures_of(entry, images, where), where, line))
    return found
