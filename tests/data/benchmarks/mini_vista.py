"""Miniature CL-VISTA with its general benchmarks, in the layout that their authors publish: a few small clips for each.

The clips of one answer share a tint, so that a model can learn them; every clip differs from all others. They are real files:
MPEG-4 and H.264 in MP4, AVI and Matroska, 12 frames of 32 by 24 pixels.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.benchmarks.mini import picture

TRAIN, TEST, FRAMES, SIZE = 6, 3, 12, (32, 24)
Row = tuple[str, str, str]  # video with its ending, question, answer

#: task -> (file of training, of questions, of answers, folder of videos, endings, question, answers)
TASKS: dict[str, tuple[str, str, str, str, Sequence[str], str, Sequence[str]]] = {
    "Counting": (
        "json_row/train_data_20k", "json_row/test_questions_2k", "json_row/test_answers_2k", "youtube", (".mp4",),
        "How many times does the ball bounce?", ("2", "3"),
    ),
    "Space": (
        "json_row/train_30k", "json_row/test_questions_2k", "json_row/test_answers_2k", "scannet_videos_fps1", (".mp4",),
        "Which is closer to the door, the chair or the table?", ("The chair.", "The table."),
    ),
    "Traffic": (
        "json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k", "videos", (".mp4", ".avi"),
        "Does the car stop at the crossing?", ("Yes, it stops.", "No, it drives on."),
    ),
    "Movie": (
        "train_json_row/movie_train_subtitle_30k", "test_json_row/test_question_2k", "test_json_row/test_answer_2k", "videos",
        (".mkv",), "Subtitles: Where were you? What does she ask?", ("Where he was.", "Who he is."),
    ),
    "GUI": (
        "json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k", "videos", (".mp4",),
        "What is clicked after the menu opens?", ("Settings", "Help"),
    ),
    "Science": (
        "json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k", "videos", (".mp4",),
        "Which reaction is shown?", ("Combustion", "Electrolysis"),
    ),
    "Sports": (
        "json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k", "videos", (".mp4", ".mov"),
        "Who serves first?", ("The player in red.", "The player in blue."),
    ),
    "STAR": (
        "json_row/train_data_25k", "json_row/test_questions_2k", "json_row/test_answers_2k", "Charades_v1_480", (".mp4",),
        "What did the person do before opening the door?", ("Put down the book.", "Took the bag."),
    ),
}  # fmt: skip
#: probe -> (questions, answers, videos)
PROBES = {
    "MMVU": ("MMVU/MMVU_test_q.json", "MMVU/MMVU_test_a.json", "MMVU/videos"),
    "NextQA": ("nextqa/scripts/val.q.json", "nextqa/scripts/val.a.json", "nextqa/NExTVideo"),
    "LongVideoBench": (
        "LongVideoBench/lvb_questions.json", "LongVideoBench/lvb_answers.json", "LongVideoBench/videos"
    ),
    "MMBench-Video": (
        "MMBench-Video/MMBench-Video_q.json", "MMBench-Video/MMBench-Video_a.json", "MMBench-Video/video_pkl/mp4_out"
    ),
}  # fmt: skip
MVBENCH = {"action_sequence": ("opens the door", "closes the door"), "moving_direction": ("Up", "Down", "Left")}


def write_clip(path: Path, source: str, answer: str, number: int, seed: int = 0, codec: str = "mpeg4") -> None:
    """A clip whose second half is darker than its first."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    shown = picture(source, seed, answer, number, SIZE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=6)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for n in range(FRAMES):
            pixels = (shown * (1.0 if n < FRAMES // 2 else 0.5)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def make_vista(folder: Path, seed: int = 0) -> Path:
    """The eight tasks' and the five benchmarks' folders below ``folder``."""
    for name, (train, questions, answers, videos, endings, question, told) in TASKS.items():
        rows: dict[str, list[Row]] = {"train": [], "test": []}
        for split, count in (("train", TRAIN), ("test", TEST)):
            for n in range(count):
                answer = told[n % len(told)]
                # Names with dots in them: the ending of a test's video is not what follows the last dot of its name.
                place = f"{name}/{videos}/{split}.{n}_v{endings[n % len(endings)]}"
                codec = "libx264" if n % 2 else "mpeg4"
                write_clip(folder / place, name, answer, _number(place), seed, codec)
                rows[split].append((place, question, answer))
        _write(folder / name / f"{train}.json", [_talk(name, n, row) for n, row in enumerate(rows["train"])])
        asked, given = _pair(rows["test"], f"{name}_test")
        _write(folder / name / f"{questions}.json", asked)
        _write(
            folder / name / f"{answers}.json", [*given[1:], given[0]] if name == "GUI" else given
        )  # ids tell which is which
    for name, (questions, answers, videos) in PROBES.items():
        rows_of = []
        for n in range(TEST):
            answer = ("A man cooks.", "B. a dog")[n % 2]
            write_clip(folder / videos / f"{n}.mp4", name, answer, n, seed)
            rows_of.append((f"{n}.mp4", "What is going on?", answer))
        asked, given = _pair(rows_of, None if name == "NextQA" else name)
        _write(folder / questions, asked)
        _write(folder / answers, given)
    for name, options in MVBENCH.items():
        rows_mv = []
        for n in range(2):
            write_clip(folder / f"MVBench/videos/{name}_{n}.mp4", name, options[n], n, seed)
            rows_mv.append({
                "video": f"{name}_{n}.mp4", "question": "What happens?", "candidates": list(options), "answer": options[n],
                "start": 0.2, "end": 1.4,
            })  # fmt: skip
        _write(folder / f"MVBench/json/{name}.json", rows_mv)
    return folder


def _number(place: str) -> int:
    return zlib.crc32(place.encode()) % 10_000


def _talk(name: str, number: int, row: Row) -> dict[str, Any]:
    """Video-LLaVA's files mark the video as "<image>", in some tasks once for each frame, in others as "<video>"."""
    place, question, answer = row
    mark = {"Counting": "<video>", "Movie": "<image>" * 8}.get(name, "<image>")
    return {
        "id": number, "video": place,
        "conversations": [{"from": "human", "value": f"{mark}\n{question}"}, {"from": "gpt", "value": answer}],
    }  # fmt: skip


def _pair(rows: Sequence[Row], prefix: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions and answers side by side; with ids where there is a ``prefix``."""
    asked, given = [], []
    for n, (place, question, answer) in enumerate(rows):
        name = {"question_id": f"{prefix}_{n}"} if prefix else {}
        asked.append(
            {"video_name": place.rsplit(".", 1)[0], "question": question, "question_id": f"{prefix or 'q'}_{n}"}
        )
        given.append({"answer": answer, **name})
    return asked, given


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
