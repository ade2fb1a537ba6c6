"""The number of random examples, and the support table at the end of a test run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import support
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# No deadline: a loaded machine may be slow, whatever the code does.
settings.register_profile(
    "ci",
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    settings.get_profile("ci"),
    max_examples=600,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),  # tries failed examples first
    print_blob=True,
)
settings.load_profile("ci")


ROUTES = "routes"
TABLE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread per process: more would wait for each other, and the models are tiny."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests start


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over the support table, if a test measured it."""
    if support.routes_table.cache_info().currsize:
        output = getattr(session.config, "workeroutput", None)
        session.config.stash[TABLE] = support.routes_table()
        if output is not None:
            output[ROUTES] = support.routes_table()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the table over from the worker that measured it."""
    output = getattr(node, "workeroutput", {})
    if ROUTES in output:
        node.config.stash[TABLE] = output[ROUTES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    if TABLE in config.stash:
        terminalreporter.section("routes of each model, as in docs/coverage.md")
        terminalreporter.write_line(config.stash[TABLE])
