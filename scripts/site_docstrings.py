"""For the site: examples in docstrings stand in no section of their own here, so each block of ``>>>`` lines gets a fence;
indices that follow one another are no links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from site_hooks import plain_brackets


def fenced(text: str) -> str:
    r"""``text`` with a fence around every block that begins with ``>>>`` and ends at an empty line.

    >>> fenced("Sum.\n\n>>> 1 + 1\n2")
    'Sum.\n\n```pycon\n>>> 1 + 1\n2\n```'
    """
    out: list[str] = []
    indent: str | None = None
    for line in text.split("\n"):
        if indent is None and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            out.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            out.append(f"{indent}```")
            indent = None
        code = indent is not None or line.startswith("    ")
        out.append(line.replace("  # doctest: +SKIP", "") if code else plain_brackets(line))
    return "\n".join([*out, f"{indent}```"] if indent is not None else out)


class FencedExamples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
