"""What mkdocs.yml needs beside docs/: pages made from the code, and links that lead out of docs/.

The Markdown of this repository is written for a code host. Three things differ in the site: links to files that are no pages
(``../src/…``) lead to a page that shows the file; fences lose the words that tell the tests what to run; lists are
indented as Python-Markdown wants them.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
HOME = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files outside docs/ that are pages of the site."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", ".sh": "bash"}
_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$")
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_ITEM = re.compile(r"^ *(?:[-*+]|\d+\.) ")

STYLE = (
    ".md-grid{max-width:76rem}.md-typeset td:first-child code{white-space:nowrap}.md-typeset table{font-size:.68rem}\n"
)

# ---- pages out of the code ------------------------------------------------------------------------------------------

API = {
    "learner": ("Learner and configuration", [
        "keeplora.tuner.learner.ContinualLearner", "keeplora.tuner.config.KeepLoraConfig", "keeplora.errors",
    ]),
    "experiment": ("Experiment", [
        "keeplora.experiment.entry.Experiment", "keeplora.experiment.config.load_config",
        "keeplora.experiment.config_schema.ExperimentConfig", "keeplora.experiment.serving.TrainedModel",
        "keeplora.experiment.publish.publish",
    ]),
    "ledger": ("Ledger", ["keeplora.tuner.ledger.Ledger", "keeplora.tuner.records.TaskRecord"]),
    "math": ("Mathematics", [
        "keeplora.math.subspace", "keeplora.math.factor", "keeplora.math.scales", "keeplora.math.sketch",
        "keeplora.math.frequent_directions", "keeplora.math.complement", "keeplora.math.budget", "keeplora.math.leak",
    ]),
    "data": ("Data", ["keeplora.data.load_task", "keeplora.data.sets", "keeplora.data.conversations"]),
    "models": ("Models", [
        "keeplora.models.load_model", "keeplora.models.dual_encoder.DualEncoder", "keeplora.models.generative.Generative",
    ]),
    "evaluation": ("Metrics and statistics", ["keeplora.evaluation.metrics", "keeplora.evaluation.stats"]),
    "report": ("Reports", ["keeplora.report.html.render_report", "keeplora.report.index_html.render_index"]),
}  # fmt: skip
"""Page in reference/: its title, and what it documents out of the docstrings."""


def api_page(title: str, names: list[str]) -> str:
    return f"# {title}\n\nFrom the docstrings. The symbols are those of [the method](../method.md).\n\n" + "".join(
        f"::: {name}\n\n" for name in names
    )


def _cell(text: object) -> str:
    """Text within a table: no line breaks, no bars, nothing that looks like a tag."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _option(parameter: Any) -> tuple[str, str]:
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name).upper().strip("[]").rstrip(".")
        return f"`{name}`" + (
            " …" if parameter.nargs == -1 or getattr(parameter, "multiple", False) else ""
        ), "needed" if parameter.required else ""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    return names, "needed" if parameter.required else shown


def command_pages(name: str, command: Any, depth: int = 2) -> Iterator[str]:
    """One section for each command below ``command``, in the order of `--help`."""
    usage = [name]
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    if parameters:
        yield f"{'#' * depth} {name}\n\n{(command.help or '').strip()}\n\n"
        usage += [_option(p)[0].strip("`") for p in parameters if p.param_type_name == "argument"]
        yield f"```bash\n{' '.join(usage)} [options]\n```\n\n| | default | meaning |\n| --- | --- | --- |\n"
        for parameter in parameters:
            names, default = _option(parameter)
            yield f"| {names} | {default} | {_cell(getattr(parameter, 'help', None) or '')} |\n"
        yield "\n"
    else:
        yield f"{'#' * depth} {name}\n\n{(command.help or '').strip()}\n\n"
    for word, below in getattr(command, "commands", {}).items():
        yield from command_pages(f"{name} {word}", below, min(depth + 1, 4) if depth > 2 or name != "keeplora" else 2)


def commands_page() -> str:
    """The command line, out of the program itself."""
    import typer

    from keeplora.cli import app

    head = "# Command line\n\nWhat `keeplora COMMAND --help` prints. Exit status 0: done; 1: wrong input or state, told in one "
    head += "sentence; 130 and 143: interrupted.\n\n"
    return head + "".join(command_pages("keeplora", typer.main.get_command(app)))


WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", list: "list", dict: "mapping"}


def _kind(annotation: Any) -> str:
    """A type as a person writes it; empty where that would say less than the meaning does.

    >>> _kind(int | None), _kind(Literal["a", "b"]), _kind(list[str])
    ('whole number or null', 'a or b', 'list')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, UnionType):
        kinds = ["null" if one is type(None) else _kind(one) for one in inner]
        return " or ".join(dict.fromkeys(kinds)) if all(kinds) else ""
    return WORDS.get(origin or annotation, "")


def settings_rows(model: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of every key of a pydantic model, sections opened up."""
    from pydantic import BaseModel

    from keeplora.yaml_text import dump_yaml

    for name, field in model.model_fields.items():
        inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type)]
        section = next((a for a in inner if issubclass(a, BaseModel)), None)
        if section is not None:
            yield f"{prefix}{name}", "", field.description or " ".join((section.__doc__ or "").split())
            yield from settings_rows(section, f"{prefix}{name}.")
            continue
        preset = prefix.split(".")[0] in ("tuner", "training")
        default = ("the preset's" if preset else "needed") if field.is_required() else ""
        if not default and field.default_factory is None:
            default = f"`{dump_yaml(field.default).splitlines()[0]}`"
        kind = _kind(field.annotation)
        meaning = field.description or ""
        yield f"{prefix}{name}", default, f"{meaning} ({kind})" if kind and meaning else meaning or kind


def settings_page() -> str:
    """Every key of an experiment and every field of `KeepLoraConfig`, from the code that checks them."""
    from dataclasses import fields

    from keeplora.experiment.config_schema import ExperimentConfig
    from keeplora.tuner.config import KeepLoraConfig

    text = (
        "# Settings\n\n## Keys of an experiment\n\nAny of them can be set on the command line: `-o training.epochs=5`. "
    )
    text += "A task's own keys are in [Pictures and questions](../data.md), presets in [The method](../method.md).\n\n"
    text += "| key | default | meaning |\n| --- | --- | --- |\n"
    text += "".join(
        f"| `{key}` | {_cell(default)} | {_cell(meaning)} |\n"
        for key, default, meaning in settings_rows(ExperimentConfig)
    )
    text += "\n## Fields of KeepLoraConfig\n\nFor a training loop of your own.\n\n"
    text += "| field | default | meaning |\n| --- | --- | --- |\n"
    plain = KeepLoraConfig()
    return text + "".join(
        f"| `{item.name}` | `{_cell(getattr(plain, item.name))}` | {_cell(item.metadata.get('help', ''))} |\n"
        for item in fields(KeepLoraConfig)
    )


def source_page(path: str) -> str:
    """A file of the repository as a page, or a folder as a list of its files."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if p.is_file())
        return f"# {path}\n\n" + "".join(f"- [{name}]({posixpath.basename(path)}/{name}.md)\n" for name in names)
    text = file.read_text(encoding="utf-8")
    marks = "`" * max(3, *(len(found) + 1 for found in re.findall(r"`{3,}", text)), 3)
    return f"# {path}\n\n{marks}{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n{marks}\n"


def pages() -> dict[str, Callable[[], str]]:
    """Every page that is made and lies in no file of docs/, by its address in the site."""
    made: dict[str, Callable[[], str]] = {
        page: (lambda file=file: (ROOT / file).read_text(encoding="utf-8")) for file, page in HOME.items()
    }
    made["assets/site.css"] = lambda: STYLE
    made["reference/commands.md"] = commands_page
    made["reference/settings.md"] = settings_page
    for page, (title, names) in API.items():
        made[f"reference/{page}.md"] = lambda title=title, names=names: api_page(title, names)
    linked = {path for origin in origins() for path in outside(origin)}
    for folder in [path for path in linked if (ROOT / path).is_dir()]:
        linked |= {f"{folder}/{p.name}" for p in (ROOT / folder).iterdir() if p.is_file()}
    for path in sorted(linked):
        made[f"source/{path}.md"] = lambda path=path: source_page(path)
    return made


# ---- links ----------------------------------------------------------------------------------------------------------


def origins() -> list[str]:
    """Markdown files that become pages, as paths in the repository."""
    return [*HOME, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def _target(link: str, origin: str) -> str:
    """The file in the repository that a link of the Markdown file ``origin`` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def page_of(path: str) -> str:
    """Where the site has a file of the repository.

    >>> page_of("README.md"), page_of("docs/method.md"), page_of("src/keeplora/math/leak.py")
    ('index.md', 'method.md', 'source/src/keeplora/math/leak.py.md')
    """
    if path in HOME:
        return HOME[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def outside(origin: str) -> set[str]:
    """Files and folders of the repository that ``origin`` links to and docs/ does not hold."""
    text = (ROOT / origin).read_text(encoding="utf-8")
    links = (found[1] for line, fenced in lines_of(text) if not fenced for found in _LINK.finditer(line))
    return {
        path for path in (_target(link, origin) for link in links) if path not in HOME and not path.startswith("docs/")
    }


def lines_of(text: str) -> Iterator[tuple[str, bool]]:
    """Each line and whether it belongs to a fenced block (its fences do)."""
    marks = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if marks:
            closes = found is not None and found["marks"].startswith(marks) and not found["info"].strip()
            marks = "" if closes else marks
            yield line, True
        else:
            marks = found["marks"] if found else ""
            yield line, bool(found)


def plain_brackets(line: str) -> str:
    r"""Indices one after the other as text: outside code, Markdown takes them for a reference.

    >>> plain_brackets("a[i][j], `a[i][j]`") == r"a[i]\[j], `a[i][j]`"
    True
    """
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if i % 2 else re.sub(r"\](?=\[)", r"]\\", part) for i, part in enumerate(parts))


def for_site(text: str, origin: str, page: str) -> str:
    """Markdown of the repository's file ``origin`` as the site's page ``page`` needs it.

    >>> for_site("See [it](../src/a.py).\\n```bash norun\\nls\\n```", "docs/x.md", "x.md")
    'See [it](source/src/a.py.md).\\n\\n```bash\\nls\\n```\\n'
    """
    here = posixpath.dirname(page)

    def moved(found: re.Match[str]) -> str:
        return posixpath.relpath(page_of(_target(found[1], origin)), here or ".") + (found[2] or "")

    out: list[str] = []
    inside = False
    for line, fenced in lines_of(text):
        # Three spaces put text into a numbered item on a code host; Python-Markdown wants four.
        if line.startswith("   ") and (inside or not line.startswith("    ")) and _in_numbered(out):
            line = " " + line
        if fenced and not inside:
            found = _FENCE.match(line)
            assert found is not None
            line = f"{found['indent']}{found['marks']}{(found['info'].split() or [''])[0]}"
            if out and out[-1].strip():
                out.append("")
        elif not fenced:
            line = _LINK.sub(moved, line)
            line = line if line.startswith("    ") else plain_brackets(line)
            if _ITEM.match(line) and out and out[-1].strip() and not _in_list(out):
                out.append("")
        inside = fenced
        out.append(line)
    return "\n".join(out) + "\n"


def _paragraph(out: list[str]) -> Iterator[str]:
    for line in reversed(out):
        if not line.strip():
            return
        yield line


def _in_list(out: list[str]) -> bool:
    """Whether the lines since the last empty one hold an item."""
    return any(_ITEM.match(line) for line in _paragraph(out))


def _in_numbered(out: list[str]) -> bool:
    """Whether the last line that is not indented begins a numbered item."""
    for line in reversed(out):
        if line.strip() and not line.startswith(" "):
            return re.match(r"\d+\. ", line) is not None
    return False


# ---- what mkdocs calls ----------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    sys.path.insert(0, str(ROOT / "src"))  # the command line and the settings are read off the program
    os.environ.setdefault("COLUMNS", "120")
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    rest = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    if rest:  # a page is never left out because nobody gave it a place
        config.nav.append({"More": rest})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, made in pages().items():
        files.append(File.generated(config, page, content=made()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    address = page.file.src_uri
    if address.startswith(("source/", "reference/")):
        return markdown
    origin = next((file for file, made in HOME.items() if made == address), f"docs/{address}")
    return for_site(markdown, origin, address)
