"""The templates of the HTML pages, opened in one way."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def page_template(name: str) -> Template:
    """A page's template: every text is escaped, and a name that nobody gave is an error.

    Kept, since reading a template takes far longer than filling it, and a run writes its report after every task.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
