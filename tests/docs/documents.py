"""Documents as what they promise to run: fenced blocks, commands and links of a Markdown file."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block. The info string is a language, then ``norun`` or ``file=NAME``."""

    where: str
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python", "yaml") and "norun" not in self.words

    def commands(self) -> list[list[str]]:
        """The lines of a shell block as words, comments left out."""
        lines = (shlex.split(line, comments=True) for line in self.text.splitlines())
        return [words for words in lines if words]


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        line = text.count("\n", 0, match.start()) + 1
        body = textwrap.dedent(match["body"])
        found.append(Block(f"{path.relative_to(ROOT)}, line {line}", language, tuple(words), body))
    return found


def links(path: Path) -> list[str]:
    """Targets of the links that lead into the repository."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return [target for target in _LINK.findall(text) if "://" not in target and not target.startswith("#")]


def run_keeplora(words: list[str], where: str) -> None:
    """``keeplora ...`` in this process; the test fails unless it ends well."""
    from keeplora.cli import main

    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code, f"{where}: `keeplora {shlex.join(words)}` ended with status {caught.value.code}"


def run_block(block: Block, folder: Path, namespace: dict[str, Any]) -> None:
    """Run a block in ``folder``, which must be the working folder; Python blocks share ``namespace``."""
    assert Path.cwd() == folder.resolve()
    if block.file is not None:
        target = folder / block.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, block.where, "exec"), namespace)
    elif block.language == "bash":
        for words in block.commands():
            if words[0] == "keeplora":
                run_keeplora(words[1:], block.where)
            else:
                environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
                subprocess.run(words, cwd=folder, env=environment, check=True)
    else:
        raise AssertionError(f"{block.where}: a {block.language} block needs file=NAME or norun")
