"""From the conversations that a source found to a task: splits, caps, checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from keeplora.data.checks import check_entries, handle_duplicates
from keeplora.data.conversation_spec import CAPTION_SCORERS, ConversationSpec, RawConversations
from keeplora.data.conversations import (
    IMAGE,
    VIDEO,
    Conversation,
    ConversationSet,
    ConversationTask,
    file_digests,
    picture_name,
)
from keeplora.data.sets import ByteSource, Entry, HeldBytes
from keeplora.data.spec import DEFAULT_TEST_FRACTION, SPLIT_ALIASES
from keeplora.data.splits import cap_per_class, holdout, split_validation
from keeplora.errors import DataError


def assemble_conversations(raw: RawConversations, spec: ConversationSpec, *, probe: bool) -> ConversationTask:
    """Build the task, in the order of `keeplora.data.load.assemble`: a cut test set is cut from whole pictures only, and
    caps come before pictures are read, where they can."""
    found = probe_splits(raw, spec) if probe else raw.splits
    splits = {split: found[split] for split in SPLIT_ALIASES if split in found}
    warnings = list(raw.warnings)
    skipped: dict[str, list[Conversation]] = {}
    if "test" not in splits:
        splits, told = _cut_test(splits, spec)
        warnings += told
    splits["test"] = grouped(splits["test"], spec)
    if probe:
        splits = {"test": splits["test"]}
    for split, limit in (("train", spec.max_train), ("test", spec.max_test), ("validation", None)):
        if split not in splits:
            continue
        kept = splits[split]
        chosen = cap_per_class([c.key for c in kept], [""] * len(kept), limit, spec.split_seed)
        splits[split], skipped[split], told = read_files([kept[i] for i in chosen], spec, split)
        warnings += told
    splits, told = handle_leaks(splits, spec.duplicates, lambda c: "/".join(file_digests(c)))
    warnings += told
    for split, kept in splits.items():
        if not kept:
            raise DataError(f"no usable entry is left in {split}; see that its files can be opened")
    warnings += _unexpected(splits, spec)
    sets = {
        # What cannot be read cannot be learned; in a test it still counts, as a question that is not answered.
        split: ConversationSet(
            kept, max_pixels=spec.max_pixels, skipped=() if split == "train" else skipped.get(split, ())
        )
        for split, kept in splits.items()
    }
    train = sets.get("train", ConversationSet([], max_pixels=spec.max_pixels))
    validation = sets.get("validation")
    if isinstance(spec.validation, float) and not probe:
        train, validation = split_validation(train, spec.validation, spec.split_seed)
    return ConversationTask(
        name=spec.name, train=train, test=sets["test"], validation=validation, scorer=spec.scorer,
        max_new_tokens=spec.max_new_tokens, prompt=spec.prompt, warnings=warnings, licence=spec.licence or raw.licence,
    )  # fmt: skip


def probe_splits(raw: RawConversations, spec: ConversationSpec) -> dict[str, list[Conversation]]:
    """A probe is only tested: its test split, or all there is."""
    if "test" in raw.splits:
        return {"test": raw.splits["test"]}
    return {"train" if isinstance(spec.test, float) else "test": raw.splits["train"]}


def grouped(conversations: Sequence[Conversation], spec: ConversationSpec) -> list[Conversation]:
    """Captions of one picture, a row each, as one test item with all of them as references; others as they are."""
    if spec.scorer not in CAPTION_SCORERS or "references" in spec.extra:
        return list(conversations)
    items: dict[tuple[object, ...], Conversation] = {}
    for c in conversations:
        same = (c.pictures, c.videos, c.prompt_turns)
        first = items.get(same)
        items[same] = c if first is None else replace(first, references=first.references + c.references)
    return list(items.values())


def entries_of(conversations: Sequence[Conversation]) -> dict[ByteSource, Entry]:
    """Every picture and video once, as what the checks of files take."""
    entries: dict[ByteSource, Entry] = {}
    for c in conversations:
        for n, source in enumerate((*c.pictures, *c.videos)):
            if source not in entries:
                medium = "picture" if n < len(c.pictures) else "video"
                entries[source] = Entry(f"{c.key}#{n}", "", picture_name(source, c.where), source, medium=medium)
    return entries


def read_files(
    conversations: Sequence[Conversation], spec: ConversationSpec, split: str
) -> tuple[list[Conversation], list[Conversation], list[str]]:
    """Read every file once (`check_entries`): the usable conversations, those left out (where that is asked for), warnings."""
    good, warnings = check_entries(list(entries_of(conversations).values()), spec, split)
    digests = {entry.source: entry.digest for entry in good}
    kept: list[Conversation] = []
    lost: list[Conversation] = []
    for c in conversations:
        sources = (*c.pictures, *c.videos)
        if all(source in digests for source in sources):
            kept.append(replace(c, digests=tuple(digests[source] for source in sources)))
        else:
            lost.append(c)
    if lost:
        fate = "left out with" if split == "train" else "score 0 for"
        warnings.append(f"{len(lost)} entries of {split} {fate} their unusable files")
    return kept, lost, warnings


def handle_leaks(
    splits: dict[str, list[Conversation]], policy: str, picture: Callable[[Conversation], str]
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """`handle_duplicates` of questions: the same one about the same pictures and videos on two sides of a split.

    Every question of a training conversation counts, the last one of a test conversation. ``picture`` names the pictures of
    a conversation; equal names mean equal pictures.
    """
    owners: dict[int, Conversation] = {}
    entries: dict[str, list[Entry]] = {}
    for split, conversations in splits.items():
        entries[split] = []
        for c in conversations:
            asked = [turn.text for turn in c.turns if turn.role == "user"]
            pictures = picture(c)
            for text in asked if split == "train" else asked[-1:]:
                bare = text.replace(IMAGE, "").replace(VIDEO, "").strip()
                same = hashlib.sha256(json.dumps([pictures, bare]).encode()).hexdigest()
                entry = Entry(c.key, "", c.where, c.pictures[0] if c.pictures else HeldBytes(b""), same)
                owners[id(entry)] = c
                entries[split].append(entry)
    kept, warnings = handle_duplicates(entries, policy, "question(s)")
    result: dict[str, list[Conversation]] = {}
    for split, conversations in splits.items():
        left = {id(entry) for entry in kept[split]}
        gone = {id(owners[id(entry)]) for entry in entries[split] if id(entry) not in left}
        result[split] = [c for c in conversations if id(c) not in gone]
    return result, warnings


def _cut_test(
    splits: dict[str, list[Conversation]], spec: ConversationSpec
) -> tuple[dict[str, list[Conversation]], list[str]]:
    fraction = spec.test if isinstance(spec.test, float) else DEFAULT_TEST_FRACTION
    conversations, _, warnings = read_files(splits["train"], spec, "train")
    if not isinstance(spec.test, float):
        warnings.append(
            f"no test entries were named: {fraction:.0%} (split_seed {spec.split_seed}) are held out; set `test` to choose"
        )
    whole = ConversationSet(conversations)
    groups = [whole.digest(i) for i in range(len(whole))]
    held = set(holdout(whole.keys, whole.labels, fraction, spec.split_seed, groups=groups, at_least=1))
    if not held:
        raise DataError(
            f"nothing can be held out for the test among {len(whole)} entries about {len(set(groups))} file(s); give more, or "
            "name a `test`"
        )
    cut = {
        **splits,
        "train": [c for i, c in enumerate(conversations) if i not in held],
        "test": [c for i, c in enumerate(conversations) if i in held],
    }
    return cut, warnings


def _unexpected(splits: dict[str, list[Conversation]], spec: ConversationSpec) -> list[str]:
    """Where the counts are not the published ones; a sample of the data was chosen by the person."""
    if spec.max_train is not None or spec.max_test is not None:
        return []
    return [
        f"not paper-comparable: {split} has {len(splits[split])} entries where the published protocol has {wanted}"
        for split, wanted in spec.expect.items()
        if split in splits and len(splits[split]) != wanted
    ]
