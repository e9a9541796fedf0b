"""What a task of questions and answers lacks: files, pictures, counts; and what leaks from train into test."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from keeplora.data.conversation_load import entries_of, grouped, handle_leaks, probe_splits
from keeplora.data.conversation_spec import CAPTION_SCORERS, ConversationSpec, RawConversations
from keeplora.data.conversations import Conversation
from keeplora.data.doctor.check import Progress, TaskCheck, miscounted
from keeplora.data.doctor.layouts import look_for
from keeplora.data.doctor.look import Look, doubtful_digests, look_at
from keeplora.data.sets import ByteSource, Entry, FileBytes
from keeplora.data.spec import listing
from keeplora.files import expand

Read = Callable[[ConversationSpec, Path, bool], RawConversations]


def examine_questions(
    check: TaskCheck, spec: ConversationSpec, base: Path, read: Read, *, probe: bool, full: bool, progress: Progress
) -> None:
    """Fill ``check``; see `keeplora.data.doctor.examine.examine`."""
    root = Path(os.path.abspath(base / expand(spec.path or "")))
    check.folder = str(root if root.is_dir() or not root.exists() else root.parent)
    check.found, check.missing = look_for(Path(check.folder), _named(spec))
    check.problems += [f"{check.folder}: lacks {name}" for name in check.missing]
    if check.missing:
        return
    raw = read(spec, base, probe)
    splits = probe_splits(raw, spec) if probe else dict(raw.splits)
    if "test" in splits:
        splits["test"] = grouped(splits["test"], spec)
    check.notes += raw.warnings
    check.missing = _missing_folders(splits, Path(check.folder))
    check.problems += [f"{check.folder}: lacks {name}" for name in check.missing]
    check.pictures = {split: len(found) for split, found in splits.items()}
    if "test" in splits:
        wanted: Mapping[str, int | None] = spec.expect
        check.problems += miscounted(check.pictures, wanted)
    if check.missing:
        return
    looks = _pictures(check, splits, spec, full, progress)
    check.notes += _answers(splits, spec)
    _leaks(check, splits, spec, looks)


def _named(spec: ConversationSpec) -> tuple[str, ...]:
    """The files and the folders that the description names; those of a table or pack are told by its source."""
    if spec.source not in ("llava", "video-qa"):
        return ()
    files = [*spec.split_names.values(), *(spec.extra[key] for key in ("answers", "references") if key in spec.extra)]
    folders = dict.fromkeys(spec.extra[key] for key in ("images", "videos") if key in spec.extra)
    return (*files, *(f"{folder.rstrip('/')}/" for folder in folders))


def _missing_folders(splits: Mapping[str, Sequence[Conversation]], root: Path) -> list[str]:
    """Folders that pictures and videos are said to be in and that are not there, the uppermost of each."""
    sources = (source for found in splits.values() for c in found for source in (*c.pictures, *c.videos))
    folders = {Path(os.path.abspath(source.path.parent)) for source in sources if isinstance(source, FileBytes)}
    missing = set()
    for folder in folders:
        top = None
        while not folder.exists():
            top, folder = folder, folder.parent
        if top is not None:
            missing.add(os.path.relpath(top, root) + "/")
    return sorted(missing)


def _pictures(
    check: TaskCheck,
    splits: Mapping[str, Sequence[Conversation]],
    spec: ConversationSpec,
    full: bool,
    progress: Progress,
) -> dict[ByteSource, tuple[Entry, Look]]:
    """A look at every picture and video, once."""
    fresh = {split: entries_of(found) for split, found in splits.items()}
    total, done = sum(map(len, fresh.values())), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(spec.name, done, total)

    looks: dict[ByteSource, tuple[Entry, Look]] = {}
    for split, entries in fresh.items():
        new = [entry for source, entry in entries.items() if source not in looks]
        pairs = list(zip(new, look_at(new, full=full, max_pixels=spec.max_pixels, tick=tick), strict=True))
        check.tally(pairs, split, skip=spec.on_error == "skip")
        looks |= {entry.source: (entry, look) for entry, look in pairs}
    return looks


def _answers(splits: Mapping[str, Sequence[Conversation]], spec: ConversationSpec) -> list[str]:
    """Entries that say the same twice, and answers of the test that training never shows."""
    notes = []
    for split, found in splits.items():
        times = Counter((c.pictures, c.videos, c.turns) for c in found)
        if again := sum(times.values()) - len(times):
            what = "video" if any(c.videos for c in found) else "picture"
            notes.append(f"{again:,} entries of {split} repeat another's {what}, question and answer")
    if spec.scorer not in CAPTION_SCORERS and "train" in splits and "test" in splits:
        known = {turn.text.strip().lower() for c in splits["train"] for turn in c.turns if turn.role == "assistant"}
        new = [c for c in splits["test"] if not known & {reference.lower() for reference in c.references}]
        if new:
            shown = listing(sorted({repr(c.references[0]) for c in new}), 3)
            notes.append(f"{len(new):,} of {len(splits['test']):,} answers of test never occur in train: {shown}")
    return notes


def _leaks(
    check: TaskCheck, splits: dict[str, list[Conversation]], spec: ConversationSpec,
    looks: Mapping[ByteSource, tuple[Entry, Look]],
) -> None:  # fmt: skip
    digests = doubtful_digests(pair for pair in looks.values() if not pair[1].problem)
    names = {source: digests.get(id(entry), entry.key) for source, (entry, _) in looks.items()}
    notes = handle_leaks(splits, "warn", lambda c: "/".join(names[source] for source in (*c.pictures, *c.videos)))[1]
    (check.problems if spec.duplicates == "refuse" else check.notes).extend(notes)
    for what in ("picture", "video"):
        sides = {
            split: {names[source] for c in found for source in (c.videos if what == "video" else c.pictures)}
            for split, found in splits.items()
        }
        if shared := len(sides.get("train", set()) & sides.get("test", set())):
            check.notes.append(f"{shared:,} {what}(s) are in train and in test, under the same or other questions")
