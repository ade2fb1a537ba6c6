"""The table of layers: alike layers in one row, with the call that uses most of its budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers_fa3.tools.check.parity import Call, Layer

HEAD = ("layers", "", "calls", "kernel", "default", "ours", "allowed", "share", "")
RANK = "of rank"
"""Head of the last column, where a model was split over ranks: whose the worst call is."""


def table_of(layers: Sequence[Layer]) -> str:
    """A line for each group of layers; errors are relative to the largest value of the output."""
    lines = rows_of(layers)
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    ]
    reasons: Counter[str] = Counter()
    for layer in layers:
        reasons.update(layer.fallbacks)
    unswitchable = Counter(layer.unswitchable for layer in layers if layer.unswitchable)
    return "\n".join(
        [
            *table,
            *(f"default attention, {n} times: {reason}" for reason, n in reasons.items()),
            *(f"default attention, in {n} layers: {reason}" for reason, n in unswitchable.items()),
        ]
    )


def rows_of(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """The cells of the table, its head among them."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_likeness(layer), []).append(layer)
    rows = [HEAD, *(_row(members) for members in groups.values())]
    ranks = [RANK, *(_rank_of_worst(members) for members in groups.values())]
    return [(*row, rank) for row, rank in zip(rows, ranks)] if any(ranks[1:]) else rows


def _likeness(layer: Layer) -> tuple[object, ...]:
    verdict = bool(layer.raised), layer.worst is not None and layer.worst.passed
    return _pattern(layer.name), layer.processor, _served(layer), *verdict


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _served(layer: Layer) -> str:
    routes: dict[str, list[str]] = {}
    for call in layer.calls:
        routes.setdefault(call.kernel, []).append(call.route)
    served = [f"{kernel} ({', '.join(dict.fromkeys(of))})" for kernel, of in routes.items()]
    default = ["default"] if layer.fallbacks or layer.unswitchable else []
    return ", ".join([*served, *default]) or (layer.raised[0].kernel if layer.raised else "none")


def _rank_of_worst(members: Sequence[Layer]) -> str:
    raised = members[0].raised
    worst = raised[0] if raised else _worst(members)
    return "" if worst is None or worst.rank is None else str(worst.rank)


def _worst(members: Sequence[Layer]) -> Call | None:
    calls = [call for layer in members for call in layer.calls]
    return max(calls, key=lambda call: call.measured.share, default=None)


def _row(members: list[Layer]) -> tuple[str, ...]:
    first = members[0]
    name = first.name if len(members) == 1 else _pattern(first.name)
    worst = _worst(members)
    many = sum(len(layer.calls) for layer in members)
    head = name, f"x{len(members)}", str(many), _served(first)
    if first.raised:
        return *head, "", "", "", "", "RAISED"
    if worst is None:
        return *head, "", "", "", "", "not compared"
    measured = worst.measured
    return (
        *head,
        *(f"{e.largest:.1e}" for e in (measured.default, measured.ours, measured.allowed)),
        f"{measured.share:.2f}",
        "ok" if worst.passed else "FAILED",
    )
