"""The measurements as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

Lines = list[tuple[str, ...]]
"""A table, as lines of cells; the first line is the head."""

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
"""The methods, in the order of columns. A row has no "ours+q" if its call has no padded queries."""
WAITING = ("_flash_varlen_3", "_flash_3_varlen_hub", "ours", "ours+plan")
"""The methods whose host waits are shown."""

CAPTION = (
    "_flash_*: diffusers' own packing for these backends, run on the kernel that serves ours. "
    f"waits: of {', '.join(WAITING)}, in this order"
)


@dataclass(frozen=True)
class Timing:
    """One method on one call."""

    ms: float | None = None
    """Median milliseconds per call; None: refused."""
    times_ms: tuple[float, ...] = ()
    tflops: float | None = None
    """TFLOP/s, counting only the work that the mask leaves."""
    error: float | None = None
    """Relative error against the default, in the Euclidean norm, over rows that see a key."""
    wrong: bool = False
    syncs: int | None = None
    """How often one call makes the host wait; None: not on a GPU."""
    peak_mb: float | None = None
    """Peak memory of one call, without its inputs."""
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """All methods on one call."""

    case: str
    dtype: str
    tokens: int
    """Text and image tokens together."""
    share: float | None
    """Share of the text that is valid; None: no mask."""
    route: str
    backend: str
    """The backend that PyTorch picked for the default."""
    backend_kernel: str
    """The kernel in which the default spends most of its time; empty on a CPU."""
    ideal: float
    """The speedup if masked pairs cost nothing: B * Sq * Sk over the sum of q_i * k_i."""
    ideal_q: float
    """`ideal` if padded tokens are left out as queries too."""
    plan_ms: float
    rounds: int
    calls: int
    input_sets: int
    methods: dict[str, Timing]

    def ms(self, method: str) -> float | None:
        """Milliseconds; None if the method refuses the call or is not in the row."""
        timing = self.methods.get(method)
        return None if timing is None else timing.ms

    @property
    def speedup(self) -> float | None:
        """How many times faster "ours" is than PyTorch's attention with the same mask."""
        return _ratio(self.ms("default"), self.ms("ours"))

    @property
    def speedup_q(self) -> float | None:
        """The speedup of "ours+q", which leaves padded tokens out as queries too."""
        return _ratio(self.ms("default"), self.ms("ours+q"))

    @property
    def of_ideal(self) -> float | None:
        """`speedup` as a share of `ideal`."""
        return self.speedup and self.speedup / self.ideal

    @property
    def of_ideal_q(self) -> float | None:
        """`speedup_q` as a share of `ideal_q`."""
        return self.speedup_q and self.speedup_q / self.ideal_q

    @property
    def of_kernel(self) -> float | None:
        """The time of "bare" as a share of the time of "ours"."""
        return _ratio(self.ms("bare"), self.ms("ours"))


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def show(rows: Sequence[Row], markdown: bool) -> None:
    """Print the tables, and each refusal once."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    tables = {"ms per call": _method_table(rows), "peak memory, MB": _memory_table(rows)}
    tables |= {f"saved: {case}": _saving_table(lot) for case, lot in swept(rows).items()}
    for title, lines in tables.items():
        if markdown:
            print(f"\n{title}\n\n{markdown_of(lines)}\n")
        else:
            console.print(table_of(lines, title))
    print(CAPTION)
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
    """Milliseconds of every method; the last column has the host waits of `WAITING`, in order."""
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
    """Milliseconds, marked if the result is wrong."""
    if timing is None:
        return "-"
    if timing.ms is None:
        return "refused"
    return f"{timing.ms:.2f}{' wrong' if timing.wrong else ''}"


def _memory_table(rows: Sequence[Row]) -> Lines:
    """Peak megabytes of every method, without its inputs."""
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
    """How much of the ideal is saved by packing keys alone, and by packing queries too."""
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
    """Each refusal once, with the cases that it was given for."""
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
    """A table as Markdown."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *body])
