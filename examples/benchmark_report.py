"""The benchmark's results, as tables and as a picture."""

from __future__ import annotations

import sys
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
    "ours+plan",
    "bare",
)
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
    refused: str = ""


@dataclass(frozen=True)
class Row:
    """All methods on one call."""

    case: str
    dtype: str
    share: float | None
    """Of valid text; None: no mask."""
    route: str
    backend: str
    """Which of its backends PyTorch picked by itself."""
    backend_kernel: str
    """The kernel in which the default spends most of its time; empty on a CPU."""
    ideal: float
    plan_ms: float
    rounds: int
    calls: int
    input_sets: int
    methods: dict[str, Timing]

    @property
    def speedup(self) -> float | None:
        """How many times faster than PyTorch's attention with the same mask."""
        default, ours = self.methods["default"].ms, self.methods["ours"].ms
        return default / ours if default and ours else None

    @property
    def of_ideal(self) -> float | None:
        """The speedup as a share of what the padding leaves to be saved."""
        return self.speedup and self.speedup / self.ideal

    @property
    def of_kernel(self) -> float | None:
        """The time of the bare kernel as a share of ours."""
        bare, ours = self.methods["bare"].ms, self.methods["ours"].ms
        return bare / ours if bare and ours else None


def show(rows: list[Row], swept: dict[str, list[Row]], markdown: bool) -> None:
    """Print the tables, and every refusal once."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    tables = {"ms per call": method_table(rows)}
    tables |= {name: share_table(lot) for name, lot in swept.items()}
    for title, lines in tables.items():
        if markdown:
            print(f"\n{title}\n\n{markdown_of(lines)}\n")
        else:
            console.print(table_of(lines, title))
        if lines is tables["ms per call"]:
            print(refusals(rows))


def method_table(rows: list[Row]) -> Lines:
    """Milliseconds of every method on every call."""
    head = ("case", "dtype", "valid text", "backend", *METHODS, "ours TFLOP/s", "host waits")
    return [head, *map(method_cells, rows)]


def method_cells(row: Row) -> tuple[str, ...]:
    """A row in words; the host's waits are those of WAITING, in its order."""
    tflops = row.methods["ours"].tflops
    waits = [row.methods[name].syncs for name in WAITING]
    return (
        row.case,
        row.dtype,
        share_of(row),
        row.backend,
        *(time_of(row.methods[name]) for name in METHODS),
        "-" if tflops is None else f"{tflops:.3g}",
        "/".join("-" if n is None else str(n) for n in waits),
    )


def time_of(timing: Timing) -> str:
    """Milliseconds, marked where the result is wrong."""
    if timing.ms is None:
        return "refused"
    return f"{timing.ms:.2f}{' wrong' if timing.wrong else ''}"


def share_table(rows: list[Row]) -> Lines:
    """What the padding costs, and what of it is saved."""
    head = ("dtype", "valid text", "route", "default", "ours", "bare kernel", "plan")
    return [(*head, "speedup", "of ideal"), *map(share_cells, rows)]


def share_cells(row: Row) -> tuple[str, ...]:
    """A row in words."""
    times = [row.methods[name].ms for name in ("default", "ours", "bare")] + [row.plan_ms]
    return (
        row.dtype,
        share_of(row),
        row.route,
        *("refused" if ms is None else f"{ms:.2f} ms" for ms in times),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
        "-" if row.of_ideal is None else f"{row.of_ideal:.2f} of {row.ideal:.2f}x",
    )


def share_of(row: Row) -> str:
    """The share of valid text in words."""
    return "no mask" if row.share is None else f"{100 * row.share:.3g}%"


def refusals(rows: list[Row]) -> str:
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
    """A table for the README."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *body])


def plot(swept: dict[str, list[Row]], path: str) -> None:
    """Draw time against the share of valid text, a panel for each case and dtype."""
    from matplotlib.figure import Figure  # who wants no picture needs no matplotlib

    panels = [
        (case, dtype, [row for row in rows if row.dtype == dtype])
        for case, rows in swept.items()
        for dtype in dict.fromkeys(row.dtype for row in rows)
    ]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (case, dtype, rows) in zip(every_axes, panels):
        masked = [row for row in rows if row.share is not None]
        unmasked = next(row.methods["default"].ms for row in rows if row.share is None)
        shares = [100 * row.share for row in masked]
        for name, colour in (("default", "#0072B2"), ("ours", "#D55E00")):
            times = [row.methods[name].ms for row in masked]
            axes.plot(shares, times, marker="o", color=colour, label=name)
        ideal = [unmasked / row.ideal for row in masked]
        label = "ideal: default without a mask, less the padding's share"
        axes.plot(shares, ideal, linestyle="--", color="#555555", label=label)
        axes.set(title=f"{case}, {dtype}", xlabel="valid text, %", ylabel="ms per call")
        axes.set_ylim(bottom=0)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=150)
