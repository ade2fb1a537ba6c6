"""The table of layers: alike layers in one row, with the call that uses most of its budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers_fa3.tools.check.parity import Layer

HEAD = ("layers", "", "calls", "kernel", "default", "ours", "allowed", "share", "")


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
    return [HEAD, *(_row(members) for members in groups.values())]


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


def _row(members: list[Layer]) -> tuple[str, ...]:
    first = members[0]
    name = first.name if len(members) == 1 else _pattern(first.name)
    calls = [call for layer in members for call in layer.calls]
    head = name, f"x{len(members)}", str(len(calls)), _served(first)
    if first.raised:
        return *head, "", "", "", "", "RAISED"
    if not calls:
        return *head, "", "", "", "", "not compared"
    worst = max(calls, key=lambda call: call.measured.share)
    measured = worst.measured
    return (
        *head,
        *(f"{e.largest:.1e}" for e in (measured.default, measured.ours, measured.allowed)),
        f"{measured.share:.2f}",
        "ok" if worst.passed else "FAILED",
    )
