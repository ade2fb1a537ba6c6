"""Plot time against padding and against length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusers_fa3.errors import InputError
from diffusers_fa3.tools.bench.tables import Row, swept

FEWEST = 3
"""The fewest points along an axis that make a panel."""
LINES = {
    "default": ("#0072B2", "default"),
    "ours": ("#D55E00", "ours, keys packed"),
    "ours+q": ("#009E73", "ours, queries packed too"),
}
"""Method that is drawn -> (colour, label)."""


@dataclass(frozen=True)
class Panel:
    """The plot of one case and dtype, along padding or length."""

    title: str
    rows: list[Row]
    unmasked: dict[int, float]
    """Milliseconds of the default without a mask, by number of tokens."""
    by_length: bool

    def where(self, row: Row) -> float:
        """The row's place on the horizontal axis: tokens, or percent of padding."""
        return row.tokens if self.by_length else 100 * (1 - (row.share or 0))

    def ideal(self, row: Row) -> float | None:
        """The default's time, without a mask if that was measured, divided by `Row.ideal`."""
        default = self.unmasked.get(row.tokens) or row.ms("default")
        return default and default / row.ideal


def panels(rows: Sequence[Row]) -> list[Panel]:
    """The panels of all cases that were measured at several lengths or shares of valid text."""
    return [panel for name, lot in swept(rows).items() for panel in _panels_of(name, lot)]


def _panels_of(case: str, rows: list[Row]) -> Iterator[Panel]:
    for dtype in dict.fromkeys(row.dtype for row in rows):
        of_dtype = [row for row in rows if row.dtype == dtype]
        masked = sorted(
            (row for row in of_dtype if row.share is not None),
            key=lambda row: (row.tokens, row.share or 0),
        )
        times = {row.tokens: row.ms("default") for row in of_dtype if row.share is None}
        unmasked = {tokens: ms for tokens, ms in times.items() if ms is not None}
        for tokens in dict.fromkeys(row.tokens for row in masked):
            along = [row for row in masked if row.tokens == tokens]
            if len(along) >= FEWEST:
                yield Panel(f"{case}, {tokens} tokens, {dtype}", along, unmasked, by_length=False)
        for share in dict.fromkeys(row.share for row in masked):
            along = [row for row in masked if row.share == share]
            if len(along) >= FEWEST:
                title = f"{case}, {100 * (share or 0):.3g}% valid text, {dtype}"
                yield Panel(title, along, unmasked, by_length=True)


def check_format(file: Path) -> None:
    """Refuse a file whose suffix names no format of pictures, before anything is measured."""
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix[1:].lower() not in formats:
        raise InputError(
            f"--plot takes its format from the file's suffix; got {file}. Give one of "
            f"{', '.join(formats)}"
        )


def plot(rows: Sequence[Row], path: str) -> None:
    """Draw a panel for each sweep into the file `path`, whose suffix gives the format.

    Raises:
        InputError: there is no sweep.
    """
    drawn = panels(rows)
    if not drawn:
        raise InputError(
            f"a plot needs {FEWEST} shares of valid text, or as many lengths; got {len(rows)} "
            "calls that are none. Give more --valid, or --lengths"
        )
    columns = min(len(drawn), 4)
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, drawn):
        _draw(axes, panel)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, panel: Panel) -> None:
    for method, (colour, label) in LINES.items():
        points = [(panel.where(row), row.ms(method)) for row in panel.rows]
        points = [(x, ms) for x, ms in points if ms is not None]
        axes.plot(*zip(*points), marker="o", markersize=3, color=colour, label=label)
    ideal = [(panel.where(row), panel.ideal(row)) for row in panel.rows]
    axes.plot(*zip(*ideal), linestyle="--", color="#555555", label="ideal, of keys packed")
    axes.set_title(panel.title, fontsize="medium")
    axes.set_ylabel("ms per call")
    if panel.by_length:
        axes.set(xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks([row.tokens for row in panel.rows])
        axes.set_xticklabels([str(row.tokens) for row in panel.rows], rotation=45)
        axes.minorticks_off()
    else:
        axes.set_xlabel("padding in the text, %")
        axes.set_ylim(bottom=0)
