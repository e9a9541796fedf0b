"""`keeplora methods` and `keeplora suites`: what there is to choose from."""

from __future__ import annotations


def methods() -> None:
    """List the methods."""
    from rich.console import Console
    from rich.table import Table

    from keeplora.methods import get_method, method_names

    table = Table()
    for header in ("name", "title", "what it does"):
        table.add_column(header)
    for name in method_names():
        method = get_method(name)
        table.add_row(name, method.title, method.summary)
    Console().print(table)


def suites() -> None:
    """List the packaged suites."""
    from rich.console import Console
    from rich.table import Table

    from keeplora.suites import load_suite, suite_names

    table = Table()
    for header in ("name", "tasks", "probes", "what it is"):
        table.add_column(header)
    for name in suite_names():
        suite = load_suite(name)
        tasks, probes = (", ".join(spec["name"] for spec in suite.get(key, [])) for key in ("tasks", "probes"))
        table.add_row(name, tasks, probes, suite.get("description", ""))
    Console().print(table)
