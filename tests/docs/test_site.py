"""The hook that makes a site of docs/: links, fences, lists, the pages out of the code. The whole is built by `make site`."""

from __future__ import annotations

import doctest
import importlib.util
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.docs.documents import ROOT, links


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hooks = script("site_hooks")


@pytest.mark.parametrize(
    ("link", "origin", "page", "expected"),
    [
        ("data.md", "docs/faq.md", "faq.md", "data.md"),
        ("data.md#a-table", "docs/faq.md", "faq.md", "data.md#a-table"),
        ("docs/data.md#a-table", "README.md", "index.md", "data.md#a-table"),
        ("docs/images/demo.png", "README.md", "index.md", "images/demo.png"),
        ("../README.md#licence", "docs/faq.md", "faq.md", "index.md#licence"),
        ("CONTRIBUTING.md", "README.md", "index.md", "contributing.md"),
        ("../src/keeplora/math/leak.py", "docs/audit.md", "audit.md", "source/src/keeplora/math/leak.py.md"),
        ("examples/", "README.md", "index.md", "source/examples.md"),
        ("https://arxiv.org/abs/2606.16256", "docs/faq.md", "faq.md", "https://arxiv.org/abs/2606.16256"),
        ("#here", "docs/faq.md", "faq.md", "#here"),
    ],
)
def test_links_lead_to_pages_of_the_site(link: str, origin: str, page: str, expected: str) -> None:
    assert hooks.for_site(f"a [b]({link}) c ![d]({link})\n", origin, page) == f"a [b]({expected}) c ![d]({expected})\n"


def test_what_stands_in_a_fence_stays_but_for_the_words_that_the_tests_read() -> None:
    text = "Run\n```bash norun\n[a](../src/a.py)\n- b\n```\n\n````text\n```yaml file=x.yaml\n````\n"
    assert hooks.for_site(text, "docs/x.md", "x.md") == (
        "Run\n\n```bash\n[a](../src/a.py)\n- b\n```\n\n````text\n```yaml file=x.yaml\n````\n"
    )


def test_lists_are_written_as_python_markdown_reads_them() -> None:
    text = "What holds:\n- one\n  more\n- two\n\n"
    text += "1. First:\n\n   ```yaml file=a.yaml\n   a:\n     b: 1\n   ```\n\n   after\n2. Second\n"
    assert hooks.for_site(text, "docs/x.md", "x.md") == (
        "What holds:\n\n- one\n  more\n- two\n\n1. First:\n\n    ```yaml\n    a:\n      b: 1\n    ```\n\n    after\n\n2. Second\n"
    )


def test_every_link_of_every_page_leads_to_a_page_or_a_file() -> None:
    made = set(hooks.pages())
    there = made | {f"{p.relative_to(ROOT / 'docs')}" for p in (ROOT / "docs").rglob("*") if p.is_file()}
    for origin in hooks.origins():
        page = hooks.page_of(origin)
        for target in links(ROOT / origin):
            moved = re.search(r"\(([^)]+)\)", hooks.for_site(f"[a]({target})", origin, page))
            assert moved is not None
            found = posixpath.normpath(posixpath.join(posixpath.dirname(page), moved[1].partition("#")[0]))
            assert found in there, f"{origin} links to {target}, which the site has not ({found})"


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = re.findall(r": ([\w/-]+\.md)$", text, re.M)
    assert len(named) == len(set(named))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {
        p for p in hooks.pages() if p.endswith(".md") and not p.startswith("source/")
    }
    assert set(named) <= pages, f"not there: {sorted(set(named) - pages)}"
    assert {"method.md", "faq.md", "reference/commands.md", "changelog.md"} <= set(named)


def test_a_page_that_nobody_placed_is_under_more() -> None:
    config = SimpleNamespace(nav=[{"Home": "index.md"}, {"Guides": [{"FAQ": "faq.md"}]}])
    more = hooks.on_config(config).nav[-1]["More"]
    assert "method.md" in more
    assert "faq.md" not in more


def test_the_page_of_commands_is_of_all_commands() -> None:
    page = hooks.commands_page()
    heads = re.findall(r"^#+ (keeplora.*)$", page, re.M)
    assert {
        "keeplora run",
        "keeplora compare",
        "keeplora ledger rollback",
        "keeplora suites doctor",
        "keeplora assets fetch",
    } <= set(heads)
    run = page.split("## keeplora run\n")[1].split("\n## ")[0]
    assert "keeplora run CONFIG [options]" in run
    assert "| `-o`, `--set` |" in run
    assert re.search(r"^\| `--top` \| `5` \| How many candidates", page, re.M)
    assert all(line.count("|") - line.count("\\|") == 4 for line in page.splitlines() if line.startswith("| `"))


def test_the_page_of_settings_has_every_key_with_its_default() -> None:
    from dataclasses import fields

    from keeplora import KeepLoraConfig

    page = hooks.settings_page()
    for key in (
        "model.name",
        "tuner.gamma",
        "training.epochs",
        "tuner.parts.projector",
        "judge.kind",
        "video.frames",
        "seed",
    ):
        assert f"| `{key}` |" in page, key
    assert "| `model.name` | needed |" in page
    assert "| `tuner.gamma` | the preset's |" in page
    assert "| `training.workers` | `0` |" in page
    assert all(f"| `{item.name}` |" in page for item in fields(KeepLoraConfig))


def test_what_the_reference_documents_is_there() -> None:
    import importlib

    for _, names in hooks.API.values():
        for name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                module, _, attribute = name.rpartition(".")
                assert hasattr(importlib.import_module(module), attribute), name


def test_a_source_page_holds_the_file(tmp_path: Path) -> None:
    page = hooks.source_page("src/keeplora/math/leak.py")
    assert page.startswith("# src/keeplora/math/leak.py\n\n```python\n")
    assert (ROOT / "src/keeplora/math/leak.py").read_text(encoding="utf-8").rstrip() in page
    assert "- [torch_loop.py](examples/torch_loop.py.md)" in hooks.source_page("examples")


def test_indices_are_no_links() -> None:
    text = "mean of acc[i][j], not `acc[i][j]`, [a](data.md)\n\n    acc[i][j]\n"
    moved = hooks.for_site(text, "docs/x.md", "x.md")
    assert moved == "mean of acc[i]\\[j], not `acc[i][j]`, [a](data.md)\n\n    acc[i][j]\n"


def test_the_examples_of_the_hook_hold() -> None:
    assert doctest.testmod(hooks).failed == 0
    pytest.importorskip("griffe", reason="griffe comes with the extra `docs`")
    assert doctest.testmod(script("site_docstrings")).failed == 0
