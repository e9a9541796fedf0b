"""A pytest plugin: the table of what was tried, at the end of `make torture`."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from tests.torture.fuzz_all import TALLIES
    from tests.torture.fuzz_harness import table

    if TALLIES:
        terminalreporter.section("fuzzed inputs")
        terminalreporter.write_line(table(TALLIES))
