"""What PyYAML says of a text that is no YAML, in words for whoever wrote the text: what is wrong, where, how to mend it."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import yaml

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # PyYAML's own, which `str.splitlines` has more of
_KEY_AND_VALUE = re.compile(
    r"(?P<key>\s*(?:- +)*(?:[^\s:#\"'][^:#]*|\"[^\"]*\"|'[^']*')):[ \t]+(?P<value>\S.*?)\s*(?:\s#.*)?$"
)
_SHOWN = 60
_LONGEST = 500
"""A longer line is looked at no closer, so that no text makes an error take long."""


class Place(NamedTuple):
    """Where something is wrong, both counted from 1, and the sentence about it."""

    line: int
    column: int
    sentence: str


def explain(error: yaml.MarkedYAMLError, text: str) -> Place:
    """The parser's error as a sentence, and the place that a person would look at.

    >>> try:
    ...     yaml.safe_load("name: a: b")
    ... except yaml.MarkedYAMLError as error:
    ...     print(explain(error, "name: a: b").sentence)
    a second colon in the value of 'name'; put the value in quotes: name: "a: b"
    """
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    problem, context, lines = error.problem or "", error.context or "", _BREAK.split(text)
    if mark is None:
        return Place(1, 1, f"not valid YAML ({problem})")
    line = lines[mark.line] if mark.line < len(lines) else ""
    here, since = (mark.line + 1, mark.column + 1), (start.line + 1, start.column + 1) if start else (1, 1)
    found = re.search(r"character '(.+?)'", problem)
    sign = line[mark.column : mark.column + 1]

    if found and found[1] == "\\t":
        if line[: mark.column].strip(" \t") == "":
            return Place(*here, "the line is indented with a tab, which YAML does not allow; indent with spaces")
        return Place(*here, "a tab where YAML wants a space; put a space in its place")
    if found and "cannot start" in problem:
        return Place(*here, f"no value can begin with {sign!r}{_quoted(line)}")
    if "mapping values" in problem:
        return _colon(lines, mark)
    if "scanning a quoted scalar" in context:
        return Place(*since, f"the quote that opens here is never closed; add the closing {_at(lines, since)}")
    if "double-quoted scalar" in context:
        column = line.rfind("\\", 0, mark.column) + 1
        advice = "put single quotes around the value, or write the backslash twice"
        return Place(here[0], column or here[1], f"in double quotes a backslash begins a special sign; {advice}")
    if "flow sequence" in context or "flow mapping" in context:
        opening = _at(lines, since)
        closing = {"[": "]", "{": "}"}.get(opening, "]")
        return Place(
            *since, f"this {opening!r} is not closed before line {here[0]}, column {here[1]}; add {closing!r}, or the comma that "
            f"is missing there (a text that begins with {opening!r} needs quotes)",
        )  # fmt: skip
    if "scanning an alias" in context or "scanning an anchor" in context or "undefined alias" in problem:
        place = here if "undefined" in problem else since
        return Place(*place, f"no value can begin with {_at(lines, place)!r}{_quoted(line)}")
    if "another document" in problem:
        return Place(*here, "a second document begins here ('---'); keep one in a file")
    if "scanning a block scalar" in context:
        return Place(
            *since, f"after {_at(lines, since)!r} nothing may stand in the same line: the text follows, indented, in the next "
            f"ones; a value that begins with {_at(lines, since)!r} needs quotes",
        )  # fmt: skip
    if "expected ':'" in problem:
        return Place(*since, "a line that is no `key: value`; add the colon and a space, or take the line out")
    if "sequence entries" in problem:
        return Place(*here, "a dash here; the entries of a list stand in lines of their own, below their key")
    if problem.startswith(("expected <block end>", "expected '<document start>'")):
        return _block_end(problem, line, mark)
    if problem.startswith("expected the node content"):
        return Place(*here, f"a value is missing before {sign!r}; one that begins with {sign!r} needs quotes")
    if "merging" in problem:
        return Place(*here, "'<<' takes in a mapping that has an anchor (<<: *name); as a key it needs quotes")
    if sign == "%" or "YAML document" in problem or "directive" in context:
        return Place(
            *here, "a line that begins with '%' is an instruction to the parser; take it out, or quote the value"
        )
    return Place(*here, f"not valid YAML; look at the colons, quotes, brackets and spaces here ({problem})")


def _at(lines: list[str], place: tuple[int, int]) -> str:
    row, column = place
    return lines[row - 1][column - 1 : column] if row <= len(lines) else ""


def _pair(line: str) -> re.Match[str] | None:
    """The line as one key and its value."""
    return _KEY_AND_VALUE.fullmatch(line) if len(line) <= _LONGEST else None


def _quoted(line: str) -> str:
    """The advice to quote, with the line as it should be where the line is one key and its value."""
    pair = _pair(line)
    if pair is None or len(line) > _SHOWN:
        return "; put the value in quotes"
    key = pair["key"].strip().removeprefix("- ").strip()
    return f"; put the value in quotes: {key}: {json.dumps(pair['value'], ensure_ascii=False)}"


def _colon(lines: list[str], mark: yaml.Mark) -> Place:
    """A colon where no key can end: in a value, after a line without one, or in a line that is indented too far."""
    line = lines[mark.line]
    pair = _pair(line)
    if pair is not None and mark.column > pair.end("key"):
        key = pair["key"].strip().removeprefix("- ").strip()
        return Place(mark.line + 1, mark.column + 1, f"a second colon in the value of {key[:_SHOWN]!r}{_quoted(line)}")
    above = next((k for k in range(mark.line - 1, -1, -1) if lines[k].split("#")[0].strip()), None)
    if above is None:
        return Place(mark.line + 1, mark.column + 1, "a colon that ends no key; put the value in quotes")
    indent = len(line) - len(line.lstrip(" "))
    if _pair(lines[above]):
        return Place(
            mark.line + 1, indent + 1, f"the line is indented further than line {above + 1}, which has a value already; give "
            "both the same indentation",
        )  # fmt: skip
    column = len(lines[above]) - len(lines[above].lstrip()) + 1
    missing = "a space after its colon" if ":" in lines[above] else "a colon and a space after its key"
    return Place(above + 1, column, f"the line lacks {missing}; write it as `key: value`")


def _block_end(problem: str, line: str, mark: yaml.Mark) -> Place:
    """Something where neither this list or mapping goes on nor the one around it."""
    row, column = mark.line + 1, mark.column + 1
    if not line[: mark.column].strip(" -"):
        return Place(
            row, column, "the line's indentation is that of no line above which it could belong to; give it as many spaces as "
            "the keys (or dashes) that it stands beside",
        )  # fmt: skip
    before = line[: mark.column].rstrip()[-1:]
    if before in ("}", "]"):
        pair = _pair(line)
        whole = _quoted(line) if pair and pair["value"][0] in "{[" else "; take it out, or the bracket"
        return Place(row, column, f"text after the closing bracket{whole}")
    if before in ('"', "'"):
        other = "'" if before == '"' else '"'
        return Place(
            row,
            column,
            f"text after the closing quote; put {other} around the whole value, or take the inner quotes out",
        )
    return Place(row, column, f"not valid YAML; look at the colons, quotes and brackets of this line ({problem})")
