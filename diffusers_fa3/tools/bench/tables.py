"""What was measured, as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

Lines = list[tuple[str, ...]]
"""A table; its first line is its head."""

METHODS = (
    "default",
    "cudnn",
    "_flash_3",
    "_flash_varlen_3",
    "_flash_3_varlen_hub",
    "ours",
    "ours+q",
    "ours+plan",
    "bare",
)
"""In a row there is no "ours+q" where padded tokens are no queries of their own."""
WAITING = ("_flash_varlen_3", "_flash_3_varlen_hub", "ours", "ours+plan")
"""Methods of which the host's waits are shown."""


@dataclass(frozen=True)
class Timing:
    """One method on one call."""

    ms: float | None = None
    """Median per call; None: refused."""
    times_ms: tuple[float, ...] = ()
    tflops: float | None = None
    """TFLOP/s, of what the mask leaves to compute."""
    error: float | None = None
    """Of the rows that see a key, against the default, relative, as a Euclidean norm."""
    wrong: bool = False
    syncs: int | None = None
    """How often one call makes the host wait; None: not on a GPU."""
    peak_mb: float | None = None
    """The most memory that one call has at a time, besides its inputs."""
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """All methods on one call."""

    case: str
    dtype: str
    tokens: int
    """Of text and image together."""
    share: float | None
    """Of valid text; None: no mask."""
    route: str
    backend: str
    """Which of its backends PyTorch picked by itself."""
    backend_kernel: str
    """The kernel in which the default spends most of its time; empty on a CPU."""
    ideal: float
    """What the padding leaves to be saved: B * Sq * Sk over the sum of q_i * k_i."""
    ideal_q: float
    """The same where padded tokens are no queries."""
    plan_ms: float
    rounds: int
    calls: int
    input_sets: int
    methods: dict[str, Timing]

    def ms(self, method: str) -> float | None:
        """Milliseconds; None where the method refuses the call, or is not there."""
        timing = self.methods.get(method)
        return None if timing is None else timing.ms

    @property
    def speedup(self) -> float | None:
        """How many times faster than PyTorch's attention with the same mask."""
        return _ratio(self.ms("default"), self.ms("ours"))

    @property
    def speedup_q(self) -> float | None:
        """The same where padded tokens are no queries."""
        return _ratio(self.ms("default"), self.ms("ours+q"))

    @property
    def of_ideal(self) -> float | None:
        """The speedup as a share of what the padding leaves to be saved."""
        return self.speedup and self.speedup / self.ideal

    @property
    def of_ideal_q(self) -> float | None:
        """The same where padded tokens are no queries."""
        return self.speedup_q and self.speedup_q / self.ideal_q

    @property
    def of_kernel(self) -> float | None:
        """The time of the bare kernel as a share of ours."""
        return _ratio(self.ms("bare"), self.ms("ours"))


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def show(rows: Sequence[Row], markdown: bool) -> None:
    """Print the tables, and every refusal once."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    tables = {"ms per call": _method_table(rows), "peak memory, MB": _memory_table(rows)}
    tables |= {f"saved: {case}": _saving_table(lot) for case, lot in swept(rows).items()}
    for title, lines in tables.items():
        if markdown:
            print(f"\n{title}\n\n{markdown_of(lines)}\n")
        else:
            console.print(table_of(lines, title))
    print(_refusals(rows))


def swept(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each case that was measured at several lengths or shares of valid text."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    return {
        case: lot
        for case, lot in by_case.items()
        if len({(row.tokens, row.share) for row in lot}) > 1
    }


def _method_table(rows: Sequence[Row]) -> Lines:
    """Milliseconds of every method; the host's waits are those of WAITING, in its order."""
    head = ("case", "dtype", "tokens", "valid text", "backend", *METHODS, "ours TFLOP/s", "waits")
    return [head, *map(_method_cells, rows)]


def _method_cells(row: Row) -> tuple[str, ...]:
    tflops = row.methods["ours"].tflops
    waits = [row.methods[name].syncs for name in WAITING]
    return (
        *_call_cells(row),
        row.backend,
        *(_time_of(row.methods.get(name)) for name in METHODS),
        "-" if tflops is None else f"{tflops:.3g}",
        "/".join("-" if n is None else str(n) for n in waits),
    )


def _call_cells(row: Row) -> tuple[str, ...]:
    share = "no mask" if row.share is None else f"{100 * row.share:.3g}%"
    return row.case, row.dtype, str(row.tokens), share


def _time_of(timing: Timing | None) -> str:
    """Milliseconds, marked where the result is wrong."""
    if timing is None:
        return "-"
    if timing.ms is None:
        return "refused"
    return f"{timing.ms:.2f}{' wrong' if timing.wrong else ''}"


def _memory_table(rows: Sequence[Row]) -> Lines:
    """Megabytes of every method, besides what it was given."""
    return [
        ("case", "dtype", "tokens", "valid text", *METHODS),
        *(
            (*_call_cells(row), *(_memory_of(row.methods.get(name)) for name in METHODS))
            for row in rows
        ),
    ]


def _memory_of(timing: Timing | None) -> str:
    return "-" if timing is None or timing.peak_mb is None else f"{timing.peak_mb:.4g}"


def _saving_table(rows: Sequence[Row]) -> Lines:
    """What the padding costs, and what of it is saved, by keys alone and by queries too."""
    names = ("default", "ours", "ours+q", "bare kernel", "plan")
    head = ("dtype", "tokens", "valid text", "route", *names)
    return [(*head, "speedup", "of ideal", "with +q", "of ideal"), *map(_saving_cells, rows)]


def _saving_cells(row: Row) -> tuple[str, ...]:
    times = [*map(row.ms, ("default", "ours", "ours+q", "bare")), row.plan_ms]
    return (
        *_call_cells(row)[1:],
        row.route,
        *("-" if ms is None else f"{ms:.2f} ms" for ms in times),
        *_share_of(row.speedup, row.of_ideal, row.ideal),
        *_share_of(row.speedup_q, row.of_ideal_q, row.ideal_q),
    )


def _share_of(speedup: float | None, share: float | None, ideal: float) -> tuple[str, str]:
    if speedup is None or share is None:
        return "-", "-"
    return f"{speedup:.2f}x", f"{share:.2f} of {ideal:.2f}x"


def _refusals(rows: Sequence[Row]) -> str:
    """Every reason once, with the calls that it was given for."""
    calls: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, timing in row.methods.items():
            if timing.refused:
                calls.setdefault((name, timing.refused), []).append(row.case)
    return "\n".join(
        f"{name} refuses {', '.join(dict.fromkeys(cases))}: {why}"
        for (name, why), cases in calls.items()
    )


def table_of(lines: Lines, title: str) -> Table:
    """A table for a terminal."""
    table = Table(title=title)
    for name in lines[0]:
        table.add_column(name)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def markdown_of(lines: Lines) -> str:
    """The tables as Markdown."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *body])
