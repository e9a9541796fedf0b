"""Sample answers before, right after and at the end, with the picture; and, over the whole test set, what became of each.

A video is shown by some of its frames, side by side. Read from the run directory: ``predictions/after-I/SET.jsonl`` (every
answer at moment I, 0 is the untouched model) and
``samples/SET.json`` with its pictures (a few items drawn before anything was answered). Either may be missing.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.files import read_regular, real_path
from keeplora.json_text import MAX_BYTES, parse_json, read_json
from keeplora.report.charts import number
from keeplora.report.runs import Run
from keeplora.report.tables import Cell, Table

RIGHT_FROM = 0.5
"""A graded answer counts as right in `fate` from this score on; where a scorer knows only 0 and 1 it changes nothing."""
SHOWN = 4
PICTURE_BYTES = 400_000
PAGE_BYTES = 3_000_000
TEXT = 400

FATES = {
    "learned": "wrong before, right when learned and still at the end",
    "forgotten": "right when learned, wrong at the end",
    "kept": "right every time",
    "never": "wrong every time",
    "lost": "right before, wrong since",
    "late": "wrong when learned, right at the end",
}
"""What can become of an item; every item of a set with three moments has exactly one."""
FATE_NAMES = {"never": "never right", "late": "right later"}
MARKS = {"right": "✓", "partly": "◐", "wrong": "✗", "unscored": "?"}
MAGIC = {b"RIFF": "image/webp", b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Answer:
    """What the model said at one moment; ``score`` is in 0..1, or None where the line holds none."""

    text: str
    score: float | None

    @property
    def mark(self) -> str:
        """ "right" (1), "wrong" (0), "partly" between them.

        >>> [Answer("x", score).mark for score in (1.0, 0.3, 0.0, None)]
        ['right', 'partly', 'wrong', 'unscored']
        """
        if self.score is None:
            return "unscored"
        return "right" if self.score >= 1 - 1e-9 else "wrong" if self.score <= 1e-9 else "partly"

    @property
    def verdict(self) -> str:
        """The mark in a symbol and a word, with the score where it is neither 0 nor 1."""
        more = f" · {number(self.score, 2)}" if self.mark == "partly" else ""
        return f"{MARKS[self.mark]} {self.mark}{more}"

    @property
    def good(self) -> bool | None:
        return None if self.score is None else self.score >= RIGHT_FROM


@dataclass(frozen=True)
class Moment:
    """A column of answers: its role ("before", "learned" or "end"), its row in the matrix, and its words."""

    role: str
    after: int
    short: str
    label: str


@dataclass
class Item:
    """One stored sample; ``picture`` is a data URI, or None with ``missing`` saying why."""

    question: str
    references: list[str]
    answers: list[tuple[Moment, Answer | None]]
    fate: str | None
    picture: str | None = None
    missing: str = ""
    pictures: int = 1
    times: list[float] = field(default_factory=list)
    """Of a video: when its frames were, in seconds; its ``picture`` shows them side by side."""

    @property
    def film(self) -> str:
        """What a strip of frames shows, in words; "" for a picture.

        >>> Item("?", [], [], None, times=[0.0, 1.25]).film
        '2 frames, 0 s to 1.25 s'
        """
        if not self.times:
            return ""
        if len(self.times) == 1:
            return f"1 frame, at {self.times[0]:.3g} s"
        return f"{len(self.times)} frames, {self.times[0]:.3g} s to {self.times[-1]:.3g} s"

    @property
    def fate_name(self) -> str:
        return FATE_NAMES.get(self.fate or "", self.fate or "")


@dataclass
class SetAnswers:
    """One set: its moments, the samples that are shown first and the others, and the counts over its whole test set."""

    name: str
    number: int | None
    scorer: str | None
    moments: list[Moment]
    total: int
    counts: dict[str, int]
    graded: bool
    shown: list[Item] = field(default_factory=list)
    others: list[Item] = field(default_factory=list)

    @property
    def three(self) -> bool:
        """Whether the set is seen before, right after its task, and later than that."""
        return {moment.role for moment in self.moments} >= {"learned", "end"}


def clean(text: Any, most: int = TEXT) -> str:
    """Text that a page can hold: no control characters, no halves of surrogate pairs, not endless.

    >>> clean("two\\x00 cats\\n", 5)
    'two\\ufffd …'
    """
    told = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))
    told = told.strip()
    return told if len(told) <= most else told[:most] + "…"


def fate(states: Mapping[str, bool | None]) -> str | None:
    """What became of an item, from whether it was right "before", when "learned" and at the "end"; None if unknown.

    Without a moment of learning, "end" against "before": learned (also of a set that is not trained on), kept, lost
    or never.

    >>> fate({"before": False, "learned": True, "end": False}), fate({"before": True, "end": False})
    ('forgotten', 'lost')
    """
    if any(state is None for state in states.values()) or len(states) < 2:
        return None
    before, learned, end = (states.get(role) for role in ("before", "learned", "end"))
    if learned is not None and end is not None and learned != end:
        return "forgotten" if learned else "late"
    now = learned if end is None else end
    if now:
        return "learned" if before is False else "kept"
    return "lost" if before else "never"


def _inside(run: Run, place: Any) -> Path | None:
    """A file of the run directory; None where there is none, or where the name leads out of it."""
    try:
        path = real_path(run.path / str(place))
        return path if path.is_relative_to(real_path(run.path)) and path.is_file() else None
    except (OSError, ValueError):
        return None


def _score(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _predictions(run: Run, name: str, after: int) -> dict[tuple[str, int], Answer]:
    """Answers by key and by how often the key came before; empty where the file is missing."""
    path = _inside(run, f"predictions/after-{after}/{name}.jsonl")
    found: dict[tuple[str, int], Answer] = {}
    seen: Counter[str] = Counter()
    text = read_regular(path, MAX_BYTES).decode("utf-8", errors="replace") if path else ""
    for line in text.split("\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "key" in row:
            key = str(row["key"])
            found[key, seen[key]] = Answer(clean(row.get("prediction") or ""), _score(row.get("score")))
            seen[key] += 1
    return found


def _samples(run: Run, name: str) -> list[dict[str, Any]]:
    path = _inside(run, f"samples/{name}.json")
    try:
        entries = read_json(path) if path else []
    except ValueError:
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _moments(run: Run, task: int | None) -> list[Moment]:
    """The moments of a set that are told apart; ``task`` is the number of the task it belongs to, None for a probe."""
    done = run.done if run.learns else 0
    found = [Moment("before", 0, "before", "the untouched model")]
    if task is not None and 0 < task <= done:
        which = "" if done > task else ", the latest" if done < len(run.tasks) else ", the last"
        found.append(Moment("learned", task, "when learned", f"right after it was learned (task {task}{which})"))
    if done > (task or 0) or (done and len(found) == 1):
        words, unseen = "at the end" if run.finished else "now", task is not None and done < task
        found.append(Moment("end", done, words, f"after task {done}{', before its own' if unseen else ''}"))
    return found


def _picture(run: Run, item: Item, place: Any, budget: int) -> int:
    """Put the picture into the item as a data URI; returns what is left of the budget."""
    path = _inside(run, place) if place else None
    if path is None:
        item.missing = "no picture" if not place else "its file is missing"
        return budget
    data = path.read_bytes()
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        item.missing = "its file is no picture"
    elif len(data) > PICTURE_BYTES:
        item.missing = "too large for this page"
    elif len(data) * 4 // 3 > budget:
        item.missing = "left out, to keep this page small"
    else:
        item.picture = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
        return budget - len(item.picture)
    return budget


def choose(fates: Sequence[str | None], most: int = SHOWN) -> list[int]:
    """Which samples to show: one of each fate in the order of `FATES`, then round again, the earliest of a fate
    first; those of which nothing is known last.

    >>> choose(["kept", "kept", "never", "learned", "kept", None])
    [3, 0, 2, 1]
    """
    place = {name: k for k, name in enumerate(FATES)}
    seen: Counter[str | None] = Counter()
    ranks = []
    for i, one in enumerate(fates):
        ranks.append((one is None, seen[one], place.get(one or "", len(place)), i))
        seen[one] += 1
    return [i for *_, i in sorted(ranks)[:most]]


def _read_set(run: Run, name: str, task: int | None) -> tuple[SetAnswers, list[tuple[Item, Any]]]:
    answers = {moment: _predictions(run, name, moment.after) for moment in _moments(run, task)}
    answers = {moment: found for moment, found in answers.items() if found}
    moments = list(answers)
    keys = list(next(iter(answers.values()))) if answers else []

    def become(key: tuple[str, int]) -> str | None:
        states = {m.role: answers[m][key].good if key in answers[m] else None for m in moments}
        return fate(states)

    counts = Counter(one for key in keys if (one := become(key)) is not None)
    graded = any(answer.mark == "partly" for found in answers.values() for answer in found.values())
    items = [
        (
            Item(
                clean(entry.get("question", "")), [clean(one) for one in entry.get("references") or []],
                [(m, answers[m].get((str(entry.get("key")), 0))) for m in moments], become((str(entry.get("key")), 0)),
                pictures=entry["pictures"] if isinstance(entry.get("pictures"), int) else 1,
                times=[float(t) for t in entry.get("times") or [] if isinstance(t, int | float)],
            ),
            entry.get("picture"),
        )
        for entry in _samples(run, name)
    ]  # fmt: skip
    first = choose([item.fate for item, _ in items])
    ordered = [items[i] for i in first] + [pair for i, pair in enumerate(items) if i not in first]
    found = SetAnswers(
        name, task, run.scorers.get(name), moments, len(keys), dict(counts), graded,
        [item for item, _ in ordered[: len(first)]], [item for item, _ in ordered[len(first) :]],
    )  # fmt: skip
    return found, ordered


def _share(count: int, total: int) -> str:
    return f"{count} ({number(100 * count / total, 0)}\u00a0%)" if total else "–"


def count_tables(found: Sequence[SetAnswers]) -> list[Table]:
    """What became of every test question: the sets with three moments, then those with two."""
    made = []
    for three in (True, False):
        fates = list(FATES) if three else [name for name in FATES if name not in ("forgotten", "late")]
        chosen = [one for one in found if one.three == three and len(one.moments) > 1]
        rows: list[list[Cell | str]] = [
            [
                one.name if one.number is None else f"{one.number} · {one.name}",
                *([] if three else [" → ".join(moment.short for moment in one.moments)]),
                str(one.total),
                *(_share(one.counts.get(name, 0), sum(one.counts.values())) for name in fates),
            ]
            for one in chosen
        ]
        caption = "Every test question: before the first task, right after its own, and " + (
            chosen[0].moments[-1].short if chosen else ""
        )
        head = ["set", "questions", *(FATE_NAMES.get(name, name) for name in fates)]
        if not three:
            caption = (
                "Every test question of sets with two moments (learned: wrong, then right; lost: right, then wrong)"
            )
            head.insert(1, "moments")
        if rows:
            made.append(Table(caption, head, rows, () if three else (1,), sticky=True))
    return made


def read_answers(run: Run, *, pictures: bool = True) -> list[SetAnswers]:
    """Tasks in the order learned, then the general sets; a set without an answer is left out.

    Pictures are read until the page holds `PAGE_BYTES` of them: those of the items shown first, then the others'.
    """
    if not run.accuracy:
        return []
    sets = [(name, i) for i, name in enumerate(run.tasks, start=1)] + [(name, None) for name in run.probes]
    found = [_read_set(run, name, task) for name, task in sets]
    found = [pair for pair in found if pair[0].moments]
    budget = PAGE_BYTES
    for first in (True, False) if pictures else ():
        for one, ordered in found:
            cut = len(one.shown)
            for item, place in ordered[:cut] if first else ordered[cut:]:
                budget = _picture(run, item, place, budget)
    return [one for one, _ in found]
