"""For the site: examples in docstrings stand in no section of their own here, so each block of ``>>>`` lines gets a fence."""

from __future__ import annotations

from typing import Any

import griffe


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
        out.append(line.replace("  # doctest: +SKIP", ""))
    return "\n".join([*out, f"{indent}```"] if indent is not None else out)


class FencedExamples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
