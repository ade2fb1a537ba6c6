"""What a run of the tests prints last."""

from __future__ import annotations

import pytest
import support


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the support table, where a test measured it."""
    if support.routes_table.cache_info().currsize:
        terminalreporter.section("routes of each model, as in the README")
        terminalreporter.write_line(support.routes_table())
