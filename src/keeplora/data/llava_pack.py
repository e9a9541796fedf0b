"""Conversations in one parquet file, encoded pictures and videos included.

Columns: split, id, image or video (or images, videos, lists), conversations (JSON text in LLaVA's form), kind, origin, licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keeplora.data.conversation_entries import Entries
from keeplora.data.conversation_spec import ConversationSpec, RawConversations
from keeplora.data.pack import check_columns
from keeplora.data.sets import HeldBytes
from keeplora.data.spec import listing, locate
from keeplora.errors import ConfigError, DataError
from keeplora.json_text import parse_json

COLUMNS = ("split", "id", "conversations", "kind", "origin", "licence")
_KINDS = {
    **dict.fromkeys(("split", "conversations", "origin", "licence"), "text"), **dict.fromkeys(("id", "kind"), "name"),
    **dict.fromkeys(("image", "video"), "bytes"), **dict.fromkeys(("images", "videos"), "files"),
}  # fmt: skip
SPLITS = ("train", "validation", "test")


def read(spec: ConversationSpec, base_dir: Path, probe: bool) -> RawConversations:
    """Read the pack at ``path``; it knows its own splits."""
    if spec.path is None or spec.split_names:
        raise ConfigError("source 'llava-pack' needs `path`, a parquet file, and knows its own splits")
    file = locate(spec.path, base_dir, kind="file")
    raw, licences = RawConversations(), set()
    entries = {split: Entries(split, spec.prompt) for split in SPLITS}
    for number, row in enumerate(_rows(file)):
        where, split = f"{file}, row {number}", row["split"]
        if split not in entries:
            raise DataError(f"{where}: split {split!r}, not {listing(SPLITS)}; rebuild the pack")
        licences.add(row["licence"] or "unknown")
        if probe and split != "test":
            continue
        pictures, videos = (tuple(map(HeldBytes, _held(row, key))) for key in ("image", "video"))
        entry = {"id": row["id"], "kind": row["kind"], "conversations": _turns(row["conversations"], where)}
        raw.splits.setdefault(split, []).append(entries[split].conversation(entry, pictures, where, number, videos))
    main = "test" if probe else "train"
    if main not in raw.splits:
        raise DataError(f"{file}: holds no rows of {main}" + ("" if probe else "; use it as a probe"))
    raw.licence = ", ".join(sorted(licences))
    return raw


def _held(row: dict[str, Any], key: str) -> list[bytes]:
    """The files of a row: those of the column in the plural, or the one in the singular."""
    return [bytes(data) for data in row.get(f"{key}s") or [row.get(key)] if data]


def _rows(file: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        brief = str(error).splitlines()[0][:120]
        raise DataError(f"{file}: cannot be read as parquet ({brief}); fetch or build it again") from error
    check_columns(table.schema, file, _KINDS)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if not {"image", "images", "video", "videos"} & set(table.column_names):
        missing.append("image")
    if missing:
        raise DataError(
            f"{file}: not a pack of conversations, the column(s) {listing(missing)} are missing; rebuild it"
        )
    return table.to_pylist()


def _turns(text: Any, where: str) -> Any:
    try:
        return parse_json(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: `conversations` is not JSON ({error}); rebuild the pack") from error
