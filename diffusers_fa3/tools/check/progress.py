"""A bar on the terminal while a check runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar() -> Iterator[Callable[[str], None]]:
    """Show a bar, on stderr and only if that is a terminal; yields the `on_progress` of a check."""
    console = Console(stderr=True)
    words = TextColumn("{task.description:>24} {task.completed:>5}")
    bar = Progress(
        words,
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    stages = {"loading": bar.add_task("loading", total=None)}

    def advance(stage: str) -> None:
        if stage not in stages:
            for earlier in stages.values():
                bar.update(earlier, visible=False)
            stages[stage] = bar.add_task(stage, total=None)  # how many calls there are, none knows
        bar.advance(stages[stage])

    with bar:
        yield advance
