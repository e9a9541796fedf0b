"""YAML as people write it: ``1e-3`` is a number, ``no`` is a word, a repeated key is an error, keys know their lines.

PyYAML follows YAML 1.1, where ``learning_rate: 1e-3`` is a string, a task called ``on`` is ``True`` and the second of
two equal keys wins in silence. The loader here uses the scalars of YAML 1.2; the dumper quotes whatever either version
could misread, so that `dump_yaml` and `parse_yaml` are inverse.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from keeplora.errors import ConfigError
from keeplora.files import read_regular
from keeplora.yaml_words import explain

KeyPath = tuple[str | int, ...]

MAX_BYTES = 4 << 20
"""A larger file is no configuration; reading it as YAML would take minutes."""
MAX_NODES = 100_000
"""Values of a document with its aliases written out: a few lines of aliases of aliases stand for millions."""
MAX_DEPTH = 60
MAX_DIGITS = 300
"""More digits than a float holds; Python itself refuses to read more than 4,300."""

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_MERGE = "tag:yaml.org,2002:merge"
_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789.")),
    (_MERGE, re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes what YAML 1.2 reads as a number, and never writes anchors."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks of Unicode as they are, and reads them back as a space: escape them.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


_PLAIN = {tag: pattern for tag, pattern, _ in _SCALARS}
_KINDS = {
    yaml.ScalarNode: {"tag:yaml.org,2002:str", *_PLAIN},
    yaml.SequenceNode: {"tag:yaml.org,2002:seq"},
    yaml.MappingNode: {"tag:yaml.org,2002:map"},
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Refused(Exception):
    """Proper YAML, but no configuration."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(f", line {mark.line + 1}, column {mark.column + 1}: {message}")


def _refuse(message: str, node: yaml.Node) -> _Refused:
    return _Refused(message, node.start_mark)


def _check(node: yaml.Node) -> None:
    """Refuse what is neither text, number, list nor mapping: tags name Python objects, dates, sets and what not."""
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    if node.tag not in _KINDS[type(node)]:
        raise _refuse(f"the tag {tag} is not for configurations; write the value plainly", node)
    if not isinstance(node, yaml.ScalarNode):
        return
    if (pattern := _PLAIN.get(node.tag)) is not None and not pattern.match(node.value):
        raise _refuse(f"{node.value[:40]!r} cannot be read as {tag}; leave the tag out", node)
    if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
        raise _refuse(f"a number of {len(node.value):,} digits; no setting takes one so large", node)
    if _SURROGATE.search(node.value):
        raise _refuse("half of a character (a lone surrogate such as \\ud83d); write the whole character", node)


def _lines(
    node: yaml.Node | None, path: KeyPath, into: dict[KeyPath, int], open_nodes: frozenset[int], count: list[int]
) -> None:
    """Note the line of every key, and refuse a key given twice (merge keys, which repeat on purpose, come in later)."""
    if node is None:
        return
    count[0] += 1
    if count[0] > MAX_NODES:
        raise _refuse(f"more than {MAX_NODES:,} values, those that aliases stand for included; shorten it", node)
    if id(node) in open_nodes:
        raise _refuse("an anchor that contains itself", node)
    if len(open_nodes) > MAX_DEPTH:
        raise _refuse(f"nested more than {MAX_DEPTH} deep", node)
    _check(node)
    open_nodes = open_nodes | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refuse("a list or mapping as a key; a key is a word", key_node)
            _check(key_node)
            line = key_node.start_mark.line + 1
            key = (key_node.tag, key_node.value)
            if key in seen and key_node.tag != _MERGE:
                message = f"key {key_node.value!r} is given twice (first in line {seen[key]}); keep one"
                raise _refuse(message, key_node)
            seen[key] = line
            into.setdefault((*path, key_node.value), line)
            _lines(value_node, (*path, key_node.value), into, open_nodes, count)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            into.setdefault((*path, index), child.start_mark.line + 1)
            _lines(child, (*path, index), into, open_nodes, count)


def parse_yaml(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document; ``source`` names it in errors.

    Returns
    -------
    value, lines
        The plain value (None for an empty text), and for each key path such as ``("training", "epochs")`` its line.

    Raises
    ------
    ConfigError
        The text is not YAML, repeats a key, has a tag, or stands for too much: the sentence has source, line and column.

    Examples
    --------
    >>> parse_yaml("training: {learning_rate: 1e-3}", "example.yaml")[0]
    {'training': {'learning_rate': 0.001}}
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        _lines(node, (), lines, frozenset(), [0])
        value = None if node is None else loader.construct_document(node)
    except _Refused as refused:
        raise ConfigError(f"{source}{refused}") from None
    except yaml.MarkedYAMLError as error:
        line, column, sentence = explain(error, text)
        raise ConfigError(f"{source}, line {line}, column {column}: {sentence}") from None
    except yaml.YAMLError as error:  # a control character: the reader has a position but no mark
        position = getattr(error, "position", 0)
        before = text[:position]
        line, column = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
        raise ConfigError(f"{source}, line {line}, column {column}: a character that YAML does not allow") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    return value, lines


def read_yaml(path: str | Path) -> tuple[Any, dict[KeyPath, int]]:
    """`parse_yaml` of a UTF-8 file; a missing, unreadable, special or huge file is a ConfigError that names it."""
    path = Path(path)
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name, which no file has
        raise ConfigError(f"{str(path)!r} is not a file's name: {error}") from None
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """Write plain values as YAML, keys in the given order, such that `parse_yaml` gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
