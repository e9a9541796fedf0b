"""The keys that describe a task, checked before any file is opened."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.data.pictures import DEFAULT_MAX_PIXELS, check_max_pixels
from keeplora.data.remote import RemotePath, is_url, place
from keeplora.data.sets import Entry
from keeplora.errors import ConfigError, DataError, did_you_mean

DEFAULT_TEMPLATES = ("a photo of a {c}.",)
DEFAULT_TEST_FRACTION = 0.2
PAGE = "docs/data.md"
ON_ERROR = ("raise", "skip")
CHECKS = ("header", "full")
DUPLICATES = ("warn", "refuse", "drop")
#: Keys of every source.
SHARED_KEYS = frozenset(
    {"name", "source", "path", "train", "test", "validation", "max_pixels", "on_error", "check", "duplicates"}
    | {"split_seed", "licence", "expect", "max_skipped", "base_dir"}
)
#: Keys of every source of pictures with classes.
COMMON_KEYS = SHARED_KEYS | {"classes", "templates", "max_train_per_class", "max_test_per_class", "part"}
#: Of the keys that only some sources know, those that are whole numbers.
NUMBER_KEYS = frozenset({"shots"})
EXPECT_KEYS = ("classes", "train", "test")
STREAM_KEYS = ("samples", "buffer", "split_by", "test_samples")
SPLIT_BY = ("samples", "shards")
#: numpy's RandomState takes no larger seed.
LARGEST_SEED = 2**32 - 1
#: Names under which people keep the three splits.
SPLIT_ALIASES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "val", "valid"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """Group ``index`` (from 1) of the classes cut into ``of`` groups, shuffled first where there is a ``seed``."""

    index: int
    of: int
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """How a training split is streamed (`keeplora.data.streams`).

    Attributes:
        samples: of one pass; None: as many as the data set says it has.
        buffer: samples that are held and shuffled at a time; 0: the stream's own order.
        shards: whether each rank reads files of its own, in place of its share of every batch.
        most_test: samples of the test (and validation) split that are kept; None: all.
    """

    samples: int | None = None
    buffer: int = 1000
    shards: bool = False
    most_test: int | None = None


class Source(NamedTuple):
    """A source in the registry.

    Attributes:
        module: with ``read(spec, base_dir, probe)``; imported when a task asks for it.
        keys: the keys that it alone knows.
        kind: "classification" (pictures with classes) or "generation" (questions with answers).
    """

    module: str
    keys: frozenset[str] = frozenset()
    kind: str = "classification"


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What every checked task description has, whatever its kind.

    ``base_dir``, itself relative to the experiment's, is where the relative paths start. ``max_skipped`` is the share of a
    split's files that ``on_error: skip`` may leave out. ``extra`` holds the texts that only some sources know; ``expect``
    the published counts, where the description gives them.
    """

    name: str
    source: str
    path: str | None = None
    train: str | None = None
    test: str | float | None = None
    validation: str | float | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    on_error: str = "raise"
    max_skipped: float = 0.01
    check: str = "header"
    duplicates: str = "warn"
    split_seed: int = 0
    licence: str | None = None
    expect: dict[str, int] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    stream: StreamSpec | None = None
    base_dir: str = "."

    @property
    def split_names(self) -> dict[str, str]:
        """The splits that the person named, e.g. ``{"train": "photos/train"}``; fractions are not names."""
        named = {"train": self.train, "test": self.test, "validation": self.validation}
        return {split: value for split, value in named.items() if isinstance(value, str)}


@dataclass(frozen=True, slots=True)
class TaskSpec(SourceSpec):
    """A checked description of pictures with classes; ``numbers`` holds the whole numbers of some sources (`NUMBER_KEYS`)."""

    classes: list[str] | dict[str, str] | None = None
    templates: list[str] = field(default_factory=lambda: list(DEFAULT_TEMPLATES))
    max_train_per_class: int | None = None
    max_test_per_class: int | None = None
    part: Part | None = None
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class RawTask:
    """What a source found, before classes are numbered and splits made.

    Attributes:
        splits: entries of "train", "test" and "validation"; where only "train" is given, the test set is cut from it.
        class_order: the classes in the source's own order, or None for sorted.
        empty: class folders without a picture, per split, as (class, place).
        pretty: whether underscores in class names stand for spaces.
        hint: added to the refusal of a single class.
    """

    splits: dict[str, list[Entry]]
    class_order: list[str] | None = None
    empty: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    licence: str | None = None
    pretty: bool = True
    hint: str = ""


def suggest(name: str, choices: Collection[str]) -> str:
    """`did_you_mean`, without the full list where that is too long to read."""
    if len(choices) <= 20:
        return did_you_mean(name, choices)
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; {len(choices)} are known"


def listing(names: Iterable[str], most: int = 5) -> str:
    """``"a, b, c and 7 more"``."""
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest


def or_a_share(split: str, kind: str) -> str:
    """What else may stand in place of the name of a split that does not exist.

    >>> or_a_share("test", "folder"), or_a_share("train", "folder")
    ('; `test` takes a folder, or a share to hold out of training, such as 0.2', '')
    """
    if split not in ("test", "validation"):
        return ""
    return f"; `{split}` takes a {kind}, or a share to hold out of training, such as 0.2"


def locate(value: str, base: Path, *, kind: str = "file or folder", split: str = "") -> Path:
    """The absolute local path that ``value`` means, which must exist; ``split`` is the key that it stands at, if any."""
    path = anywhere(value, base, kind=kind, split=split)
    if isinstance(path, RemotePath):
        raise DataError(
            f"{path}: this source reads local files alone; copy the data here (`keeplora copy`), or use `source: folder`, "
            "`table`, `datasets`, `llava`, `vqa-table` or `vqa-datasets`, which read addresses"
        )
    return path


def anywhere(
    value: str, base: Path | RemotePath, *, kind: str = "file or folder", split: str = ""
) -> Path | RemotePath:
    """`locate` for the sources that read addresses (``s3://…``) as well."""
    path = place(value, base)
    if path.exists():
        return path
    near: list[str] = []
    if isinstance(path, Path) and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.6)
    start = base if isinstance(base, RemotePath) else base.absolute()
    hint = f"did you mean {near[0]!r}?" if near else f"a relative path starts at {start}"
    hint = hint if not is_url(value) else "check the address"
    raise DataError(f"{path}: no such {kind}; {hint}{or_a_share(split, kind)}")


class Keys:
    """The keys of a task as a person wrote them, each read with one sentence for every mistake.

    Args:
        spec: a key whose value is None counts as absent.
        extra_keys: source name -> the keys that it alone knows; its keys are the known sources.
        common: the keys that every source of this kind knows.
    """

    def __init__(
        self, spec: Mapping[str, Any], extra_keys: Mapping[str, Collection[str]], common: Collection[str]
    ) -> None:
        self.given = {str(key): value for key, value in spec.items() if value is not None}
        name = self.given.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"a task needs a `name` (text), got {name!r} in {sorted(self.given)}")
        self.name, self.where = name, f"task {name!r}"
        self.source = self.given.get("source", "folder")
        if self.source not in extra_keys:
            raise ConfigError(
                f"{self.where}: unknown source {self.source!r}{did_you_mean(str(self.source), extra_keys)}"
            )
        known = {*common, *extra_keys[self.source]}
        for key in self.given:
            if key not in known:
                raise ConfigError(
                    f"{self.where}: unknown key {key!r} for source {self.source!r}{did_you_mean(key, known - {'part'}, PAGE)}"
                )

    def text(self, key: str) -> str | None:
        value = self.given.get(key)
        if value is not None and (not isinstance(value, str | Path) or not str(value).strip()):
            raise ConfigError(f"{self.where}: `{key}` is {value!r}: give text")
        return None if value is None else str(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        value = self.given.get(key, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{self.where}: `{key}` is {value!r}{did_you_mean(str(value), allowed)}")
        return value

    def whole(self, key: str, least: int) -> int | None:
        return _whole(self.given.get(key), self.where, f"`{key}`", least)

    def share(self, key: str, default: float) -> float:
        value = self.given.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{self.where}: `{key}` is {value!r}: give a share from 0 to 1, e.g. 0.01")
        return float(value)

    def fraction_or_text(self, key: str) -> str | float | None:
        value = self.given.get(key)
        if isinstance(value, int | float):
            if isinstance(value, bool) or not 0.0 < value < 1.0:
                raise ConfigError(
                    f"{self.where}: `{key}` is {value!r}: give a fraction between 0 and 1, or a path or split"
                )
            return float(value)
        return self.text(key)

    def shared(self, extra: Collection[str], expect: Sequence[str]) -> dict[str, Any]:
        """The arguments of `SourceSpec`; ``extra`` are the source's own keys of text, ``expect`` the counts it may name."""
        try:
            max_pixels = check_max_pixels(self.given.get("max_pixels", DEFAULT_MAX_PIXELS))
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {error}") from error
        values: dict[str, Any] = {
            "name": self.name, "source": self.source, "path": self.text("path"), "train": self.text("train"),
            "test": self.fraction_or_text("test"), "validation": self.fraction_or_text("validation"),
            "max_pixels": max_pixels, "on_error": self.choice("on_error", ON_ERROR),
            "check": self.choice("check", CHECKS), "duplicates": self.choice("duplicates", DUPLICATES),
            "split_seed": self.whole("split_seed", 0) or 0, "licence": self.text("licence"),
            "max_skipped": self.share("max_skipped", 0.01),
            "expect": _expect(self.given.get("expect"), self.where, expect),
            "extra": {key: value for key in extra if key != "streaming" and (value := self.text(key)) is not None},
            "stream": _stream(self.given.get("streaming"), self.where), "base_dir": self.text("base_dir") or ".",
        }  # fmt: skip
        if values["path"] is None and values["train"] is None and not isinstance(values["test"], str):
            raise ConfigError(f"{self.where}: no pictures named: give `path`, or `train` and `test`")
        return values


def parse_spec(spec: Mapping[str, Any], extra_keys: Mapping[str, Collection[str]]) -> TaskSpec:
    """Check the description of pictures with classes; see `Keys` for the arguments.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    keys = Keys(spec, extra_keys, COMMON_KEYS)
    own = extra_keys[keys.source]
    return TaskSpec(
        classes=_classes(keys.given.get("classes"), keys.where),
        templates=_templates(keys.given.get("templates"), keys.where),
        max_train_per_class=keys.whole("max_train_per_class", 1),
        max_test_per_class=keys.whole("max_test_per_class", 1),
        part=_part(keys.given.get("part"), keys.where),
        numbers={key: value for key in own if key in NUMBER_KEYS and (value := keys.whole(key, 1)) is not None},
        **keys.shared([key for key in own if key not in NUMBER_KEYS], EXPECT_KEYS),
    )


def _whole(value: object, where: str, what: str, least: int, most: int | None = None) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= (most or value)):
        return value
    limit = f"{least} or more" if most is None else f"from {least} to {most}"
    raise ConfigError(f"{where}: {what} is {value!r}: give a whole number, {limit}")


def _mapping(value: object, where: str, key: str, known: Sequence[str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: `{key}` is {value!r}: give a mapping with {listing(known)}")
    for name in value:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r} in `{key}`{did_you_mean(str(name), known)}")
    return {str(name): given for name, given in value.items() if given is not None}


def _part(value: object, where: str) -> Part | None:
    if value is None:
        return None
    given = _mapping(value, where, "part", ("index", "of", "seed"))
    of = _whole(given.get("of"), where, "`of` in `part`", 1)
    index = _whole(given.get("index"), where, "`index` in `part`", 1, of)
    if of is None or index is None:
        raise ConfigError(f"{where}: `part` is {value!r}: it needs `index` and `of`, e.g. {{index: 1, of: 10}}")
    return Part(index, of, _whole(given.get("seed"), where, "`seed` in `part`", 0, LARGEST_SEED))


def _stream(value: object, where: str) -> StreamSpec | None:
    if value is None or value is False:
        return None
    given = {} if value is True else _mapping(value, where, "streaming", STREAM_KEYS)
    by = given.get("split_by", SPLIT_BY[0])
    if by not in SPLIT_BY:
        raise ConfigError(f"{where}: `split_by` in `streaming` is {by!r}{did_you_mean(str(by), SPLIT_BY)}")
    numbers = {
        key: _whole(given.get(key), where, f"`{key}` in `streaming`", least)
        for key, least in (("samples", 1), ("buffer", 0), ("test_samples", 1))
    }
    buffer = numbers["buffer"]
    return StreamSpec(numbers["samples"], 1000 if buffer is None else buffer, by == "shards", numbers["test_samples"])


def _expect(value: object, where: str, known: Sequence[str]) -> dict[str, int]:
    counts = _mapping(value, where, "expect", known)
    return {k: n for k, v in counts.items() if (n := _whole(v, where, f"`{k}` in `expect`", 1)) is not None}


def _class_name(value: object, where: str) -> str:
    if isinstance(value, bool):
        raise ConfigError(
            f"{where}: `classes` holds {value!r}: YAML reads bare yes, no, on, off as true or false; quote it"
        )
    if not isinstance(value, str | int) or not str(value).strip():
        raise ConfigError(f"{where}: `classes` holds {value!r}: a class name must be text")
    return str(value).strip()


def _classes(value: object, where: str) -> list[str] | dict[str, str] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_class_name(k, where): _class_name(v, where) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        names = [_class_name(v, where) for v in value]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{where}: `classes` names {name!r} twice")
        if len(names) < 2:
            raise ConfigError(f"{where}: `classes` has {len(names)} name(s): a task needs at least two classes")
        return names
    raise ConfigError(f"{where}: `classes` is {value!r}: give a list of names, or a mapping from folder to name")


def _templates(value: object, where: str) -> list[str]:
    if value is None:
        return list(DEFAULT_TEMPLATES)
    templates = [value] if isinstance(value, str) else value
    if not isinstance(templates, Sequence) or not templates:
        raise ConfigError(f"{where}: `templates` is {value!r}: give one prompt or a list of prompts")
    for template in templates:
        fields = re.findall(r"\{(.*?)\}", template) if isinstance(template, str) else []
        if not fields or any(f not in ("", "c") for f in fields):
            raise ConfigError(f"{where}: template {template!r} must hold {{}} or {{c}} where the class name goes")
    return [str(template) for template in templates]
