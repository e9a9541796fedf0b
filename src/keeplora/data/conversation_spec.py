"""The keys that describe a task of questions and answers, and what its source finds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from keeplora.data.conversations import Conversation
from keeplora.data.spec import SHARED_KEYS, Keys, Source, SourceSpec, TaskSpec, parse_spec

CONVERSATION_KEYS = SHARED_KEYS | {"scorer", "prompt", "max_new_tokens", "max_train", "max_test"}
EXPECT_KEYS = ("train", "test")
#: Scores that compare an answer with several references: rows about one picture are then one item of the test.
CAPTION_SCORERS = frozenset({"caption", "cider", "rouge-l"})


@dataclass(frozen=True, slots=True)
class ConversationSpec(SourceSpec):
    """A checked description of questions and answers.

    Attributes:
        scorer: the score's name; whether there is such a one is checked where answers are scored.
        prompt: added to every question.
        max_new_tokens: the longest answer that is generated.
        max_train, max_test: use so many, the same ones every time.
    """

    scorer: str = "exact"
    prompt: str | None = None
    max_new_tokens: int = 32
    max_train: int | None = None
    max_test: int | None = None


@dataclass(slots=True)
class RawConversations:
    """What a source found: conversations of "train", "test", "validation"; the test set is cut from train where it lacks."""

    splits: dict[str, list[Conversation]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    licence: str | None = None


def parse_conversation_spec(spec: Mapping[str, Any], extra_keys: Mapping[str, Collection[str]]) -> ConversationSpec:
    """Check the description of questions and answers; see `Keys` for the arguments.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    keys = Keys(spec, extra_keys, CONVERSATION_KEYS)
    keys.text("prompt")  # refuses what is no text; blanks before it count
    prompt = keys.given.get("prompt")
    return ConversationSpec(
        scorer=keys.text("scorer") or "exact",
        prompt=prompt,
        max_new_tokens=keys.whole("max_new_tokens", 1) or 32,
        max_train=keys.whole("max_train", 1),
        max_test=keys.whole("max_test", 1),
        **keys.shared(extra_keys[keys.source], EXPECT_KEYS),
    )


def parse(spec: Mapping[str, Any], sources: Mapping[str, Source]) -> TaskSpec | ConversationSpec:
    """Check a task description of any kind.

    Args:
        sources: `keeplora.data.SOURCES`.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    extra_keys = {name: source.keys for name, source in sources.items()}
    named = sources.get(str(spec.get("source")))
    if named is not None and named.kind == "generation":
        return parse_conversation_spec(spec, extra_keys)
    return parse_spec(spec, extra_keys)
