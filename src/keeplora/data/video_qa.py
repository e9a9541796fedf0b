"""Questions about videos as the evaluations of Video-ChatGPT and its kin keep them: a file of questions and one of answers.

``[{"video_name": "v_1", "question": "...", "question_id": "q1"}]`` beside ``[{"answer": "...", "question_id": "q1"}]``; the
name of a video lacks its ending. Training files are LLaVA's. Questions with ``candidates`` are multiple choice, as MVBench has
them. CL-VISTA is made of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from keeplora.data import llava
from keeplora.data.conversation_entries import Entries
from keeplora.data.conversation_spec import ConversationSpec, RawConversations
from keeplora.data.conversations import Conversation
from keeplora.data.sets import FileBytes
from keeplora.data.spec import locate
from keeplora.errors import ConfigError, DataError
from keeplora.files import expand

#: Endings that a video's name may lack, in the order in which they are tried.
ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def read(spec: ConversationSpec, base_dir: Path, probe: bool) -> RawConversations:
    """Read ``train`` (LLaVA's format) and ``test`` (questions: a file, or a folder of files whose names are their kinds).

    ``answers`` is the file of the test's answers, needed where the questions do not hold them; ``videos`` is the folder that
    names of videos start at (default: ``path``, else where relative paths start).
    """
    base = base_dir / expand(spec.path or "")
    if not base.is_dir():
        raise DataError(f"{base}: no such folder; name the one that the files lie in")
    if not isinstance(spec.test, str) or (spec.train is None and not probe):
        raise ConfigError("name the training file as `train` and the file of questions as `test`")
    videos = locate(spec.extra["videos"], base, kind="folder") if "videos" in spec.extra else base
    raw = RawConversations()
    if not probe:
        keys = {"videos": str(videos), "images": str(videos)}
        taught = llava.read(replace(spec, path=str(base), test=None, extra=keys), base_dir, False)
        raw.splits |= {split: found for split, found in taught.splits.items() if split != "test"}
        raw.warnings += taught.warnings
    place = locate(spec.test, base)
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    answers = locate(spec.extra["answers"], base, kind="file") if "answers" in spec.extra else None
    if answers is not None and place.is_dir():
        raise ConfigError(f"`answers` belongs to one file of questions, but `test` is the folder {place}")
    entries = Entries("test", spec.prompt)
    asked = [talk for file in files for talk in _questions(file, answers, videos, entries, place.is_dir())]
    if not asked:
        raise DataError(f"{place}: holds no questions; fill it or name another")
    if entries.repeated:
        raw.warnings.append(f"{entries.repeated} id(s) of test are there more than once; each entry counts")
    raw.splits["test"] = asked
    return raw


def _questions(
    file: Path, answers: Path | None, videos: Path, entries: Entries, one_of_many: bool
) -> list[Conversation]:  # fmt: skip
    found = []
    rows = [_mapping(row, file, number) for number, row in enumerate(llava.load_entries(file), start=1)]
    given = _answers(rows, file, answers) if answers is not None else [{}] * len(rows)
    for number, (row, answer) in enumerate(zip(rows, given, strict=True), start=1):
        where = f"{file}, entry {number}"
        entry = _choice({**row, **answer}, where)
        if one_of_many:
            entry = {"id": f"{file.stem}/{number}", "kind": file.stem, **entry}
        found.append(entries.conversation(entry, (), where, number, (_video(entry, videos, where),)))
    return found


def _mapping(row: Any, file: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{file}, entry {number}: {row!r:.60} is no JSON object; write one for each")
    return row


def _answers(rows: list[Mapping[str, Any]], file: Path, answers: Path) -> list[Mapping[str, Any]]:
    """The answer of each question: by ``question_id`` where all have one, else by position."""
    told = [_mapping(row, answers, number) for number, row in enumerate(llava.load_entries(answers), start=1)]
    if all("question_id" in row for row in (*rows, *told)):
        by_id = {str(row["question_id"]): row for row in told}
        if len(by_id) < len(told):
            raise DataError(f"{answers}: two answers have one question_id; which is right?")
        missing = [row["question_id"] for row in rows if str(row["question_id"]) not in by_id]
        if missing:
            raise DataError(
                f"{answers}: holds no answer to question_id {missing[0]!r} of {file} ({len(missing):,} are missing)"
            )
        told = [by_id[str(row["question_id"])] for row in rows]
    elif len(told) != len(rows):
        raise DataError(
            f"{answers}: {len(told):,} answers to the {len(rows):,} questions of {file}; they must match one by one"
        )
    return [{"answer": row.get("answer")} for row in told]


def _choice(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A question with ``candidates`` with these below it, its answer as the option: "(B) left"."""
    options = entry.get("candidates")
    if options is None:
        return dict(entry)
    if not isinstance(options, list) or not options or len(options) > 26:
        raise DataError(f"{where}: `candidates` is {options!r:.60}; give a list of 1 to 26 options")
    if entry.get("answer") not in options:
        raise DataError(f"{where}: the answer {entry.get('answer')!r:.60} is none of its candidates")
    lines = [f"({chr(ord('A') + n)}) {option}" for n, option in enumerate(options)]
    question = "\n".join([f"Question: {entry.get('question')}", "Options:", *lines])
    return {**entry, "question": question, "answer": lines[options.index(entry["answer"])]}


def _video(entry: Mapping[str, Any], folder: Path, where: str) -> FileBytes:
    name = next((entry[key] for key in ("video_name", "video") if entry.get(key)), None)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: names no video; give `video_name`, or `video` with the path of a file")
    path = folder / expand(name.strip())
    # A dot may be part of the name, so that the ending is put after it rather than in place of what follows the dot.
    choices = [path, *(path.with_name(path.name + ending) for ending in ENDINGS)]
    # A video that is not there keeps the name that it most likely has: the check of files tells it.
    missing = path if path.suffix.lower() in ENDINGS else choices[1]
    return FileBytes(next((choice for choice in choices if choice.is_file()), missing))
